"""ECAT7 image files (.v) of Siemens/CTI scanners, through nibabel, frame by frame."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from nibabel.ecat import BLOCK_SIZE, EcatImage, get_frame_order

from petite_fast.data.acquisition import (
    Timing,
    Tracer,
    check_timing,
    known_nuclide,
    plausible_elapsed,
)
from petite_fast.data.damage import damaged_is_input_error
from petite_fast.data.lazy import Volume, require_finite
from petite_fast.data.nifti import canonical_grid, grid_header
from petite_fast.errors import InputError

_EXPECTED = "a complete ECAT7 image (.v)"
_IMAGES = (2, 6, 7, 10)  # file types of image matrices; the others are sinograms, maps, norms
_UNKNOWN_ORIENTATION = 8
_DECAY_CORRECTED = 512  # bit of corrections_applied
_UNITS = {"bq/cc": "Bq/mL", "bq/ml": "Bq/mL", "bqml": "Bq/mL"}


def read_ecat(source: Path) -> Volume:
    """Headers of an ECAT7 image.

    Voxels are stored * frame scale factor * ECAT calibration factor. The file's axes are turned
    round so that they grow to R, A, S: all three, but for a feet-first patient (nibabel's rule);
    an unknown orientation counts as head first and supine.

    The dose is not taken over: the header does not say whether it is in Bq, MBq or mCi.

    Raises:
        InputError: not an ECAT7 image, damaged, or frames of different grids or data types.
    """
    with source.open("rb") as stream, damaged_is_input_error(source, _EXPECTED):
        _check_layout(stream, source)
        image = _open(stream)
        header, sub = image.header, image.get_subheaders()
        order = [row for row, _ in get_frame_order(image.get_mlist()).values()]
        frames = [sub.subheaders[row] for row in order]
        shape = tuple(map(int, sub.get_shape(order[0])))
        _check_frames(image, order, source, os.fstat(stream.fileno()).st_size)
        affine = np.array(sub.get_frame_affine(order[0]), np.float64)
        if not np.diag(affine).min() > 0:  # reading turns the axes, so that sizes are positive
            raise InputError(f"{source}: the voxel size is not positive; expected three lengths")
        orientation, canonical, spatial = canonical_grid(affine, shape, source)
        timing = Timing(
            tuple(float(f["frame_start_time"]) / 1000 for f in frames),
            tuple(float(f["frame_duration"]) / 1000 for f in frames),
            (0.0,) * len(frames)  # ECAT corrects to the start of the scan
            if all(int(f["corrections_applied"]) & _DECAY_CORRECTED for f in frames)
            else None,
        )
        units = _units(header)
        tracer = _tracer(header, timing)
    if any(d > 0 for d in timing.duration_s):
        check_timing(timing, len(frames), source)
    return Volume(
        spatial if len(order) == 1 else (len(order), *spatial),
        canonical,
        source,
        _Frames(source, tuple(order)),
        grid_header(shape if len(order) == 1 else (*shape, len(order)), affine),
        orientation,
        units,
        timing if any(d > 0 for d in timing.duration_s) else None,
        tracer,
    )


@dataclass(frozen=True)
class _Frames:
    source: Path
    order: tuple[int, ...]

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        with self.source.open("rb") as stream:
            for k in indices:
                with damaged_is_input_error(self.source, _EXPECTED), np.errstate(all="ignore"):
                    image = _open(stream)
                    known = int(image.header["patient_orientation"]) < _UNKNOWN_ORIENTATION
                    stored = image.get_frame(self.order[k], None if known else "neurological")
                    frame = np.ascontiguousarray(stored, np.float32)
                require_finite(frame, self.source)
                yield frame


def _open(stream: BinaryIO) -> EcatImage:
    stream.seek(0)
    files = EcatImage.make_file_map()
    files["header"].fileobj = files["image"].fileobj = cast(IOBase, stream)
    return EcatImage.from_file_map(files)


def _check_layout(stream: BinaryIO, source: Path) -> None:
    """Refuse other formats, and a directory that nibabel would follow in circles."""
    head = stream.read(BLOCK_SIZE)
    if len(head) < BLOCK_SIZE or not head.startswith(b"MATRIX7"):
        raise InputError(f"{source}: not an ECAT7 file; expected one that begins with MATRIX7")
    order = "<" if head[46:48] == b"\x4a\0" else ">"  # sw_version is 74; nibabel's rule
    file_type = struct.unpack(f"{order}H", head[50:52])[0]
    if file_type not in _IMAGES:
        raise InputError(
            f"{source}: an ECAT7 file of type {file_type}; expected an image (type 2, 6, 7 or 10)"
        )
    block, seen = 2, set()
    while block not in seen:
        seen.add(block)
        stream.seek((block - 1) * BLOCK_SIZE)
        unused, following, _, used = struct.unpack(f"{order}4i", stream.read(16))
        if unused + used != 31 or not 0 <= used <= 31:
            raise InputError(f"{source}: the list of frames is damaged; expected {_EXPECTED}")
        if following <= 2:
            return
        block = following
    raise InputError(f"{source}: the list of frames is a circle; expected {_EXPECTED}")


def _check_frames(image: EcatImage, order: list[int], source: Path, size: int) -> None:
    """Refuse frames that differ in grid, are of an unknown type, or end behind the file."""
    if not order:
        raise InputError(f"{source}: no frame; expected {_EXPECTED}")
    # num_bed_pos counts the positions after the first.
    if len(order) > 1 and (image.header["num_gates"] > 1 or image.header["num_bed_pos"] > 0):
        raise InputError(
            f"{source}: several gates or bed positions; expected one position over time"
        )
    sub = image.get_subheaders()
    shape, affine = sub.get_shape(order[0]), sub.get_frame_affine(order[0])
    for row in order:
        same = sub.get_shape(row) == shape and np.allclose(sub.get_frame_affine(row), affine)
        if not same:
            raise InputError(f"{source}: frames are on different grids; expected the same for all")
        end = sub._get_frame_offset(row) + math.prod(shape) * image.get_data_dtype(row).itemsize
        if min(shape) < 1 or end > size:
            raise InputError(
                f"{source}: the file is truncated, {size} bytes; expected {end} for frames of"
                f" shape {tuple(map(int, shape))}"
            )


def _units(header: Any) -> str | None:
    label = bytes(header["data_units"]).split(b"\0")[0].decode("ascii", "ignore")
    if label.strip():
        return _UNITS.get(label.strip().lower())
    return "Bq/mL" if int(header["calibration_unitS"]) == 1 else None


def _tracer(header: Any, timing: Timing) -> Tracer:
    def number(field: str) -> float | None:
        value = float(header[field])
        return value if math.isfinite(value) and value > 0 else None

    isotope = bytes(header["isotope_name"]).split(b"\0")[0].decode("ascii", "ignore")
    start, injected = int(header["scan_start_time"]), int(header["dose_start_time"])
    half_life, height = number("isotope_halflife"), number("patient_height")
    elapsed, problem = None, Tracer.problem
    if timing.reference_s is not None and half_life and 0 < injected and 0 < start:
        try:
            length = timing.end_s[-1] - timing.start_s[0]
            elapsed = plausible_elapsed(float(start - injected), half_life, length)
        except ValueError as error:
            problem = str(error)
    return Tracer(
        half_life_s=half_life,
        weight_kg=number("patient_weight"),
        height_m=None if height is None else height / 100,
        elapsed_s=None if elapsed is None else (elapsed,) * len(timing.start_s),
        problem=problem,
        nuclide=known_nuclide(isotope),
    )
