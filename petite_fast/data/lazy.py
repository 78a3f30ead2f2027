"""A volume whose voxels are decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import nibabel as nib
import numpy as np

from petite_fast.data.acquisition import Timing, Tracer
from petite_fast.errors import InputError

if TYPE_CHECKING:
    from petite_fast.data.dicom import Series


class Reader(Protocol):
    """Decodes frames of one file or series."""

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the frames `indices` (ascending), each float32 [X, Y, Z], one in memory."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """One image, or a dynamic series of T frames, in the axis order nearest to R, A, S.

    X grows to the patient's right, Y to anterior, Z to superior (as nearly as the file's axes
    allow, nothing is resampled). What is printed of a volume names neither file nor patient.

    Attributes:
        shape: (X, Y, Z), or (T, X, Y, Z) of a dynamic series.
        affine: 4x4 float64, voxel index (x, y, z) -> mm.
        source: the file or folder it was read from. For errors on the user's own terminal: a path
            may identify a patient, so it must not reach a report.
        reader: decodes the voxels.
        header: geometry and units of the file (no free text), in the file's own axis order.
        orientation: 3x2, nibabel orientation of the file's axes.
        units: "Bq/mL", "SUVbw", "SUVlbm", "SUVbsa", "counts", or None where the file does not say.
        timing: when its frames were taken; None where the file does not say.
        tracer: what was injected into whom; None where the file does not say.
        dicom: the slices, if it was read from DICOM.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    source: Path
    reader: Reader
    header: nib.Nifti1Header
    orientation: np.ndarray
    units: str | None = None
    timing: Timing | None = None
    tracer: Tracer | None = None
    dicom: Series | None = None

    @cached_property
    def array(self) -> np.ndarray:
        """All voxels, float32, of `shape`; decoded at the first use and kept.

        Raises:
            InputError: the voxels are damaged, missing, not finite, or more than memory holds.
        """
        frames = self.frames()
        first = next(frames)
        if len(self.shape) == 3:
            next(frames, None)  # lets the reader look at the rest of the file
            return first
        try:
            array = np.empty(self.shape, np.float32)
        except MemoryError as error:
            raise InputError(
                f"{self.source}: the series takes {first.nbytes * self.shape[0] / 2**30:.0f} GiB;"
                " expected one that fits into memory (Volume.frames reads frame by frame)"
            ) from error
        array[0] = first
        for k, frame in enumerate(frames, start=1):
            array[k] = frame
        return array

    def frames(self, indices: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield frames, float32 [X, Y, Z], one at a time; only one is in memory.

        Args:
            indices: ascending frame numbers, from 0; None for all.

        Raises:
            InputError: as `array`.
            ValueError: `indices` are not ascending, or not frames of this volume.
        """
        if indices is None:
            return self.reader.frames(range(self.frame_count))
        wanted = list(indices)
        if wanted != sorted(set(wanted)) or (
            wanted and not 0 <= wanted[0] <= wanted[-1] < self.frame_count
        ):
            raise ValueError(f"indices are {wanted}, wanted ascending ones of {self.frame_count}")
        return self.reader.frames(wanted)

    @property
    def frame_count(self) -> int:
        """T of a dynamic series, else 1."""
        return self.shape[0] if len(self.shape) == 4 else 1

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along X, Y, Z."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def scaled(self, factors: Sequence[float], units: str) -> Volume:
        """The same image times one factor per frame, in `units`; still nothing is decoded."""
        return replace(self, reader=_Scaled(self.reader, tuple(factors)), units=units)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        spacing = "x".join(f"{mm:.4g}" for mm in self.spacing)
        return f"Volume({size} voxels of {spacing} mm, {self.units or 'unknown units'})"


@dataclass(frozen=True)
class _Scaled:
    """Frames of `reader`, frame k times ``factors[k]``."""

    reader: Reader
    factors: tuple[float, ...]

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for k, frame in zip(indices, self.reader.frames(indices), strict=True):
            yield frame * np.float32(self.factors[k])


def require_static(volume: Volume) -> Volume:
    """`volume`, if it is one image.

    Raises:
        InputError: it is a dynamic series.
    """
    if len(volume.shape) == 4:
        raise InputError(
            f"{volume.source}: a dynamic series of {volume.frame_count} frames; expected one 3-D"
            " volume (petite-fast pairs makes training pairs, reconstruct --frames takes frames)"
        )
    return volume


def require_finite(array: np.ndarray, where: str | Path) -> None:
    """Refuse NaN and Inf.

    Raises:
        InputError: `array` holds some; they are counted.
    """
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise InputError(f"{where}: {bad} voxels are NaN or Inf; expected finite numbers")
