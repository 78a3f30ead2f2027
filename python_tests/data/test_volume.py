"""Reading and writing NIfTI: geometry, scaling, privacy and every kind of bad file."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from petite_fast.data import read_volume, write_like, write_volume
from petite_fast.data.volume import same_grid
from petite_fast.errors import InputError

ORIENTATIONS = [
    np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def oblique_affine() -> np.ndarray:
    """2 x 1.5 x 3 mm voxels, axes turned by about 10 degrees, origin off zero."""
    a, b = 0.15, -0.1
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([2, 1.5, 3])
    affine[:3, 3] = (-31, 12, 7)
    return affine


def ramp(shape: tuple[int, ...] = (5, 4, 3)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **fields: object) -> Path:
    """Write with nibabel, setting header fields afterwards."""
    image = nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    for field, value in fields.items():
        image.header[field] = value
    nib.save(image, path)
    return path


def patch_header(path: Path, **fields: object) -> Path:
    """Change raw header fields of an uncompressed NIfTI-1, past nibabel's own repairs."""
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    data[:348] = header.binaryblock
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(map(str, o.ravel())))
def test_every_orientation_reads_as_ras_and_writes_back_exactly(
    tmp_path: Path, orientation: np.ndarray
) -> None:
    canonical, affine = ramp(), oblique_affine()
    stored = apply_orientation(canonical, orientation)
    # orientation maps canonical axes to the file's; the file's affine follows it
    file_affine = affine @ inv_ornt_aff(orientation, canonical.shape)
    path = save(tmp_path / "in.nii.gz", stored, file_affine)

    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, canonical)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    np.testing.assert_allclose(volume.spacing, (2, 1.5, 3), atol=1e-5)
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous

    source, written = nib.load(path), nib.load(write_like(volume, canonical, tmp_path / "o.nii"))
    np.testing.assert_array_equal(np.asarray(written.dataobj), stored)
    np.testing.assert_array_equal(written.affine, source.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units", "quatern_b", "srow_x"):
        np.testing.assert_array_equal(written.header[field], source.header[field])


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (3, 4), (0, 0)])
def test_qform_and_sform_codes_survive(tmp_path: Path, codes: tuple[int, int]) -> None:
    image = nib.Nifti1Image(ramp(), oblique_affine())
    image.set_qform(oblique_affine(), code=1)
    image.header["qform_code"], image.header["sform_code"] = codes
    nib.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    written = nib.load(write_like(volume, volume.array, tmp_path / "out.nii"))
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "in.nii").affine)


@pytest.mark.parametrize("dtype", [">f4", ">i2", "<u1", "<f8", "<i4"])
def test_byte_orders_and_types(tmp_path: Path, dtype: str) -> None:
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(np.dtype(dtype))
    nib.save(nib.Nifti1Image(ramp().astype(dtype), np.eye(4), header), tmp_path / "in.nii")
    raw = (tmp_path / "in.nii").read_bytes()[:4]
    assert raw == np.array(348, dtype=dtype[0] + "i4").tobytes()
    np.testing.assert_array_equal(read_volume(tmp_path / "in.nii").array, ramp())


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_scaled_integers(tmp_path: Path, endianness: str) -> None:
    header = nib.Nifti1Header(endianness=endianness)
    header.set_data_dtype(np.int16)
    stored = np.arange(-30, 30, dtype=np.int16).reshape(5, 4, 3)
    nib.save(nib.Nifti1Image(stored, np.eye(4), header), tmp_path / "in.nii")
    data = bytearray((tmp_path / "in.nii").read_bytes())
    data[112:120] = np.array([0.37, -5.5], endianness + "f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "in.nii").write_bytes(data)
    wanted = (stored * np.float64(np.float32(0.37)) - 5.5).astype(np.float32)
    volume = read_volume(tmp_path / "in.nii")
    np.testing.assert_array_equal(volume.array, wanted)
    written = nib.load(write_like(volume, volume.array, tmp_path / "out.nii"))
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), wanted)  # slope not kept


def test_nifti2_stays_nifti2(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(ramp(), oblique_affine()), tmp_path / "in.nii.gz")
    volume = read_volume(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(volume.array, ramp())
    written = nib.load(write_like(volume, volume.array, tmp_path / "out.nii.gz"))
    assert isinstance(written, nib.Nifti2Image)
    np.testing.assert_array_equal(written.affine, oblique_affine())


def test_units_of_metres_become_millimetres_and_stay_metres_in_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "in.nii", ramp(), np.diag([0.002, 0.002, 0.003, 1]), xyzt_units=1)
    volume = read_volume(path)
    np.testing.assert_allclose(volume.spacing, (2, 2, 3), rtol=1e-6)
    written = nib.load(write_like(volume, volume.array, tmp_path / "out.nii"))
    assert written.header.get_xyzt_units()[0] == "meter"
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)


def test_trailing_axis_of_one_is_dropped_and_restored(tmp_path: Path) -> None:
    path = save(tmp_path / "in.nii.gz", ramp((5, 4, 3, 1)))
    volume = read_volume(path)
    assert volume.array.shape == (5, 4, 3)
    assert nib.load(write_like(volume, volume.array, tmp_path / "out.nii.gz")).shape == (5, 4, 3, 1)


def test_nothing_that_names_a_patient_is_written(tmp_path: Path) -> None:
    path = tmp_path / "in.nii"
    image = nib.Nifti1Image(ramp(), np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = b"Jane^Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane^Doe 1950"))
    nib.save(image, path)
    assert path.read_bytes().count(b"Jane^Doe") == 5
    volume = read_volume(path)
    assert b"Jane" not in write_like(volume, volume.array, tmp_path / "out.nii").read_bytes()
    assert b"Jane" not in volume.header.binaryblock


def test_written_gzip_is_reproducible_and_names_no_file(tmp_path: Path) -> None:
    first = write_volume(ramp(), np.eye(4), tmp_path / "a.nii.gz").read_bytes()
    assert write_volume(ramp(), np.eye(4), tmp_path / "b.nii.gz").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_write_volume_places_voxels(tmp_path: Path) -> None:
    volume = read_volume(write_volume(ramp(), oblique_affine(), tmp_path / "v.nii.gz"))
    np.testing.assert_array_equal(volume.array, ramp())
    np.testing.assert_allclose(volume.affine, oblique_affine(), atol=1e-5)
    assert volume.header.get_xyzt_units()[0] == "mm"


def html(path: Path) -> Path:
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 40)
    return path


def plain_as_gz(path: Path) -> Path:
    return save(path.with_suffix(""), ramp()).rename(path)


def gz_as_plain(path: Path) -> Path:
    return save(path, ramp()).rename(path.with_name("in.nii"))


def cut(path: Path, keep: float) -> Path:
    noise = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    data = save(path, noise).read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def no_trailer(path: Path) -> Path:
    path.write_bytes(save(path, ramp()).read_bytes()[:-4])
    return path


def flipped_bit(path: Path) -> Path:
    raw = gzip.decompress(save(path, ramp()).read_bytes())
    packed = bytearray(gzip.compress(raw, 0))
    packed[-40] ^= 1  # a voxel; only the checksum can tell
    path.write_bytes(packed)
    return path


def random_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"not an image" * 100))
    return path


def with_nan(path: Path, value: float) -> Path:
    array = ramp()
    array[1, 2, 0] = value
    return save(path, array)


def overflow(path: Path) -> Path:
    return save(path, np.full((3, 3, 3), 1e300))


def header_without_sform(path: Path, **fields: object) -> Path:
    return patch_header(save(path.with_name("in.nii"), ramp()), sform_code=0, **fields)


def header_with_sform(path: Path, **fields: object) -> Path:
    return patch_header(save(path.with_name("in.nii"), ramp()), **fields)


BAD_FILES = {
    "missing": (lambda p: p, "no such file"),
    "folder": (lambda p: p.mkdir() or p, "no such file"),
    "html": (html, "HTML"),
    "plain as gz": (plain_as_gz, "not gzip"),
    "gz as plain": (gz_as_plain, "gzip-compressed"),
    "empty": (lambda p: p.write_bytes(b"") or p, "not gzip"),
    "truncated in half": (lambda p: cut(p, 0.5), "truncated"),
    "truncated in the header": (lambda p: cut(p, 0.01), "truncated"),
    "truncated trailer": (no_trailer, "truncated"),
    "truncated, not compressed": (lambda p: cut(p.with_name("in.nii"), 0.9), "truncated"),
    "wrong checksum": (flipped_bit, "damaged"),
    "gzip of something else": (random_gzip, "not a NIfTI"),
    "text": (lambda p: p.with_name("a.txt").write_text("x") and p.with_name("a.txt"), "name"),
    "4-D": (lambda p: save(p, ramp((5, 4, 3, 2))), r"shape \(5, 4, 3, 2\).*3-D"),
    "2-D": (lambda p: save(p, ramp((5, 4))), r"shape \(5, 4\).*3-D"),
    "RGB": (
        lambda p: save(p, np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "real numbers",
    ),
    "complex": (lambda p: save(p, ramp().astype(np.complex64)), "real numbers"),
    "NaN": (lambda p: with_nan(p, np.nan), "1 voxels are NaN or Inf"),
    "Inf": (lambda p: with_nan(p, np.inf), "1 voxels are NaN or Inf"),
    "float32 overflow": (overflow, "27 voxels are NaN or Inf"),
    "zero affine": (lambda p: header_with_sform(p, srow_x=0, srow_y=0, srow_z=0), "singular"),
    "dependent axes": (lambda p: header_with_sform(p, srow_y=[2, 0, 0, 0]), "singular"),
    "NaN affine": (lambda p: header_with_sform(p, srow_x=np.nan), "singular"),
    "zero spacing": (
        lambda p: header_without_sform(p, pixdim=[1, 2, 0, 2, 1, 1, 1, 1]),
        "voxel size",
    ),
    "negative spacing": (
        lambda p: header_without_sform(p, pixdim=[1, 2, -2, 2, 1, 1, 1, 1]),
        "voxel size",
    ),
    "bad quaternion": (
        lambda p: header_without_sform(p, qform_code=1, quatern_b=3.0),
        "orientation",
    ),
    "bad type code": (lambda p: header_with_sform(p, datatype=9999), "header is invalid"),
    "huge dimensions": (
        lambda p: header_with_sform(p, dim=[3] + 3 * [32767] + 4 * [1]),
        "truncated",
    ),
    "zero dimension": (lambda p: header_with_sform(p, dim=[3, 0, 4, 3, 1, 1, 1, 1]), "shape"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    make, message = BAD_FILES[case]
    path = make(tmp_path / "in.nii.gz")
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "expected" in text and "\n" not in text


def test_valid_sform_excuses_an_unused_voxel_size(tmp_path: Path) -> None:
    path = header_with_sform(tmp_path / "in.nii", pixdim=[0, 2, 2, 2, 1, 1, 1, 1], qform_code=0)
    assert read_volume(path).spacing == (2, 2, 2)


def test_write_like_refuses_wrong_shape_and_non_finite(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "in.nii.gz", ramp()))
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(5, 4, 3\)"):
        write_like(volume, ramp((3, 4, 5)), tmp_path / "out.nii.gz")
    with pytest.raises(InputError, match="NaN or Inf"):
        write_like(volume, np.full((5, 4, 3), np.nan), tmp_path / "out.nii.gz")
    with pytest.raises(InputError, match="name"):
        write_like(volume, ramp(), tmp_path / "out.mha")
    assert [p.name for p in tmp_path.iterdir()] == ["in.nii.gz"]


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(image: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    old = write_volume(ramp(), np.eye(4), tmp_path / "v.nii.gz").read_bytes()
    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_volume(ramp() + 1, np.eye(4), tmp_path / "v.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["v.nii.gz"]
    assert (tmp_path / "v.nii.gz").read_bytes() == old


def test_same_grid_is_about_where_voxels_are(tmp_path: Path) -> None:
    def moved(name: str, shift: float, shape: tuple[int, ...] = (5, 4, 3)) -> object:
        affine = np.eye(4)
        affine[0, 3] = shift
        return read_volume(write_volume(ramp(shape), affine, tmp_path / name))

    first = moved("a.nii", 0)
    assert same_grid(first, moved("b.nii", 5e-4))
    assert not same_grid(first, moved("c.nii", 2e-3))
    assert not same_grid(first, moved("d.nii", 0, (5, 4, 4)))
