"""Volumes of a report: 8-bit voxels for the viewer, pictures of differences."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from matplotlib import image
from matplotlib.colors import LinearSegmentedColormap

from petite_fast.data.normalise import foreground_threshold
from petite_fast.report.run import Run, title_of
from petite_fast.training.record import INPUT, TARGET, View

DIFFERENCE_SHARE = 0.25  # of the window: where the colours of a difference end

_ZERO = 51  # voxel value of zero: a quarter of `top` below it is kept, outputs can be negative
_HEADROOM = 2.5  # the brightest voxel value over the first window's upper end
_BUDGET = 18 * 1024**2  # bytes of voxels in a page, a third more as base64
_WANTED_SUBJECTS = 3
_SMALLEST_SIDE = 64
# viewer.js has the same colours
_BLUE_WHITE_RED = LinearSegmentedColormap.from_list("error", ["#2166ac", "#ffffff", "#b2182b"])


class Shown(NamedTuple):
    """A subject whose volumes are in the page."""

    position: int
    view: View


def choose(run: Run) -> list[Shown]:
    """Subjects that fit in a page, those with the largest error first; at least one.

    Volumes are made coarser in-plane until three subjects fit or a side falls below 64 voxels.

    Raises:
        InputError: a file with volumes is missing or damaged.
    """
    order = run.worst_first()
    first = run.view(order[0])
    factor, wanted = 1, min(_WANTED_SUBJECTS, len(order))
    while (
        wanted * _size(first.shrunk(factor)) > _BUDGET
        and max(first.volumes[TARGET].shape[:2]) // (factor + 1) >= _SMALLEST_SIDE
    ):
        factor += 1
    shown: list[Shown] = []
    left = _BUDGET
    for position in order:
        view = run.view(position).shrunk(factor)
        left -= _size(view)
        if shown and left < 0:
            break
        shown.append(Shown(position, view))
    return shown


def viewer_data(run: Run, shown: list[Shown]) -> dict[str, Any]:
    """What viewer.js reads: base64 of uint8 [X, Y, Z], "zero" for 0 and 255 for "top"."""
    return {
        "units": run.units,
        "titles": {name: title_of(name) for name in shown[0].view.volumes},
        "zero": _ZERO,
        "differenceShare": DIFFERENCE_SHARE,
        "subjects": [
            {
                "name": run.subjects[position],
                "shape": list(view.volumes[TARGET].shape),
                "spacing": list(view.spacing),
                "top": brightest * view.top,
                "window": window(view) / brightest,
                "slices": list(_busiest(view)),
                "volumes": {
                    name: _base64(_bytes(v, brightest)) for name, v in view.volumes.items()
                },
            }
            for position, view in shown
            for brightest in [min(1.0, _HEADROOM * window(view))]
        ],
    }


def window(view: View) -> float:
    """Brightness that a window begins with, relative to the view's `top`; at most 1.

    The 99th percentile of the target's foreground and a tenth: a bladder does not darken the rest.
    """
    target = view.volumes[TARGET].astype(np.float32)
    foreground = target[target > foreground_threshold(target)]
    return min(1.0, 1.1 * float(np.percentile(foreground.astype(float), 99)))


def difference_maps(view: View) -> dict[str, str]:
    """Method to a PNG data URI: output - target in the axial slice with the most activity.

    Red is too much, blue too little; colours end at a quarter of the window. As radiologists
    look at it: the patient's right is on the left.
    """
    target = view.volumes[TARGET].astype(np.float32)
    z, end = _busiest(view)[2], DIFFERENCE_SHARE * window(view)
    maps = {}
    for name, volume in view.volumes.items():
        if name != TARGET:
            error = volume[:, :, z].astype(np.float32) - target[:, :, z]
            buffer = io.BytesIO()
            image.imsave(
                buffer,
                error[::-1, ::-1].T,
                cmap=_BLUE_WHITE_RED,
                vmin=-end,
                vmax=end,
                format="png",
            )
            maps[name] = f"data:image/png;base64,{_base64(buffer.getvalue())}"
    return maps


def panels(view: View) -> dict[str, np.ndarray]:
    """Volumes in their units by title, input first and target last, for a printed figure."""
    names = [INPUT, *(n for n in view.volumes if n not in (INPUT, TARGET)), TARGET]
    return {
        title_of(name): view.volumes[name].astype(np.float32) * np.float32(view.top)
        for name in names
        if name in view.volumes
    }


def _busiest(view: View) -> tuple[int, int, int]:
    """The slice with the most activity across each axis."""
    target = view.volumes[TARGET].astype(np.float32)
    sums = (target.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3))
    x, y, z = (int(np.argmax(s)) for s in sums)
    return x, y, z


def _size(view: View) -> int:
    return len(view.volumes) * view.volumes[TARGET].size


def _bytes(volume: np.ndarray, brightest: float) -> bytes:
    steps = np.rint(volume.astype(np.float32) * ((255 - _ZERO) / brightest))
    scaled = np.clip(steps + _ZERO, 0, 255)
    return scaled.astype(np.uint8).tobytes()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
