"""NIfTI files that cannot be used: one sentence each, and no file left open."""

from __future__ import annotations

import gc
import gzip
import logging
import struct
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_cases import SHAPE, patched, refused, save, voxels

from petite_fast.data import read_volume


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.nii.gz", "no such file")
    refused(tmp_path, "no DICOM image")


def test_name_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    refused(tmp_path / "a.png", ".nii")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_gzip(tmp_path: Path, kept: float) -> None:
    rng = np.random.default_rng(0)
    path = save(tmp_path / "a.nii.gz", rng.random((16, 16, 16), np.float32))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "truncated")


def test_missing_checksum_and_changed_byte(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((16, 16, 16), np.float32))
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-8])
    refused(path, "truncated")
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    refused(path, "damaged")


def test_truncated_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels())
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "truncated", "591 bytes", "expected 592")
    gz = tmp_path / "b.nii.gz"
    gz.write_bytes(gzip.compress(path.read_bytes()[:400]))
    refused(gz, "truncated")


def test_page_saved_as_nifti(tmp_path: Path) -> None:
    page = b"\n<!DOCTYPE html><html><body>Sign in</body></html>" * 20
    (tmp_path / "a.nii.gz").write_bytes(page)
    refused(tmp_path / "a.nii.gz", "HTML", "expected a gzip-compressed NIfTI")
    (tmp_path / "b.nii").write_bytes(page)
    refused(tmp_path / "b.nii", "not a NIfTI")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + bytes(600), bytes(1000)])
def test_not_nifti(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nii").write_bytes(content)
    refused(tmp_path / "a.nii", "not a NIfTI")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content))
    refused(tmp_path / "b.nii.gz", "not a NIfTI")
    (tmp_path / "c.nii.gz").write_bytes(content)
    refused(tmp_path / "c.nii.gz", "not gzip-compressed")


def test_gzip_named_nii(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", voxels()).rename(tmp_path / "a.nii")
    refused(tmp_path / "a.nii", "gzip-compressed", ".nii.gz")


@pytest.mark.parametrize("shape", [(3, 4, 5, 2, 3), (3, 4, 5, 1, 3), (3, 4)])
def test_not_one_3d_volume(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path / "a.nii.gz", voxels(shape))
    refused(path, "expected one 3-D volume", ", ".join(map(str, shape)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(tmp_path: Path, value: float) -> None:
    array = voxels()
    array[1, 2, 3] = array[0, 0, 0] = value
    refused(save(tmp_path / "a.nii.gz", array), "2 voxels are NaN or Inf")


def test_value_too_large_for_float32(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii.gz", voxels().astype(np.float64) * 1e39), "NaN or Inf")


def test_complex_and_colour_voxels(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii.gz", voxels().astype(np.complex64)), "expected real numbers")
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(save(tmp_path / "b.nii.gz", rgb), "expected real numbers")


@pytest.mark.parametrize("row", [b"\0" * 16, struct.pack("<4f", 1.5, 0, 0, -10.5)])
def test_singular_affine(tmp_path: Path, row: bytes) -> None:
    path = save(tmp_path / "a.nii", voxels())
    assert nib.load(path).header["sform_code"] > 0
    patched(path, 296, row)  # srow_y: zero, or the same as srow_x
    refused(path, "affine is singular")


def test_affine_of_nan(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels())
    patched(path, 280, struct.pack("<f", np.nan))
    refused(path, "affine is singular")


@pytest.mark.parametrize("size", [0.0, -2.0, np.nan])
def test_voxel_size_not_positive(tmp_path: Path, size: float) -> None:
    path = save(tmp_path / "a.nii", voxels())
    patched(path, 252, struct.pack("<2h", 1, 0))  # qform only
    patched(path, 80, struct.pack("<f", size))
    refused(path, "voxel size", "three positive numbers")


@pytest.mark.parametrize("offset", [0.0, 100.0, -5.0, np.nan, np.inf])
def test_voxels_inside_the_header(tmp_path: Path, offset: float) -> None:
    path = patched(save(tmp_path / "a.nii", voxels()), 108, struct.pack("<f", offset))
    refused(path, "start at byte")


def test_unknown_data_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="petite_fast")
    path = patched(save(tmp_path / "a.nii", voxels()), 70, struct.pack("<h", 999))
    refused(path, "header is invalid")


def test_reading_closes_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", voxels())
    broken = tmp_path / "b.nii.gz"
    broken.write_bytes(path.read_bytes()[:80])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        read_volume(path)
        refused(broken, "truncated")
        gc.collect()
    assert [str(w.message) for w in caught if w.category is ResourceWarning] == []


@pytest.mark.parametrize("size", [1e-180, 1e180])
def test_axis_whose_square_is_no_number(tmp_path: Path, size: float) -> None:
    nib.save(nib.Nifti2Image(voxels(), np.diag([1.0, 2, 3, 1])), tmp_path / "a.nii")
    patched(tmp_path / "a.nii", 400, struct.pack("<d", size))  # srow_x[0]
    refused(tmp_path / "a.nii", "affine is singular")


def test_a_compressed_header_cannot_claim_more_than_the_file_can_hold(tmp_path: Path) -> None:
    """Nothing is made for frames that are only claimed: their numbers alone would fill memory."""
    nib.save(nib.Nifti2Image(np.ones((3, 4, 5, 2), np.float32), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[48:56] = (2**40).to_bytes(8, "little")  # dim[4]
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(bytes(content)))
    refused(path, "truncated, at most", "(3, 4, 5, 1099511627776)")
    zeros = save(tmp_path / "zeros.nii.gz", np.zeros((100, 100, 100), np.float32))
    assert not read_volume(zeros).array.any()  # compressed as far as it goes
