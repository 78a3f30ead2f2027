"""SUV in masks, contrast recovery and noise: brute force and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petite_fast.training.quantitation import (
    PEAK_SPHERE_MM,
    background_variability,
    coefficient_of_variation,
    contrast_recovery,
    isocontour_mask,
    peak_uptake,
    sphere_mask,
    uptake,
    uptake_bias,
)


def brute_force_peak(volume: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...]) -> float:
    centres = np.argwhere(np.ones_like(mask)) * np.array(spacing)
    best = -np.inf
    for centre in np.argwhere(mask) * np.array(spacing):
        near = np.linalg.norm(centres - centre, axis=1) <= PEAK_SPHERE_MM
        best = max(best, volume.ravel()[near].mean())
    return best


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    spacing=st.tuples(*[st.sampled_from([1.5, 2.0, 3.27, 4.0, 7.0, 13.0])] * 3),
    seed=st.integers(0, 1000),
)
def test_peak_equals_brute_force(shape, spacing, seed) -> None:
    rng = np.random.default_rng(seed)
    volume = rng.normal(1.0, 3.0, shape).astype(np.float32)  # negative voxels too
    mask = rng.random(shape) < 0.3
    mask.ravel()[rng.integers(mask.size)] = True
    expected = brute_force_peak(volume, mask, spacing)
    assert peak_uptake(volume, mask, spacing) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_sphere_is_one_millilitre_at_fine_spacing() -> None:
    assert 4 / 3 * np.pi * PEAK_SPHERE_MM**3 == pytest.approx(1000.0)
    volume, centre = np.zeros((51, 51, 51)), (25, 25, 25)
    volume[centre] = 1.0
    mask = np.zeros(volume.shape, dtype=bool)
    mask[centre] = True
    spacing = (0.25, 0.5, 0.5)
    one_over_count = peak_uptake(volume, mask, spacing)
    assert np.prod(spacing) / one_over_count == pytest.approx(1000.0, rel=0.01)


def test_peak_lies_between_mean_and_max_and_knows_the_spacing() -> None:
    rng = np.random.default_rng(0)
    volume = rng.gamma(2.0, 1.0, (20, 20, 20))
    mask = isocontour_mask(volume)
    fine, coarse = uptake(volume, mask, (2.0, 2.0, 2.0)), uptake(volume, mask, (4.0, 4.0, 4.0))
    assert fine.mean == coarse.mean == pytest.approx(volume[mask].mean())
    assert fine.max == volume.max()
    assert fine.peak < coarse.peak < fine.max
    single = uptake(volume, mask, (13.0, 13.0, 13.0))
    assert single.peak == single.max  # the sphere holds one voxel


def test_bias_in_a_mask_is_relative_and_per_statistic() -> None:
    target = np.full((9, 9, 9), 2.0)
    target[4, 4, 4] = 4.0
    mask = sphere_mask(target.shape, (2.0, 2.0, 2.0), (8.0, 8.0, 8.0), 8.0)
    bias = uptake_bias(1.1 * target, target, mask, (2.0, 2.0, 2.0))
    np.testing.assert_allclose(bias, 10.0)
    smooth = np.full_like(target, 2.0)
    flat = uptake_bias(smooth, target, mask, (2.0, 2.0, 2.0))
    assert flat.max == pytest.approx(-50.0)
    assert -50.0 < flat.peak < 0.0 and -50.0 < flat.mean < 0.0


@pytest.mark.parametrize(("ratio", "level"), [(4.0, 7.0), (0.0, 1.5)])
def test_contrast_recovery_of_a_partial_volume(ratio, level) -> None:
    shape, spacing = (30, 30, 30), (2.0, 2.0, 2.0)
    hot = sphere_mask(shape, spacing, (29.0, 29.0, 29.0), 22.0)
    volume = np.where(hot, level, 3.0)
    found = contrast_recovery(volume, hot, ~hot, ratio)
    assert found == pytest.approx(100 * (level / 3.0 - 1) / (ratio - 1))
    assert contrast_recovery(np.where(hot, 3 * ratio, 3.0), hot, ~hot, ratio) == pytest.approx(100)


def test_noise_of_a_uniform_region() -> None:
    rng = np.random.default_rng(1)
    volume = rng.normal(5.0, 0.5, (40, 40, 40))
    everywhere = np.ones(volume.shape, dtype=bool)
    assert coefficient_of_variation(volume, everywhere) == pytest.approx(10.0, rel=0.02)
    spacing = (2.0, 2.0, 2.0)
    corners = [(x, y, z) for x in (15, 60) for y in (15, 60) for z in (15, 60)]
    regions = [sphere_mask(volume.shape, spacing, corner, 20.0) for corner in corners]
    means = [volume[r].mean() for r in regions]
    expected = 100 * np.std(means, ddof=1) / np.mean(means)
    assert background_variability(volume, regions) == pytest.approx(expected)
    assert 0 < expected < coefficient_of_variation(volume, regions[0])


def test_misuse_is_named() -> None:
    volume, empty = np.ones((4, 4, 4)), np.zeros((4, 4, 4))
    full = empty + 1
    with pytest.raises(ValueError, match="no voxel"):
        uptake(volume, empty, (1, 1, 1))
    with pytest.raises(ValueError, match="one 3-D shape"):
        uptake(volume, empty[1:], (1, 1, 1))
    with pytest.raises(ValueError, match="three positive"):
        peak_uptake(volume, full, (1, 0, 1))
    with pytest.raises(ValueError, match="above 0"):
        uptake_bias(volume, -volume, full, (1, 1, 1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        isocontour_mask(volume, 1.0)
    with pytest.raises(ValueError, match="positive"):
        isocontour_mask(empty)
    with pytest.raises(ValueError, match="sphere of"):
        sphere_mask((4, 4, 4), (1, 1, 1), (50, 0, 0), 5.0)
    with pytest.raises(ValueError, match="true_ratio"):
        contrast_recovery(volume, full, full, 1.0)
    with pytest.raises(ValueError, match="background"):
        contrast_recovery(-volume, full, full, 4.0)
    with pytest.raises(ValueError, match="expected two"):
        coefficient_of_variation(-volume, full)
    with pytest.raises(ValueError, match="two or more"):
        background_variability(volume, [full])
