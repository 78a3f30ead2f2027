"""Paired and published normalisation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from petite_fast.data import Normaliser, thin
from petite_fast.data.normalise import foreground_threshold, mean_uptake
from petite_fast.errors import InputError


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", ["paired", "petite"])
def test_inverse_restores_the_units(blob: np.ndarray, kind: str, as_tensor: bool) -> None:
    normaliser = Normaliser(kind)
    record = json.loads(json.dumps(normaliser.fit(blob)))
    values = torch.from_numpy(blob) if as_tensor else blob
    normalised = normaliser.apply(values, record)
    assert type(normalised) is type(values) and normalised.dtype == values.dtype
    back = normaliser.inverse(normalised, record)
    np.testing.assert_allclose(np.asarray(back), blob, rtol=3e-7, atol=1e-3)


def test_paired_keeps_the_ratio_of_target_to_input(blob: np.ndarray) -> None:
    input_record, target_record = Normaliser().fit_pair(blob, 3 * blob)
    assert input_record == target_record
    assert input_record["offset"] == 0


def test_petite_maps_each_volume_to_0_1_by_itself(blob: np.ndarray) -> None:
    normaliser = Normaliser("petite")
    records = normaliser.fit_pair(blob + 5, 3 * blob)
    for volume, record in zip((blob + 5, 3 * blob), records, strict=True):
        scaled = normaliser.apply(volume, record)
        assert scaled.min() == 0 and scaled.max() == pytest.approx(1)


def test_scale_follows_the_units(blob: np.ndarray) -> None:
    scale = Normaliser().fit(blob)["scale"]
    assert Normaliser().fit(blob * 250)["scale"] == pytest.approx(250 * scale, rel=1e-6)


def test_scale_ignores_noise_and_hot_voxels() -> None:
    body = np.zeros((40, 40, 40), np.float32)
    body[8:32, 8:32, 8:32] = 100
    assert mean_uptake(body) == 100 and foreground_threshold(body) == 50
    scale = Normaliser().fit(body)["scale"]
    noisy = thin(body, 1 / 6, np.random.default_rng(0), counts=50 * 24**3)
    assert noisy.max() > 200  # the maximum has doubled
    assert Normaliser().fit(noisy)["scale"] == pytest.approx(scale, rel=0.02)
    body[10, 10, 10] = 50_000
    assert Normaliser().fit(body)["scale"] == pytest.approx(scale, rel=0.05)


def test_negative_voxels_do_not_move_the_scale(blob: np.ndarray) -> None:
    shifted = np.where(blob > 0, blob, -50).astype(np.float32)
    assert Normaliser().fit(shifted) == Normaliser().fit(blob)


@pytest.mark.parametrize("kind", ["paired", "petite"])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 4)), "no voxel is above zero"),
        (np.full((4, 4, 4), -1.0), "no voxel is above zero"),
        (np.zeros((0, 4, 4)), "no voxel is above zero"),
        (np.full((4, 4, 4), 2.0), "every voxel is 2"),
        (np.array([[[1.0, np.nan]]]), "NaN or Inf"),
        (np.array([[[1.0, -np.inf]]]), "NaN or Inf"),
    ],
)
def test_volume_without_signal_is_refused(
    blob: np.ndarray, kind: str, array: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=f"scan.nii: .*{message}.*; expected"):
        Normaliser(kind).fit(array, "scan.nii")
    with pytest.raises(InputError, match=f"target.nii: .*{message}"):
        Normaliser(kind).fit_pair(blob, array, ("input.nii", "target.nii"))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="'z-score'; expected 'paired' or 'petite'"):
        Normaliser("z-score")
