"""Nothing is decoded until it is asked for, and a volume names neither file nor patient."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import make_series
from ecat_cases import make_ecat
from volume_cases import SHAPE, patched, ras_affine, save, voxels

from petite_fast.data import Volume, read_volume, to_suv, write_like
from petite_fast.errors import InputError


def series(path: Path, frames: int = 3, kind: type = nib.Nifti1Image) -> np.ndarray:
    """Write a dynamic NIfTI with left-handed axes; its voxels as [T, X, Y, Z]."""
    stored = np.stack([voxels() + 100 * t for t in range(frames)], axis=3)
    affine = ras_affine()
    affine[:, 0] *= -1
    nib.save(kind(stored.astype(np.float32), affine), path)
    return np.moveaxis(stored, 3, 0)[:, ::-1]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_dynamic_nifti(tmp_path: Path, name: str, kind: type) -> None:
    expected = series(tmp_path / name, kind=kind)
    volume = read_volume(tmp_path / name)
    assert volume.shape == (3, *SHAPE) and volume.frame_count == 3
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(list(volume.frames([0, 2])), expected[[0, 2]])
    with pytest.raises(ValueError, match="ascending"):
        volume.frames([1, 0])
    with pytest.raises(ValueError, match="ascending"):
        volume.frames([3])

    written = write_like(volume, volume.array, tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(
        nib.load(written).get_fdata(), nib.load(tmp_path / name).get_fdata()
    )
    np.testing.assert_array_equal(nib.load(written).affine, nib.load(tmp_path / name).affine)
    one = write_like(volume, volume.array[1], tmp_path / "one.nii.gz")
    assert nib.load(one).shape == SHAPE
    np.testing.assert_array_equal(read_volume(one).array, expected[1])


def test_voxels_are_decoded_at_the_first_use(tmp_path: Path) -> None:
    series(tmp_path / "a.nii.gz")
    nifti = read_volume(tmp_path / "a.nii.gz")
    ecat = read_volume(make_ecat(tmp_path / "a.v", 2))
    dicom = read_volume(make_series(tmp_path / "s"))
    suv = to_suv(dicom)
    for path in (tmp_path / "s").iterdir():
        path.unlink()
    (tmp_path / "a.nii.gz").unlink()
    (tmp_path / "a.v").unlink()
    for volume in (nifti, ecat, dicom, suv):
        with pytest.raises((InputError, OSError)):
            volume.array  # noqa: B018
    kept = read_volume(save(tmp_path / "b.nii", voxels()))
    assert kept.array is kept.array


def test_file_that_changes_in_between(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "a.nii", voxels()))
    save(tmp_path / "a.nii", voxels((3, 4, 6)))
    with pytest.raises(InputError, match="changed while it was being read"):
        volume.array  # noqa: B018


def test_truncated_series_is_found_without_decoding_all_of_it(tmp_path: Path) -> None:
    series(tmp_path / "a.nii")
    whole = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(whole[:-1])
    with pytest.raises(InputError, match="truncated"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_header_that_announces_more_than_memory(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, voxels())
    header = nib.load(path).header.copy()
    header.set_data_shape((32000, 32000, 32000, 32000))
    raw = bytearray(header.binaryblock)
    struct.pack_into("<f", raw, 108, 352)
    if name.endswith(".gz"):
        import gzip

        path.write_bytes(gzip.compress(bytes(raw) + bytes(1000)))
    else:
        patched(path, 0, bytes(raw))
    tracemalloc.start()
    with pytest.raises(InputError, match="truncated"):
        read_volume(path).array  # noqa: B018
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_memory_of_a_series_is_one_frame(tmp_path: Path) -> None:
    shape, frames = (64, 64, 32), 10
    stored = np.zeros((*shape, frames), np.int16)
    stored[..., 3] = 7
    nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii.gz")
    del stored
    tracemalloc.start()
    volume = read_volume(tmp_path / "a.nii.gz")
    peaks = [float(frame.max()) for frame in volume.frames()]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peaks == [0, 0, 0, 7, 0, 0, 0, 0, 0, 0]
    assert most < 5 * 4 * np.prod(shape)


def test_printed_volume_names_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "DOE^JANE"
    volumes: list[Volume] = [read_volume(make_series(folder))]
    volumes.append(read_volume(make_ecat(tmp_path / "DOE.v")))
    volumes.append(read_volume(save(tmp_path / "DOE.nii.gz", voxels())))
    for volume in [*volumes, to_suv(volumes[0])]:
        text = f"{volume} {volume!r} {volume.timing} {volume.tracer}"
        assert "DOE" not in text and "ID-4711" not in text
    assert repr(volumes[2]) == "Volume(3x4x5 voxels of 1.5x2x3.25 mm, unknown units)"
