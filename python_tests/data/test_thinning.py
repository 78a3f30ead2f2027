"""Short scans as a random part of the counts."""

from __future__ import annotations

import numpy as np
import pytest

from petite_fast.data import DOSE_REDUCTIONS, thin, thin_nested


def test_counts_are_nested_and_binomial() -> None:
    rng = np.random.default_rng(1)
    counts = rng.poisson(40, (40, 40, 40))
    kept = thin(counts, 0.25, rng) * 0.25
    np.testing.assert_array_equal(kept, np.round(kept))
    assert (kept <= counts).all() and kept.min() >= 0
    assert kept.mean() == pytest.approx(10, rel=0.01)
    assert kept.var() == pytest.approx(10, rel=0.03)  # a thinned Poisson variable is Poisson
    # the kept and the lost counts of a Poisson variable are independent
    assert abs(np.corrcoef(kept.ravel(), (counts - kept).ravel())[0, 1]) < 0.02


def test_units_are_kept_and_noise_follows_the_count_level() -> None:
    suv = np.linspace(0.5, 4, 30**3, dtype=np.float32).reshape(30, 30, 30)
    few, many = (
        thin(suv, 1 / 6, np.random.default_rng(0), counts=n * suv.size) for n in (100, 10_000)
    )
    assert few.dtype == np.float32
    assert few.mean() == pytest.approx(suv.mean(), rel=0.01)
    # relative variance of a binomial part f of n counts: (1 - f) / (f n) = 5 / n
    unit = suv.mean() / 100
    assert ((few - suv) ** 2 / (suv * unit)).mean() == pytest.approx(5, rel=0.05)
    assert np.std(few - suv) == pytest.approx(10 * np.std(many - suv), rel=0.05)


def test_whole_fraction_changes_nothing_and_negatives_hold_no_counts() -> None:
    image = np.array([[[-3.0, 0.0, 4.0, 7.0]]])
    np.testing.assert_array_equal(thin(image, 1.0, np.random.default_rng(0)), [[[0, 0, 4, 7]]])


def test_same_generator_same_scan() -> None:
    image = np.full((5, 5, 5), 20.0)
    first, second = (thin(image, 0.5, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("image", "fraction", "counts", "message"),
    [
        (np.ones(3), 0, None, "fraction is 0"),
        (np.ones(3), 1.5, None, "fraction is 1.5"),
        (np.ones(3), 0.5, 0, "counts is 0"),
        (np.zeros(3), 0.5, 10, "wanted a finite image"),
        (np.array([np.nan, 1]), 0.5, 10, "wanted a finite image"),
    ],
)
def test_misuse(image: np.ndarray, fraction: float, counts: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        thin(image, fraction, np.random.default_rng(0), counts)


def test_doses_are_nested_and_each_is_a_binomial_part() -> None:
    rng = np.random.default_rng(2)
    counts = rng.poisson(400, (40, 40, 40))
    thinned = thin_nested(counts, rng)
    assert tuple(thinned) == DOSE_REDUCTIONS == (4, 10, 20, 50, 100)
    larger = counts
    for reduction, image in thinned.items():
        assert image.dtype == np.float32
        kept = np.round(image / reduction).astype(int)
        np.testing.assert_allclose(image, kept * reduction)
        assert (kept <= larger).all()
        # a thinned Poisson variable is Poisson of 1 / reduction of the mean
        assert kept.mean() == pytest.approx(400 / reduction, rel=0.01)
        assert kept.var() == pytest.approx(400 / reduction, rel=0.03)
        larger = kept


def test_nested_doses_keep_units() -> None:
    suv = np.linspace(0.5, 4, 30**3, dtype=np.float32).reshape(30, 30, 30)
    thinned = thin_nested(suv, np.random.default_rng(0), 1e4 * suv.size, (20, 4))
    assert tuple(thinned) == (4, 20)
    for reduction, image in thinned.items():
        assert image.mean() == pytest.approx(suv.mean(), rel=0.01)
        noise = ((image - suv) ** 2 / suv).mean() / (suv.mean() / 1e4)
        assert noise == pytest.approx(reduction - 1, rel=0.05)  # (1 - f) / f


@pytest.mark.parametrize("reductions", [(), (0,), (4, -1)])
def test_reductions_that_are_none(reductions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="reductions are"):
        thin_nested(np.ones(3), np.random.default_rng(0), None, reductions)
