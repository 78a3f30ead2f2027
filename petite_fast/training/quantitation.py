"""What a reconstruction does to uptake: SUV in masks, contrast and noise in phantoms.

Volumes are [X, Y, Z] in any unit (SUV or Bq/mL), masks are of the same shape, spacing is in mm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PEAK_SPHERE_MM = (3000.0 / (4.0 * math.pi)) ** (1.0 / 3.0)  # radius of 1 mL, 6.204 mm
_ISOCONTOUR = 0.41


class Uptake(NamedTuple):
    """Mean, maximum and peak of the uptake in one mask, in the volume's units."""

    mean: float
    max: float
    peak: float


def uptake(volume: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> Uptake:
    """SUVmean, SUVmax and SUVpeak of a volume in SUV; the same of any other unit.

    Args:
        volume: [X, Y, Z].
        mask: voxels above 0 are inside, [X, Y, Z].
        spacing: voxel size in mm along X, Y, Z.

    Raises:
        ValueError: shapes differ, the mask is empty, or a voxel size is not positive.
    """
    inside = _inside(volume, mask)
    values = volume[inside].astype(np.float64)
    return Uptake(float(values.mean()), float(values.max()), peak_uptake(volume, mask, spacing))


def uptake_bias(
    pred: np.ndarray, target: np.ndarray, mask: np.ndarray, spacing: Sequence[float]
) -> Uptake:
    """Relative error of mean, maximum and peak in percent, 100 (pred - target) / target.

    Args:
        pred: reconstructed volume, [X, Y, Z].
        target: standard scan, the same shape and units.
        mask: as for `uptake`.
        spacing: as for `uptake`.

    Raises:
        ValueError: as for `uptake`, or the target's value is not positive.
    """
    return percent_bias(uptake(pred, mask, spacing), uptake(target, mask, spacing))


def percent_bias(found: Uptake, true: Uptake) -> Uptake:
    """100 (found - true) / true of each of the three.

    Raises:
        ValueError: a true value is not positive.
    """
    if min(true) <= 0.0:
        raise ValueError(f"the bias is relative to {true}; expected values above 0")
    return Uptake(*(100.0 * (f - t) / t for f, t in zip(found, true, strict=True)))


def peak_uptake(volume: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> float:
    """Highest mean over a 1 mL sphere whose centre is a voxel of the mask (SUVpeak).

    A voxel belongs to a sphere when its centre is within 6.204 mm of the sphere's; voxels outside
    the mask count, those outside the volume do not. This is the global intensity peak (0F91) of
    the IBSI reference manual. Memory: three copies of the mask's bounding box.

    Args:
        volume: [X, Y, Z].
        mask: voxels above 0 are inside, [X, Y, Z].
        spacing: voxel size in mm along X, Y, Z.

    Raises:
        ValueError: shapes differ, the mask is empty, or a voxel size is not positive.
    """
    inside = _inside(volume, mask)
    offsets = _sphere_offsets(spacing)
    reach = np.abs(offsets).max(axis=0)
    hits = np.nonzero(inside)
    first = np.array([axis.min() for axis in hits])
    shape = np.array([axis.max() for axis in hits]) + 1 - first
    box = tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))
    # the box and `reach` voxels around it, zero and uncounted where the volume ends
    padded = np.zeros(shape + 2 * reach)
    counted = np.zeros(shape + 2 * reach, dtype=np.uint8)
    low = np.maximum(first - reach, 0)
    high = np.minimum(first + shape + reach, volume.shape)
    here = tuple(
        slice(a, b) for a, b in zip(low - first + reach, high - first + reach, strict=True)
    )
    padded[here] = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    counted[here] = 1
    total, count = np.zeros(shape), np.zeros(shape, dtype=np.int32)
    for offset in offsets + reach:
        window = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        total += padded[window]
        count += counted[window]
    return float((total / count)[inside[box]].max())


def isocontour_mask(target: np.ndarray, fraction: float = _ISOCONTOUR) -> np.ndarray:
    """Voxels above `fraction` of the maximum, the usual 41 % of PET delineation (EANM 2015).

    Args:
        target: [X, Y, Z]; the maximum of the whole volume counts.
        fraction: between 0 and 1.

    Raises:
        ValueError: `fraction` is out of range, or nothing in the volume is positive.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    peak = float(target.max())
    if not peak > 0.0:
        raise ValueError(f"the volume's maximum is {peak:g}; expected a positive one")
    return target > fraction * peak


def sphere_mask(
    shape: Sequence[int], spacing: Sequence[float], centre: Sequence[float], diameter: float
) -> np.ndarray:
    """Voxels whose centre lies in a sphere, [X, Y, Z] bool: regions of a phantom.

    Args:
        shape: of the volume.
        spacing: voxel size in mm along X, Y, Z.
        centre: in mm from the centre of voxel (0, 0, 0).
        diameter: in mm.

    Raises:
        ValueError: a size is not positive, or no voxel centre lies in the sphere.
    """
    size = _checked(spacing)
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    squared = sum((step * axis - c) ** 2 for step, axis, c in zip(size, axes, centre, strict=True))
    mask = np.asarray(squared <= (diameter / 2) ** 2)
    if diameter <= 0.0 or not mask.any():
        raise ValueError(
            f"no voxel centre lies in a sphere of {diameter:g} mm at {tuple(centre)} mm"
        )
    return mask


def contrast_recovery(
    volume: np.ndarray, region: np.ndarray, background: np.ndarray, true_ratio: float
) -> float:
    """Contrast recovery coefficient of a phantom in percent (NEMA NU 2).

    100 (C_region / C_background - 1) / (true_ratio - 1); a cold region has true_ratio 0, and the
    formula becomes 100 (1 - C_region / C_background).

    Args:
        volume: [X, Y, Z].
        region: mask of the hot or cold object.
        background: mask of the uniform background.
        true_ratio: activity concentration in the region over that of the background.

    Raises:
        ValueError: shapes differ, a mask is empty, the ratio is 1 or negative, or the background's
            mean is not positive.
    """
    if true_ratio < 0.0 or true_ratio == 1.0:
        raise ValueError(f"true_ratio must not be negative or 1, got {true_ratio!r}")
    inside, around = _values(volume, region).mean(), _values(volume, background).mean()
    if around <= 0.0:
        raise ValueError(f"the background's mean is {around:g}; expected a positive one")
    return float(100.0 * (inside / around - 1.0) / (true_ratio - 1.0))


def coefficient_of_variation(volume: np.ndarray, mask: np.ndarray) -> float:
    """Noise in a uniform region in percent: 100 sample standard deviation / mean.

    Raises:
        ValueError: shapes differ, the mask has fewer than two voxels, or the mean is not positive.
    """
    values = _values(volume, mask)
    if len(values) < 2 or values.mean() <= 0.0:
        raise ValueError(
            f"{len(values)} voxels with mean {values.mean():g}; expected two or more, mean above 0"
        )
    return float(100.0 * values.std(ddof=1) / values.mean())


def background_variability(volume: np.ndarray, regions: Sequence[np.ndarray]) -> float:
    """NEMA NU 2's background variability in percent: 100 SD of the regions' means / their mean.

    Args:
        volume: [X, Y, Z].
        regions: masks of one size in the background, such as those of `sphere_mask`; two or more.

    Raises:
        ValueError: fewer than two regions, an empty one, or a mean that is not positive.
    """
    means = np.array([_values(volume, region).mean() for region in regions])
    if len(means) < 2 or means.mean() <= 0.0:
        raise ValueError(f"{len(means)} regions; expected two or more with a mean above 0")
    return float(100.0 * means.std(ddof=1) / means.mean())


def _inside(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if volume.ndim != 3 or mask.shape != volume.shape:
        raise ValueError(
            f"volume and mask must have one 3-D shape, got {volume.shape} and {mask.shape}"
        )
    inside = np.asarray(mask) > 0
    if not inside.any():
        raise ValueError("the mask has no voxel; expected at least one")
    return inside


def _values(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return volume[_inside(volume, mask)].astype(np.float64)


def _checked(spacing: Sequence[float]) -> np.ndarray:
    size = np.asarray(spacing, dtype=np.float64)
    if size.shape != (3,) or not (np.isfinite(size).all() and (size > 0).all()):
        raise ValueError(f"spacing must be three positive numbers in mm, got {tuple(spacing)}")
    return size


def _sphere_offsets(spacing: Sequence[float]) -> np.ndarray:
    """Voxel offsets [K, 3] whose centres lie in a 1 mL sphere around a voxel centre."""
    size = _checked(spacing)
    reach = np.floor(PEAK_SPHERE_MM / size).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1)
    offsets = grid.reshape(-1, 3)
    return offsets[((offsets * size) ** 2).sum(axis=1) <= PEAK_SPHERE_MM**2]
