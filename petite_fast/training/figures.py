"""One picture: the slices of every method, and what each gets wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from petite_fast.files import atomic_write


def comparison_figure(
    panels: Mapping[str, np.ndarray], spacing: Sequence[float], path: Path, *, units: str
) -> None:
    """Axial slices above, differences from the last volume (the standard scan) below.

    Args:
        panels: title to volume [X, Y, Z]; all on one grid, in one unit.
        spacing: voxel size in mm along X, Y, Z.
        path: a .png, written atomically.
        units: of the volumes.
    """
    target = list(panels.values())[-1]
    slice_index = int(np.argmax(target.sum(axis=(0, 1))))  # the slice with the most activity
    crop = _body(target[:, :, slice_index])
    peak = float(np.percentile(target[:, :, slice_index][crop], 99.5))
    error_peak = 0.25 * peak
    aspect = spacing[1] / spacing[0]

    figure = Figure(figsize=(2.35 * len(panels) + 0.7, 5.6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (title, volume) in enumerate(panels.items()):
        image = volume[:, :, slice_index][crop]
        above, below = axes[0, column], axes[1, column]
        above.set_title(title)
        shown = above.imshow(
            image.T, cmap="gray_r", vmin=0, vmax=peak, origin="lower", aspect=aspect
        )
        if volume is target:
            continue
        error = image - target[:, :, slice_index][crop]
        wrong = below.imshow(
            error.T, cmap="RdBu_r", vmin=-error_peak, vmax=error_peak, origin="lower", aspect=aspect
        )
        rmse = float(np.sqrt(np.mean(np.square(volume - target, dtype=np.float64))))
        below.set_title(f"NRMSE {rmse / float(np.ptp(target)):.4f}", fontsize="medium")
    figure.colorbar(shown, ax=axes[0, :].tolist(), label=units, shrink=0.85)
    figure.colorbar(wrong, ax=axes[1, :].tolist(), label=f"minus standard, {units}", shrink=0.85)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _body(image: np.ndarray) -> tuple[slice, slice]:
    """Bounding box of what is brighter than a twentieth of the maximum, with a margin of two."""
    inside = image > image.max() / 20
    bounds = []
    for axis in (1, 0):
        hits = np.flatnonzero(inside.any(axis=axis))
        bounds.append(slice(max(int(hits[0]) - 2, 0), int(hits[-1]) + 3))
    return bounds[0], bounds[1]
