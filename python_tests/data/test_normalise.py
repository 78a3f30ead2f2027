"""Normalisation can be undone; thinning has the statistics it claims."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from petite_fast.data import Normaliser, read_volume, thin
from petite_fast.data.normalise import foreground_threshold, mean_uptake, require_signal
from petite_fast.errors import InputError

SHAPE = (12, 13, 14)


def image(seed: int = 0) -> np.ndarray:
    """Body of 1000-9000 in air of 0."""
    out = np.zeros(SHAPE, np.float32)
    out[3:9, 3:9, 3:9] = np.random.default_rng(seed).uniform(1e3, 9e3, (6, 6, 6))
    return out


@pytest.mark.parametrize("kind", ["paired", "petite"])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e6])
def test_inverse_restores_units(kind: str, unit: float) -> None:
    array = image() * np.float32(unit) - np.float32(3 * unit)
    record = Normaliser(kind).fit(array)  # type: ignore[arg-type]
    normalised = Normaliser.apply(array, record)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(
        Normaliser.inverse(normalised, record), array, rtol=1e-6, atol=1e-6 * float(array.max())
    )
    tensor = torch.from_numpy(array)
    out = Normaliser.apply(tensor, record)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), normalised, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        Normaliser.inverse(out, record).numpy(), array, rtol=1e-6, atol=1e-6 * float(array.max())
    )


def test_paired_scale_is_twice_the_mean_uptake_of_the_input() -> None:
    array, target = image(), image(1) * 3
    body = array[3:9, 3:9, 3:9]
    # All of the body is above an eighth of the mean of all voxels: the mean by hand.
    assert body.min() > array.mean() / 8
    assert mean_uptake(array) == pytest.approx(body.mean(dtype=np.float64))
    assert foreground_threshold(array) == pytest.approx(body.mean(dtype=np.float64) / 2)
    first, second = Normaliser().fit_pair(array, target)
    assert first == second
    assert first == {
        "kind": "paired",
        "offset": 0.0,
        "scale": pytest.approx(2 * body.mean(dtype=np.float64)),
    }
    # The ratio of target to input survives.
    ratio = Normaliser.apply(target, second).sum() / Normaliser.apply(array, first).sum()
    assert ratio == pytest.approx(target.sum() / array.sum(), rel=1e-5)


def test_petite_maps_each_volume_to_0_1() -> None:
    array, target = image() - 5, image(1) * 3
    first, second = Normaliser("petite").fit_pair(array, target)
    for volume, record in ((array, first), (target, second)):
        out = Normaliser.apply(volume, record)
        assert out.min() == 0 and out.max() == pytest.approx(1)
    assert first["offset"] == -5 and second["scale"] == pytest.approx(float(target.max()))


@pytest.mark.parametrize("kind", ["paired", "petite"])
def test_record_survives_json(kind: str) -> None:
    record = Normaliser(kind).fit(image())  # type: ignore[arg-type]
    assert json.loads(json.dumps(record)) == record


def test_mean_uptake_ignores_negatives_and_hardly_moves_with_a_hot_spot() -> None:
    array = image()
    negative = array.copy()
    negative[0, 0, :3] = -1e6
    assert mean_uptake(negative) == mean_uptake(array)
    hot = array.copy()
    hot[4, 4, 4] = 10 * array.max()
    assert mean_uptake(hot) < 1.1 * mean_uptake(array)
    assert hot.max() > 9 * array.max()


@pytest.mark.parametrize("kind", ["paired", "petite"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a * 0, "no voxel is above zero"),
        (lambda a: -a, "no voxel is above zero"),
        (lambda a: a * 0 + 7, "every voxel is 7"),
        (lambda a: np.where(a > 0, np.nan, a), "NaN or Inf"),
        (lambda a: np.where(a > 0, np.inf, a), "NaN or Inf"),
        (lambda a: a[:0], "no voxel is above zero"),
    ],
)
def test_volume_without_signal(kind: str, change, words: str) -> None:  # type: ignore[no-untyped-def]
    bad = change(image())
    normaliser = Normaliser(kind)  # type: ignore[arg-type]
    for call in (
        lambda: normaliser.fit(bad, "scan.nii.gz"),
        lambda: normaliser.fit_pair(bad, image(), ("scan.nii.gz", "label")),
        lambda: normaliser.fit_pair(image(), bad, ("input", "scan.nii.gz")),
        lambda: require_signal(bad, "scan.nii.gz"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert str(caught.value).startswith("scan.nii.gz: ") and "\n" not in str(caught.value)


def test_unknown_kind() -> None:
    with pytest.raises(InputError, match="'zscore'; expected 'paired' or 'petite'"):
        Normaliser("zscore")  # type: ignore[arg-type]


# Thinning


def test_thinned_counts_are_nested_and_binomial() -> None:
    counts = np.random.default_rng(1).poisson(50, (40, 40, 40))
    fraction = 1 / 6
    short = thin(counts, fraction, np.random.default_rng(2)) * fraction
    k = np.rint(short).astype(int)
    np.testing.assert_allclose(short, k, atol=1e-4)  # whole counts
    assert (k >= 0).all() and (k <= counts).all()
    residual = (k - counts * fraction) / np.sqrt(counts * fraction * (1 - fraction))
    # 64000 voxels: standard errors 0.004 of the mean and about 0.006 of the variance.
    assert abs(residual.mean()) < 0.02
    assert residual.var() == pytest.approx(1, abs=0.03)
    # A thinned Poisson is Poisson (variance = mean) and independent of what was left behind.
    assert k.var() / k.mean() == pytest.approx(1, abs=0.03)
    left = counts - k
    assert abs(np.corrcoef(k.ravel(), left.ravel())[0, 1]) < 0.02


def test_thinning_of_an_image_keeps_its_mean_and_units() -> None:
    array = image() - 1  # -1 in air: holds no counts
    short = thin(array, 1 / 6, np.random.default_rng(0), counts=200 * 216)
    assert short.dtype == np.float32 and short.shape == array.shape
    assert (short[array < 0] == 0).all()
    assert short.sum() == pytest.approx(array[array > 0].sum(), rel=0.05)
    body = array > 0
    relative = short[body] / array[body] - 1
    assert relative.std() == pytest.approx(0.2, abs=0.08)  # about (5 / 200) ** 0.5, uptake varies


def test_rounding_to_counts_is_unbiased() -> None:
    array = np.full((50, 50, 50), 0.3)
    kept = thin(array, 1.0, np.random.default_rng(0), counts=0.3 * array.size)
    assert set(np.unique(kept)) == {0, 1}
    assert kept.mean() == pytest.approx(0.3, abs=0.006)


def test_fraction_one_keeps_every_count() -> None:
    counts = np.random.default_rng(1).poisson(9, SHAPE)
    np.testing.assert_array_equal(thin(counts, 1.0, np.random.default_rng(0)), counts)


def test_thinning_is_a_function_of_the_generator() -> None:
    first, second, other = (
        thin(image(), 0.3, np.random.default_rng(seed), counts=1e4) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, np.nan])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction is"):
        thin(image(), fraction, np.random.default_rng(0))


def test_bad_counts_and_images() -> None:
    rng = np.random.default_rng(0)
    for counts in (0, -1, np.nan):
        with pytest.raises(ValueError, match="counts is"):
            thin(image(), 0.5, rng, counts=counts)
    for bad in (image() * 0, -image(), np.full(SHAPE, np.nan), np.full(SHAPE, np.inf)):
        with pytest.raises(ValueError, match="wanted a finite image with signal"):
            thin(bad, 0.5, rng)


def test_scale_of_real_pet_hardly_depends_on_the_counts(data_dir: Path) -> None:
    for path in sorted(data_dir.glob("ibsi-sts/STS_*/PET_image.nii.gz"))[:4]:
        array = read_volume(path).array
        body = int((array > foreground_threshold(array)).sum())
        short = thin(array, 1 / 6, np.random.default_rng(0), counts=100 * body)
        # Some of the 36 crops are further off (see mean_uptake); these four are typical.
        assert mean_uptake(short) == pytest.approx(mean_uptake(array), rel=0.04)
        record = Normaliser().fit(array)
        np.testing.assert_allclose(
            Normaliser.inverse(Normaliser.apply(array, record), record), array, rtol=1e-6
        )
