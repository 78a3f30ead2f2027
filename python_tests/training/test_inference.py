"""Sliding-window reconstruction: any size, original units, own grid; and evaluation of files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from dicom_cases import make_series
from torch import nn

from petite_fast.data import Normaliser, write_volume
from petite_fast.errors import InputError
from petite_fast.training.evaluate import Comparison, evaluate
from petite_fast.training.inference import (
    Reconstructor,
    check_distinct,
    find_inputs,
    output_path,
    result_names,
)

RNG = np.random.default_rng(3)


class Strict(nn.Module):
    """Twice its input, and like the generator it takes only sides that are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert all(side % 16 == 0 for side in x.shape[2:])
        self.shapes.add(tuple(x.shape[2:]))
        return self.factor * x


@pytest.mark.parametrize("shape", [(40, 33, 17), (16, 16, 16), (5, 50, 20), (9, 8, 7)])
def test_any_size_is_padded_and_cropped_back(shape) -> None:
    net = Strict()
    array = RNG.random(shape).astype(np.float32) * 3e4
    result = Reconstructor(net, (16, 32, 16), Normaliser()).array(array)
    assert result.shape == shape and result.dtype == np.float32
    np.testing.assert_allclose(result, 2 * array, rtol=1e-5)
    assert net.shapes == {(16, 32, 16)}


def test_a_patch_that_is_no_multiple_of_16_is_rounded_up() -> None:
    net = Strict()
    Reconstructor(net, (20, 16, 10), Normaliser()).array(RNG.random((40, 20, 20)))
    assert net.shapes == {(32, 16, 16)}


def test_published_normalisation_is_inverted_by_the_input() -> None:
    array = RNG.random((16, 16, 16)).astype(np.float32) + 1
    result = Reconstructor(Strict(), (16, 16, 16), Normaliser("petite")).array(array)
    np.testing.assert_allclose(result, 2 * (array - array.min()) + array.min(), rtol=1e-5)


def test_find_inputs_leaves_own_outputs_out(tmp_path) -> None:
    for name in ("b.nii.gz", "a.nii", "a_desc-petite.nii.gz", "notes.txt", ".hidden.nii"):
        (tmp_path / name).touch()
    assert [p.name for p in find_inputs(tmp_path)] == ["a.nii", "b.nii.gz"]
    assert output_path(tmp_path / "b.nii.gz", tmp_path).name == "b_desc-petite.nii.gz"
    with pytest.raises(InputError, match="one output name"):
        check_distinct([tmp_path / "a.nii", tmp_path / "sub" / "a.nii.gz"])


def test_find_inputs_in_folders_of_patients(tmp_path) -> None:
    """An export of a hospital: DICOMDIR, patients, studies, series; names where IDs are kept."""
    export = tmp_path / "export"
    series = [make_series(export / "DICOM" / name / "study" / "pet") for name in ("DOE", "ROE")]
    (export / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (export / "DICOM" / "readme.txt").write_text("exported")
    (export / "DICOM" / "ROE_desc-petite_dicom").mkdir()
    found = find_inputs(export)
    assert found == series
    assert result_names(found, keep_ids=False) == ["series-001", "series-002"]
    with pytest.raises(InputError, match="one output name"):
        result_names(found, keep_ids=True)
    assert find_inputs(series[0]) == series[:1]
    with pytest.raises(InputError, match="no NIfTI"):
        find_inputs(export / "DICOM" / "ROE_desc-petite_dicom")


def test_evaluate_means_and_json(tmp_path) -> None:
    target = RNG.random((10, 11, 12)).astype(np.float32) + 0.5
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    write_volume(target, affine, tmp_path / "t.nii.gz")
    write_volume(target + 0.1, affine, tmp_path / "p.nii.gz")
    equal = Comparison("b", tmp_path / "t.nii.gz", tmp_path / "t.nii.gz")
    report = evaluate([Comparison("a", tmp_path / "p.nii.gz", tmp_path / "t.nii.gz"), equal])
    first, second = report["subjects"]
    assert first["psnr"] == pytest.approx(20 * math.log10(target.max() / 0.1), abs=1e-3)
    assert first["nrmse"] == pytest.approx(0.1 / np.ptp(target), rel=1e-4)
    body = first["uptake"]["body"]["mean"]
    assert body["output"] - body["target"] == pytest.approx(0.1, rel=1e-5)
    assert body["bias_percent"] == pytest.approx(10 / body["target"], rel=1e-5)
    uptake = second.pop("uptake")
    assert second == {"subject": "b", "psnr": None, "ssim": 1.0, "nrmse": 0.0}
    assert all(v["bias_percent"] == 0 for region in uptake.values() for v in region.values())
    assert report["overall"]["nrmse"]["mean"] == pytest.approx(first["nrmse"] / 2)
    json.dumps(report, allow_nan=False)
