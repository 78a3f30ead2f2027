"""Short scans from standard ones: keep a random part of the counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Dose reduction factors of the ultra-low-dose PET challenge (UDPET): 1/4 to 1/100 of the counts.
DOSE_REDUCTIONS = (4, 10, 20, 50, 100)


def thin(
    image: np.ndarray, fraction: float, rng: np.random.Generator, counts: float | None = None
) -> np.ndarray:
    """Thin a standard scan to what a scan of `fraction` of its duration would have seen.

    Voxel v of the standard scan holds n_v counts, n = image / unit. Each count falls into the
    short scan with probability `fraction`, so k_v ~ Binomial(n_v, fraction) and the result is

        short_v = k_v * unit / fraction         E[short] = image,  k_v <= n_v (nested)

    which is exactly the law of a 5-minute frame inside a 30-minute scan (fraction 1/6) when
    the n_v are Poisson counts.

    Args:
        image: any shape; Bq/mL, SUV or counts. Negative voxels hold no counts.
        fraction: duration of the short scan over that of the standard one, in (0, 1].
        rng: source of the randomness.
        counts: total counts that `image` stands for: unit = sum(image) / counts. The n_v
            are then rounded up or down at random without bias. A reconstruction is noisier
            than its voxels' share of the measured counts says, so for a real volume this is a
            *noise-equivalent* number: 100 per voxel of the body gives a short scan of a sixth
            sqrt((1 - 1/6) / (100 / 6)) = 22 % noise in a voxel of mean uptake. None:
            `image` is counts already (unit 1).

    Returns:
        float32 array of the shape and in the units of `image`.

    Raises:
        ValueError: `fraction` outside (0, 1], `counts` not positive, or `image` without signal.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, wanted a number in (0, 1]")
    n, unit = _whole_counts(image, rng, counts)
    return (rng.binomial(n, fraction) * (unit / fraction)).astype(np.float32)


def thin_nested(
    image: np.ndarray,
    rng: np.random.Generator,
    counts: float | None = None,
    reductions: Sequence[int] = DOSE_REDUCTIONS,
) -> dict[int, np.ndarray]:
    """Thin one standard scan to several doses, each a part of the next larger one.

    For d_1 < d_2 < ... (k_0 = n, d_0 = 1), per voxel:

        k_i ~ Binomial(k_{i-1}, d_{i-1} / d_i)        short_i = k_i * unit * d_i

    so that every k_i ~ Binomial(n, 1 / d_i), as `thin` draws it, and k_i <= k_{i-1}: a scan of a
    tenth of the dose is what the first part of the scan of a quarter had seen.

    Args:
        image, rng, counts: as in `thin`.
        reductions: dose reduction factors, each >= 1; named DRF in the field.

    Returns:
        float32 images in the units of `image`, by reduction factor, in ascending order.

    Raises:
        ValueError: a reduction below 1, none, or as `thin`.
    """
    if not reductions or min(reductions) < 1:
        raise ValueError(f"reductions are {tuple(reductions)}, wanted numbers of at least 1")
    kept, unit = _whole_counts(image, rng, counts)
    before, thinned = 1, {}
    for reduction in sorted(set(reductions)):
        kept = rng.binomial(kept, before / reduction)
        thinned[reduction] = (kept * (unit * reduction)).astype(np.float32)
        before = reduction
    return thinned


def _whole_counts(
    image: np.ndarray, rng: np.random.Generator, counts: float | None
) -> tuple[np.ndarray, float]:
    """Whole counts n_v, and the value of one count."""
    if counts is not None and not counts > 0:
        raise ValueError(f"counts is {counts}, wanted a positive number")
    positive = np.maximum(image, 0).astype(np.float64)
    total = float(positive.sum())
    if not (np.isfinite(total) and total > 0):
        raise ValueError(f"image sums to {total}, wanted a finite image with signal")
    unit = 1.0 if counts is None else total / counts
    expected = positive / unit
    whole = np.floor(expected)
    return (whole + (rng.random(expected.shape) < expected - whole)).astype(np.int64), unit
