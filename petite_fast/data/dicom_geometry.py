"""Put DICOM slices in order by where they lie in space, then by when they were taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from petite_fast.errors import InputError

if TYPE_CHECKING:
    from petite_fast.data.dicom import Slice

_SAME_PLACE_MM = 0.01
_UNEVEN = 0.1  # of the slice distance: positions are often rounded to 0.1 mm
_SAME_TIME_S = 1.0


def sort_slices(
    slices: Sequence[Slice],
    orientation: Sequence[float],
    pixel_spacing: Sequence[float],
    thickness: float | None,
    where: Path,
) -> tuple[tuple[tuple[Slice, ...], ...], np.ndarray]:
    """Frames of slices, and the affine of their voxels.

    Args:
        slices: of one series, in any order.
        orientation: ImageOrientationPatient, direction of a row, then of a column.
        pixel_spacing: PixelSpacing in mm, between rows, then between columns.
        thickness: mm, used where there is one slice only.
        where: names the series in errors.

    Returns:
        ``frames[t][k]`` with slices along the normal, and the 4x4 affine from (column, row, k)
        to mm in LPS.

    Raises:
        InputError: axes that are not at right angles, a slice missing or there twice, slices not
            evenly spaced on a line, or frames that cannot be told apart in time.
    """
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    lengths = (np.linalg.norm(row), np.linalg.norm(column), np.linalg.norm(normal))
    if not np.allclose(lengths, 1, atol=1e-3):
        raise InputError(
            f"{where}: ImageOrientationPatient is no pair of unit vectors at right angles;"
            " expected a rotation"
        )
    if min(pixel_spacing) <= 0:
        raise InputError(f"{where}: PixelSpacing is not positive; expected mm")
    places = _places(slices, normal)
    frames = _frames(places, where)
    positions = np.array([place[0].position for place in places])
    step = _step(positions, normal, thickness, where)
    affine = np.eye(4)
    affine[:3, 0] = row * pixel_spacing[1]
    affine[:3, 1] = column * pixel_spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return frames, affine


def _places(slices: Sequence[Slice], normal: np.ndarray) -> list[list[Slice]]:
    """Slices by position along the normal, ascending; slices at one place together."""
    depths = np.array([s.position for s in slices]) @ normal
    places: list[list[Slice]] = []
    last = -np.inf
    for k in np.argsort(depths, kind="stable"):
        if depths[k] - last > _SAME_PLACE_MM:
            places.append([])
            last = depths[k]
        places[-1].append(slices[k])
    return places


def _frames(places: list[list[Slice]], where: Path) -> tuple[tuple[Slice, ...], ...]:
    counts = [len(place) for place in places]
    if min(counts) != max(counts):
        raise InputError(
            f"{where}: {min(counts)} to {max(counts)} slices per position, at {len(places)}"
            " positions; expected the same number: a slice is missing or is there twice"
        )
    for place in places:
        place.sort(key=_time)
        for first, second in zip(place, place[1:], strict=False):
            if _time(first) == _time(second):
                raise InputError(
                    f"{where}: two slices at {_millimetres(first)} with the same time; expected"
                    " one series without duplicates"
                )
    frames = tuple(zip(*places, strict=True))
    for t, frame in enumerate(frames, start=1):
        clocks = [s.times.clock_s for s in frame if s.times.clock_s is not None]
        if len(frames) > 1 and clocks and max(clocks) - min(clocks) > _SAME_TIME_S:
            raise InputError(
                f"{where}: the slices of frame {t} were taken at different times; expected a"
                " dynamic series of one bed position with no slice missing"
            )
    return frames


def _time(s: Slice) -> tuple[float, float]:
    return s.times.clock_s or 0.0, s.times.reference_s or 0.0


def _step(
    positions: np.ndarray, normal: np.ndarray, thickness: float | None, where: Path
) -> np.ndarray:
    """Vector from one slice to the next, mm; `positions` [n, 3] ascend along `normal`."""
    if len(positions) == 1:
        if thickness is None or thickness <= 0:
            raise InputError(f"{where}: one slice without SliceThickness; expected a series")
        return normal * thickness
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    uneven = np.flatnonzero(abs(gaps - usual) > _UNEVEN * usual)
    if uneven.size:
        k = int(uneven[0])
        what = "a slice is missing" if gaps[k] > usual else "slices are too close"
        raise InputError(
            f"{where}: {what}: {gaps[k]:.4g} mm between slices {k + 1} and {k + 2} of"
            f" {len(positions)}; expected {usual:.4g} mm everywhere"
        )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    line = positions[0] + np.arange(len(positions))[:, None] * step
    if np.linalg.norm(positions - line, axis=1).max() > 2 * _UNEVEN * usual:
        raise InputError(f"{where}: slices do not lie on a straight line; expected one stack")
    return step


def _millimetres(s: Slice) -> str:
    return "(" + ", ".join(f"{v:.5g}" for v in s.position) + ") mm"
