"""Read and write single 3-D NIfTI volumes without losing where they are in space."""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from petite_fast.errors import InputError
from petite_fast.files import atomic_write

# nibabel logs each repair of a header without naming the file; what it cannot repair raises.
_silent = logging.Logger("header repairs", logging.CRITICAL + 1)

_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])  # R, A, S
_HEADER_BYTES = 540  # NIfTI-2; NIfTI-1 has 348 and at least 4 more before the voxels
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # metre, micron; anything else is millimetre

# What leaves with a written volume: geometry and units. Everything else of a header is left
# behind, because descrip, aux_file, db_name, intent_name and the extensions are free text in
# which scanner software and converters store patient names, dates and accession numbers.
_KEPT_FIELDS = (
    "pixdim",
    "xyzt_units",
    "toffset",
    "qform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "sform_code",
    "srow_x",
    "srow_y",
    "srow_z",
)


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3-D image in the axis order nearest to R, A, S.

    Attributes:
        array: float32, [X, Y, Z]; X grows to the patient's right, Y to anterior, Z to superior
            (as nearly as the file's axes allow, nothing is resampled). Units are the file's.
        affine: 4x4 float64, voxel index of `array` -> mm.
        source: the file it was read from.
        header: geometry and units of the file (no free text), in the file's own axis order.
        orientation: 3x2, nibabel orientation of the file's axes.
    """

    array: np.ndarray
    affine: np.ndarray
    source: Path
    header: nib.Nifti1Header
    orientation: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along X, Y, Z."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz) of any orientation, byte order and scaling.

    Voxels are slope * stored + intercept, computed in float64 and rounded once to float32.
    Trailing axes of length 1 are dropped. A gzip file is read to its end, so that its
    checksum is verified.

    Raises:
        InputError: the file is missing, truncated, not gzip although named so, not a
            single-file NIfTI, not one 3-D volume of real numbers, holds NaN or Inf, or its
            affine is singular or has a voxel size that is not positive.
    """
    source = Path(path)
    with _open(source) as stream:
        try:
            head = stream.read(_HEADER_BYTES)
            header = _parse_header(head, source)
            data = head + stream.read()
        except (EOFError, zlib.error, OSError) as error:
            raise InputError(
                f"{source}: the file is damaged or truncated ({error}); expected a complete NIfTI"
            ) from error
    stored = _voxels(data, header, source)
    file_affine = _affine_mm(header, source)
    orientation = io_orientation(file_affine)
    array = np.ascontiguousarray(apply_orientation(stored, orientation))
    affine = file_affine @ inv_ornt_aff(orientation, stored.shape)
    return Volume(array, affine, source, _geometry(header), orientation)


def write_like(volume: Volume, array: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write `array` as float32 on the grid, in the orientation and with the units of `volume`.

    Args:
        volume: what `read_volume` gave for the file that `array` belongs to.
        array: [X, Y, Z], the axes of ``volume.array``.
        path: ends in .nii or .nii.gz; it appears only when complete.

    Kept from the source file: shape (trailing axes of length 1 too), voxel sizes, qform and
    sform with their codes, units, NIfTI version. Dropped: every free-text field (descrip,
    aux_file, db_name, intent_name) and all extensions, since they may identify a patient.

    Raises:
        ValueError: `array` has another shape than the volume.
        InputError: `array` holds NaN or Inf, or `path` is not named .nii or .nii.gz.
        OSError: the file cannot be written; nothing is left behind.
    """
    if array.shape != volume.array.shape:
        raise ValueError(f"array has shape {array.shape}, wanted {volume.array.shape}")
    back = ornt_transform(_CANONICAL, volume.orientation)
    on_file_axes = apply_orientation(array, back).reshape(volume.header.get_data_shape())
    return _write(on_file_axes, volume.header, Path(path))


def write_volume(array: np.ndarray, affine: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write a new float32 NIfTI-1: `array` [X, Y, Z], `affine` voxel -> mm (scanner space).

    Raises:
        ValueError: `array` is not 3-D.
        InputError: NaN or Inf in `array`, or a name that is not .nii or .nii.gz.
    """
    if array.ndim != 3:
        raise ValueError(f"array has {array.ndim} axes, wanted 3")
    header = nib.Nifti1Header()
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    return _write(array, header, Path(path))


def same_grid(first: Volume, second: Volume, tolerance_mm: float = 1e-3) -> bool:
    """Whether both volumes have the same shape and no voxel is displaced by > `tolerance_mm`.

    An affine difference is largest at a corner, so the eight corners decide.
    """
    if first.array.shape != second.array.shape:
        return False
    last = [n - 1 for n in first.array.shape]
    corners = np.array(
        [(x, y, z, 1) for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])]
    )
    moved = corners @ (first.affine - second.affine).T[:, :3]  # [8, 3] mm
    return bool(np.linalg.norm(moved, axis=1).max() <= tolerance_mm)


def _open(source: Path) -> gzip.GzipFile | BinaryIO:
    """Open `source` for reading decompressed bytes, or say why it cannot be a NIfTI."""
    if not source.is_file():
        raise InputError(f"{source}: no such file; expected a NIfTI image (.nii or .nii.gz)")
    _require_nifti_name(source)
    with source.open("rb") as stream:
        head = stream.read(64)
    gzipped, named_gz = head[:2] == b"\x1f\x8b", source.name.lower().endswith(".gz")
    if gzipped and named_gz:
        return gzip.GzipFile(source, "rb")
    if gzipped:
        raise InputError(
            f"{source}: the file is gzip-compressed; expected the name to end in .nii.gz"
        )
    if not named_gz:
        return source.open("rb")
    what = "an HTML or XML page" if head.lstrip().startswith(b"<") else "not gzip-compressed data"
    raise InputError(f"{source}: the file is {what}; expected a gzip-compressed NIfTI")


def _require_nifti_name(path: Path) -> None:
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(
            f"{path}: not a NIfTI file name; expected one that ends in .nii or .nii.gz"
        )


def _parse_header(head: bytes, source: Path) -> nib.Nifti1Header:
    """Parse and check the header: NIfTI version, number of axes, voxel sizes."""
    if head[344:348] == b"n+1\0":
        kind, size = nib.Nifti1Header, 348
    elif head[4:8] == b"n+2\0":
        kind, size = nib.Nifti2Header, 540
    else:
        raise InputError(f"{source}: not a NIfTI file; expected a single-file NIfTI-1 or NIfTI-2")
    try:
        header = kind(head[:size], check=False)
        # nibabel repairs a zero or negative voxel size to a made-up one: look before it does.
        sizes = np.asarray(header["pixdim"][1:4])
        if int(header["sform_code"]) <= 0 and not (np.isfinite(sizes).all() and (sizes > 0).all()):
            raise InputError(
                f"{source}: the voxel size is {tuple(sizes.tolist())} mm;"
                " expected three positive numbers"
            )
        # nibabel lets 0 pass (it means "behind the header" in two-file NIfTI) and NaN and Inf.
        offset = float(header["vox_offset"])
        if not size <= offset < np.inf:
            raise InputError(
                f"{source}: the voxels start at byte {offset:g};"
                f" expected a place behind the header of {size} bytes"
            )
        header.check_fix(logger=_silent, error_level=40)
        shape = header.get_data_shape()
    except (HeaderDataError, WrapStructError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source}: the NIfTI header is invalid ({error}); expected a valid one"
        ) from error
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape[3:]) > 1:
        raise InputError(
            f"{source}: the image has shape {tuple(map(int, shape))}; expected one 3-D volume"
        )
    return header


def _voxels(data: bytes, header: nib.Nifti1Header, source: Path) -> np.ndarray:
    """Decode [X, Y, Z] float32 voxels in the file's own axis order."""
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{source}: voxels are of type {dtype}; expected real numbers")
    shape = header.get_data_shape()[:3]
    offset, count = int(header.get_data_offset()), math.prod(shape)
    if offset + count * dtype.itemsize > len(data):
        raise InputError(
            f"{source}: the file is truncated, {len(data)} bytes;"
            f" expected {offset + count * dtype.itemsize} for shape {tuple(map(int, shape))}"
        )
    stored = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F")
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise InputError(
            f"{source}: the NIfTI header is invalid ({error}); expected a valid one"
        ) from error
    with np.errstate(over="ignore", invalid="ignore"):  # overflow becomes Inf, refused below
        if slope is not None and (slope, intercept) != (1.0, 0.0):
            stored = stored.astype(np.float64) * slope + intercept
        array = stored.astype(np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise InputError(f"{source}: {bad} voxels are NaN or Inf; expected finite numbers")
    return array


def _affine_mm(header: nib.Nifti1Header, source: Path) -> np.ndarray:
    """Affine of the file's own axes in mm; refuse one that does not place voxels in space."""
    try:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise InputError(
            f"{source}: the orientation in the header is invalid ({error}); expected a rotation"
        ) from error
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    volume = abs(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else 0.0
    if not volume > 1e-6 * spacing.prod():
        raise InputError(
            f"{source}: the affine is singular (voxel size {tuple(spacing.tolist())} mm);"
            " expected three independent axes of positive length"
        )
    return affine


def _geometry(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """Copy geometry and units of `header` into an otherwise empty one, native byte order."""
    kept = type(header)()
    kept.set_data_shape(header.get_data_shape())
    for field in _KEPT_FIELDS:
        kept[field] = header[field]
    return kept


def _write(array: np.ndarray, header: nib.Nifti1Header, path: Path) -> Path:
    """Write `array`, in the axis order of `header`, as float32 in one atomic step."""
    _require_nifti_name(path)
    array = np.asarray(array, dtype=np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise InputError(f"{path}: {bad} voxels to write are NaN or Inf; expected finite numbers")
    header = header.copy()
    header.set_data_dtype(np.float32)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # The header's own affine: nibabel then leaves qform, sform and their codes as they are.
    image = kind(array, header.get_best_affine(), header)
    with atomic_write(path) as temporary:
        nib.save(image, temporary)
    return path
