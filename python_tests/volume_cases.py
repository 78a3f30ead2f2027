"""Small NIfTI files, sound and broken, and what reading a broken one must say."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from petite_fast.data import read_volume
from petite_fast.errors import InputError

SHAPE = (3, 4, 5)
SPACING = (1.5, 2.0, 3.25)


def voxels(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.arange(np.prod(shape), dtype=np.float32) * 0.37 + 1).reshape(shape)


def ras_affine() -> np.ndarray:
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-10.5, 22.0, 7.75)
    return affine


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    image = nib.Nifti1Image(array, ras_affine() if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, data: bytes) -> Path:
    """Overwrite bytes of an uncompressed file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


def refused(path: Path, *words: str) -> None:
    """Reading must fail with one sentence that names the file, the fault and the expectation."""
    with pytest.raises(InputError) as caught:
        read_volume(path).array  # noqa: B018
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
