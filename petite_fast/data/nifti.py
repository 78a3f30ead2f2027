"""NIfTI-1 and NIfTI-2 files, read frame by frame and written without free text."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from petite_fast.data.lazy import Volume, require_finite
from petite_fast.data.sidecar import Facts, read_sidecar
from petite_fast.errors import InputError
from petite_fast.files import atomic_write

# nibabel logs each repair of a header without naming the file; what it cannot repair raises.
_silent = logging.Logger("header repairs", logging.CRITICAL + 1)

CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])  # R, A, S
_HEADER_BYTES = 540  # NIfTI-2; NIfTI-1 has 348 and at least 4 more before the voxels
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # metre, micron; anything else is millimetre
_MOST_DEFLATED = 1032  # bytes that one byte of a gzip file can stand for
_CHUNK = 1 << 20  # a damaged header may ask for any number of bytes: they are read in parts

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


def read_nifti(source: Path, sidecar: bool = True) -> Volume:
    """Header, geometry and (from a BIDS sidecar beside it) times and units of a NIfTI file.

    Args:
        source: .nii or .nii.gz.
        sidecar: read that too; without, what is wrong with it is not seen.

    Raises:
        InputError: see `petite_fast.data.volume.read_volume`.
    """
    with _open(source) as stream, _intact(source):
        head = stream.read(_HEADER_BYTES)
    header = _parse_header(head, source)
    stored = tuple(map(int, header.get_data_shape()))
    count = math.prod(stored[3:])
    orientation, affine, spatial = canonical_grid(_affine_mm(header, source), stored[:3], source)
    reader = _Frames(source, header, head, orientation)
    size = source.stat().st_size
    if source.name.lower().endswith(".gz"):
        reader.require(size * _MOST_DEFLATED, "at most ")
    else:
        reader.require(size)
    facts = read_sidecar(source, count) if sidecar else Facts()
    return Volume(
        spatial if count == 1 else (count, *spatial),
        affine,
        source,
        reader,
        _geometry(header),
        orientation,
        facts.units,
        facts.timing,
        facts.tracer,
    )


@dataclass(frozen=True, eq=False)
class _Frames:
    """Decodes voxels slope * stored + intercept, in float64, rounded once to float32."""

    source: Path
    header: nib.Nifti1Header
    head: bytes
    orientation: np.ndarray

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield frames [X, Y, Z]; a gzip file is then read to its end, which checks its sum."""
        frame_bytes = self._voxels() * self.header.get_data_dtype().itemsize
        with _open(self.source) as stream, _intact(self.source):
            if stream.read(_HEADER_BYTES) != self.head:
                raise InputError(
                    f"{self.source}: the file changed while it was being read;"
                    " expected one that nobody writes to"
                )
            for k in indices:
                stream.seek(int(self.header.get_data_offset()) + k * frame_bytes)
                data = _read(stream, frame_bytes)
                if len(data) < frame_bytes:
                    self.require(stream.tell())
                yield self._decode(data)
            while isinstance(stream, gzip.GzipFile) and stream.read(_CHUNK):
                pass

    def require(self, available: int, most: str = "") -> None:
        """Refuse a file of `available` (or "at most " so many) bytes: too few for all voxels."""
        shape = tuple(map(int, self.header.get_data_shape()))
        itemsize = self.header.get_data_dtype().itemsize
        wanted = int(self.header.get_data_offset()) + math.prod(shape) * itemsize
        if available < wanted:
            raise InputError(
                f"{self.source}: the file is truncated, {most}{available} bytes;"
                f" expected {wanted} for shape {shape}"
            )

    def _voxels(self) -> int:
        return math.prod(map(int, self.header.get_data_shape()[:3]))

    def _decode(self, data: bytes | bytearray) -> np.ndarray:
        shape = self.header.get_data_shape()[:3]
        stored = np.frombuffer(data, self.header.get_data_dtype()).reshape(shape, order="F")
        slope, intercept = self.header.get_slope_inter()
        with np.errstate(over="ignore", invalid="ignore"):  # overflow becomes Inf, refused below
            if slope is not None and (slope, intercept) != (1.0, 0.0):
                stored = stored.astype(np.float64) * slope + intercept
            array = stored.astype(np.float32)
        require_finite(array, self.source)
        return np.ascontiguousarray(apply_orientation(array, self.orientation))


def _read(stream: gzip.GzipFile | BinaryIO, wanted: int) -> bytearray:
    """Up to `wanted` bytes; fewer at the end of the file."""
    data = bytearray()
    while len(data) < wanted and (part := stream.read(min(_CHUNK, wanted - len(data)))):
        data += part
    return data


@contextmanager
def _intact(source: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into an InputError."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{source}: the file is damaged or truncated ({error}); expected a complete NIfTI"
        ) from error


def _open(source: Path) -> gzip.GzipFile | BinaryIO:
    """Open `source` for reading decompressed bytes, or say why it cannot be a NIfTI."""
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
    """Parse and check the header: version, axes, voxel sizes, data type, scaling."""
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
        dtype = header.get_data_dtype()
        header.get_slope_inter()
    except (HeaderDataError, WrapStructError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source}: the NIfTI header is invalid ({error}); expected a valid one"
        ) from error
    if len(shape) < 3 or min(shape) < 1 or math.prod(map(int, shape[4:])) > 1:
        raise InputError(
            f"{source}: the image has shape {tuple(map(int, shape))};"
            " expected one 3-D volume or frames of it along a fourth axis"
        )
    if dtype.kind not in "iuf":
        raise InputError(f"{source}: voxels are of type {dtype}; expected real numbers")
    return header


def _affine_mm(header: nib.Nifti1Header, source: Path) -> np.ndarray:
    """Affine of the file's own axes in mm."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            affine = np.array(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise InputError(
            f"{source}: the orientation in the header is invalid ({error}); expected a rotation"
        ) from error
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def canonical_grid(
    file_affine: np.ndarray, shape: Sequence[int], source: Path
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """How a file's axes are turned to R, A, S.

    Args:
        file_affine: voxel of the file's axes -> mm.
        shape: of the file's three axes.
        source: names the file in errors.

    Returns:
        nibabel orientation of the file's axes, affine and shape of the turned ones.

    Raises:
        InputError: NaN, Inf, an axis of no length, or axes that do not span space.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        spacing = np.linalg.norm(file_affine[:3, :3], axis=0)
        volume = abs(np.linalg.det(file_affine[:3, :3])) if np.isfinite(file_affine).all() else 0.0
        sound = np.isfinite(spacing).all() and 1e-6 * spacing.prod() < volume < np.inf
        orientation = io_orientation(file_affine) if sound else np.full((3, 2), np.nan)
        # An axis so short that its square is 0 has no direction: nibabel drops it.
        affine = np.full((4, 4), np.nan)
        if not np.isnan(orientation).any():
            affine = file_affine @ inv_ornt_aff(orientation, shape)
    if not np.isfinite(affine).all():
        raise InputError(
            f"{source}: the affine is singular (voxel size {tuple(spacing.tolist())} mm);"
            " expected three independent axes of positive length"
        )
    return orientation, affine, tuple(int(shape[int(k)]) for k in np.argsort(orientation[:, 0]))


def _geometry(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """Copy geometry and units of `header` into an otherwise empty one, native byte order."""
    kept = type(header)()
    kept.set_data_shape(header.get_data_shape())
    for field in _KEPT_FIELDS:
        kept[field] = header[field]
    return kept


def grid_header(shape: Sequence[int], affine: np.ndarray) -> nib.Nifti1Header:
    """A NIfTI-1 header of `shape`, `affine` voxel -> mm in scanner space."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    return header


def write_nifti(array: np.ndarray, header: nib.Nifti1Header, path: Path) -> Path:
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
