"""Short scans as a random part of the counts."""

from __future__ import annotations

import numpy as np
import pytest

from petite_fast.data import thin


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
