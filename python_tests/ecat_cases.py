"""Small ECAT7 image files, made block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.ecat import BLOCK_SIZE, hdr_dtype, subhdr_dtype

SHAPE = (4, 3, 2)
CALIBRATION = 2.5


def stored(frame: int) -> np.ndarray:
    return (np.arange(24).reshape(SHAPE) * 3 + 50 * frame).astype(">i2")


def scale(frame: int) -> float:
    return 0.5 * (frame + 1)


def make_ecat(
    path: Path,
    frames: int = 1,
    main: dict[str, Any] | None = None,
    sub: dict[str, Any] | None = None,
    order: tuple[int, ...] | None = None,
) -> Path:
    """An ECAT7 volume of `frames` frames; `order`: in which frames lie in the file."""
    header = np.zeros((), hdr_dtype.newbyteorder(">"))
    values = {
        "magic_number": b"MATRIX72v",
        "sw_version": 74,
        "file_type": 7,
        "num_frames": frames,
        "num_gates": 1,
        "ecat_calibration_factor": CALIBRATION,
        "calibration_unitS": 1,
        "data_units": b"Bq/cc",
        "isotope_name": b"F-18",
        "isotope_halflife": 6588,
        "patient_name": b"DOE^JANE",
        "patient_weight": 70,
        "patient_orientation": 3,
        "scan_start_time": 1_700_003_600,
        "dose_start_time": 1_700_000_000,
        **(main or {}),
    }
    for field, value in values.items():
        header[field] = value
    directory = np.zeros((32, 4), ">i4")
    directory[0] = 31 - frames, 2, 0, frames
    blocks = [header.tobytes().ljust(BLOCK_SIZE, b"\0"), b""]
    for row, frame in enumerate(order or range(frames), start=1):
        start = len(blocks) + 1
        directory[row] = 0x1010001 + frame, start, start + 1, 1
        block = np.zeros((), subhdr_dtype.newbyteorder(">"))
        entries = {
            "data_type": 6,
            "num_dimensions": 3,
            "x_dimension": SHAPE[0],
            "y_dimension": SHAPE[1],
            "z_dimension": SHAPE[2],
            "scale_factor": scale(frame),
            "x_pixel_size": 0.2,
            "y_pixel_size": 0.25,
            "z_pixel_size": 0.3,
            "frame_start_time": 300_000 * frame,
            "frame_duration": 300_000,
            "corrections_applied": 512,
            **(sub or {}),
        }
        for field, value in entries.items():
            block[field] = value
        blocks.append(block.tobytes().ljust(BLOCK_SIZE, b"\0"))
        blocks.append(stored(frame).tobytes(order="F").ljust(BLOCK_SIZE, b"\0"))
    blocks[1] = directory.tobytes()
    path.write_bytes(b"".join(blocks))
    return path


def expected(frame: int = 0) -> np.ndarray:
    """Voxels [X, Y, Z] of a head-first patient: all three axes are turned round."""
    return (stored(frame) * (scale(frame) * CALIBRATION))[::-1, ::-1, ::-1].astype(np.float32)
