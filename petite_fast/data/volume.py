"""Read and write PET volumes of any format without losing where they are in space."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, ornt_transform

from petite_fast.data.ecat import read_ecat
from petite_fast.data.lazy import Volume, require_static
from petite_fast.data.nifti import CANONICAL, grid_header, read_nifti, write_nifti
from petite_fast.errors import InputError

__all__ = [
    "Volume",
    "is_dicom",
    "read_volume",
    "require_static",
    "same_grid",
    "write_like",
    "write_volume",
]

_DICOM_NAMES = (".dcm", ".ima", ".dicom")


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read the header of a PET image; its voxels are decoded when ``volume.array`` is asked for.

    - NIfTI-1 or NIfTI-2 (.nii, .nii.gz) of any orientation, byte order and scaling. Voxels are
      slope * stored + intercept, in float64, rounded once to float32. Trailing axes of length
      1 are dropped; a fourth axis is time. Units, times and tracer come from BIDS sidecars: of
      an image with a BIDS-PET name those that it inherits, and its subject's weight from
      participants.tsv; of another the .json of the same name. A gzip file is read to its end,
      which verifies its checksum.
    - ECAT7 (.v), with frame scale and calibration factor.
    - DICOM PET: the folder of one series, or one multi-frame file. Each slice has its own
      rescale; slices are sorted by geometry. Needs pydicom (extra ``app``).

    A dynamic series has shape [T, X, Y, Z]; what can use only one image calls `require_static`.

    Raises:
        InputError: here, the file is missing, of another format, damaged as far as headers
            show, several series, a series with a slice missing or twice, not PET, compressed
            without a decoder installed, or an affine that is singular. From ``array`` and
            ``frames``: voxels that are truncated, damaged, NaN or Inf.
    """
    source = Path(path)
    if source.is_dir() or (source.is_file() and is_dicom(source)):
        return _dicom_reader()(source)
    if not source.is_file():
        raise InputError(
            f"{source}: no such file; expected NIfTI (.nii, .nii.gz), ECAT (.v) or a DICOM folder"
        )
    if source.name.lower().endswith(".v"):
        return read_ecat(source)
    return read_nifti(source)


def is_dicom(source: Path) -> bool:
    """Whether a file is DICOM, by its name or its preamble."""
    if source.name.lower().endswith(_DICOM_NAMES):
        return True
    if source.suffix.lower() in (".nii", ".gz", ".v"):
        return False
    with source.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _dicom_reader() -> Callable[[Path], Volume]:
    """`read_dicom`, or what to install for it: NIfTI alone does not need pydicom."""
    try:
        from petite_fast.data.dicom import read_dicom
    except ModuleNotFoundError as error:
        raise InputError(
            "DICOM cannot be read without pydicom; expected it after pip install petite_fast[app]"
        ) from error
    return read_dicom


def write_like(volume: Volume, array: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write `array` as NIfTI, float32, on the grid, in the orientation and units of `volume`.

    Args:
        volume: what `read_volume` gave for the file that `array` belongs to, of any format.
        array: the axes of ``volume.array``; for a dynamic volume also one frame, [X, Y, Z].
        path: ends in .nii or .nii.gz; it appears only when complete.

    Kept from a NIfTI source: shape (trailing axes of length 1 too), voxel sizes, qform and
    sform with their codes, units, NIfTI version. Dropped: every free-text field (descrip,
    aux_file, db_name, intent_name) and all extensions, since they may identify a patient.

    Raises:
        ValueError: `array` has another shape than the volume.
        InputError: `array` holds NaN or Inf, or `path` is not named .nii or .nii.gz.
        OSError: the file cannot be written; nothing is left behind.
    """
    if array.shape not in (volume.shape, volume.shape[-3:]):
        raise ValueError(f"array has shape {array.shape}, wanted {volume.shape}")
    header = volume.header
    back = ornt_transform(CANONICAL, volume.orientation)
    if array.ndim == 4:
        on_file_axes = np.stack([apply_orientation(frame, back) for frame in array], axis=3)
    else:
        on_file_axes = apply_orientation(array, back)
    if array.shape == volume.shape:
        on_file_axes = on_file_axes.reshape(header.get_data_shape())
    else:
        header = header.copy()
        header.set_data_shape(on_file_axes.shape)
    return write_nifti(on_file_axes, header, Path(path))


def write_volume(array: np.ndarray, affine: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write a new float32 NIfTI-1: `array` [X, Y, Z], `affine` voxel -> mm (scanner space).

    Raises:
        ValueError: `array` is not 3-D.
        InputError: NaN or Inf in `array`, or a name that is not .nii or .nii.gz.
    """
    if array.ndim != 3:
        raise ValueError(f"array has {array.ndim} axes, wanted 3")
    return write_nifti(array, grid_header(array.shape, affine), Path(path))


def same_grid(first: Volume, second: Volume, tolerance_mm: float = 1e-3) -> bool:
    """Whether both volumes have the same shape and no voxel is displaced by > `tolerance_mm`.

    An affine difference is largest at a corner, so the eight corners decide.
    """
    if first.shape != second.shape:
        return False
    last = [n - 1 for n in first.shape[-3:]]
    corners = np.array(
        [(x, y, z, 1) for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])]
    )
    moved = corners @ (first.affine - second.affine).T[:, :3]  # [8, 3] mm
    return bool(np.linalg.norm(moved, axis=1).max() <= tolerance_mm)
