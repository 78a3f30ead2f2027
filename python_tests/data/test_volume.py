"""Reading and writing NIfTI: nothing moves, and nothing personal leaves."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import aff2axcodes
from volume_cases import SHAPE, SPACING, patched, ras_affine, save, voxels

from petite_fast.data import Volume, read_volume, write_like, write_volume
from petite_fast.data.volume import same_grid
from petite_fast.errors import InputError

ORIENTATIONS = [
    np.column_stack([axes, flips])
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(map(str, o.ravel())))
def test_round_trip_of_every_flip_and_permutation(tmp_path: Path, orientation: np.ndarray) -> None:
    # The file is made voxel by voxel: independent of how the reader reorders.
    file_shape = [0, 0, 0]
    for file_axis, (ras_axis, _) in enumerate(orientation):
        file_shape[file_axis] = SHAPE[ras_axis]
    ras, stored = voxels(), np.zeros(file_shape, np.float32)
    # Orientation row i: file axis i runs along RAS axis row[0], in direction row[1].
    for index in np.ndindex(*SHAPE):
        place = tuple(index[a] if sign > 0 else SHAPE[a] - 1 - index[a] for a, sign in orientation)
        stored[place] = ras[index]
    file_affine = np.zeros((4, 4))
    file_affine[3, 3] = 1
    file_affine[:3, 3] = ras_affine()[:3, 3]
    for file_axis, (a, sign) in enumerate(orientation):
        file_affine[a, file_axis] = sign * SPACING[a]
        if sign < 0:
            file_affine[a, 3] += (SHAPE[a] - 1) * SPACING[a]
    source = save(tmp_path / "in.nii.gz", stored, file_affine)

    volume = read_volume(source)
    np.testing.assert_array_equal(volume.array, ras)
    np.testing.assert_allclose(volume.affine, ras_affine(), atol=1e-5)
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)

    written = nib.load(write_like(volume, volume.array, tmp_path / "out.nii.gz"))
    original = nib.load(source)
    np.testing.assert_array_equal(written.get_fdata(), original.get_fdata())
    np.testing.assert_array_equal(written.affine, original.affine)
    assert aff2axcodes(written.affine) == aff2axcodes(original.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units", "dim", "srow_x"):
        np.testing.assert_array_equal(written.header[field], original.header[field])
    # A changed voxel comes back at the same RAS place.
    changed = volume.array.copy()
    changed[2, 0, 4] = 99
    again = read_volume(write_like(volume, changed, tmp_path / "changed.nii"))
    np.testing.assert_array_equal(again.array, changed)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", ">u2", ">i4", ">f4", ">f8", "<f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_byte_order_and_stored_type(tmp_path: Path, dtype: str, kind: type) -> None:
    stored = (np.arange(60) - (0 if np.dtype(dtype).kind == "u" else 30)).reshape(SHAPE)
    header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(np.dtype(dtype))
    nib.save(kind(stored.astype(dtype), ras_affine(), header), tmp_path / "a.nii.gz")
    if dtype.startswith(">"):
        assert nib.load(tmp_path / "a.nii.gz").header.endianness == ">"

    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array, stored)
    written = nib.load(write_like(volume, volume.array, tmp_path / "b.nii.gz"))
    assert type(written) is kind
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.get_fdata(), stored)
    np.testing.assert_allclose(written.affine, ras_affine(), atol=1e-5)


def test_scaled_integers_are_scaled_once_in_double_precision(tmp_path: Path) -> None:
    stored = np.arange(60, dtype=np.int16).reshape(SHAPE) * 500
    slope, intercept = 0.4321, -17.25
    path = save(tmp_path / "a.nii", stored)
    patched(path, 112, struct.pack("<2f", slope, intercept))
    volume = read_volume(path)
    exact = stored * float(np.float32(slope)) + intercept
    np.testing.assert_array_equal(volume.array, exact.astype(np.float32))
    again = read_volume(write_like(volume, volume.array, tmp_path / "b.nii.gz"))
    np.testing.assert_array_equal(again.array, volume.array)
    assert nib.load(tmp_path / "b.nii.gz").dataobj.slope == 1


def test_oblique_affine_and_both_forms_are_kept(tmp_path: Path) -> None:
    turn, _ = np.linalg.qr(np.array([[0.1, -1.0, 0.2], [0.9, 0.15, 0.1], [-0.1, 0.2, -1.1]]))
    oblique = np.eye(4)
    oblique[:3, :3] = turn * (-1.25, 2.0, 3.0)
    oblique[:3, 3] = (11, -22, 33)
    image = nib.Nifti1Image(voxels(), oblique)
    image.header.set_sform(oblique, code="mni")
    image.header.set_qform(ras_affine(), code="scanner")  # disagrees with the sform on purpose
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    write_like(volume, volume.array, tmp_path / "b.nii")
    before, after = (nib.load(tmp_path / name).header for name in ("a.nii", "b.nii"))
    for form in ("get_sform", "get_qform"):
        (a, code_a), (b, code_b) = (getattr(h, form)(coded=True) for h in (before, after))
        np.testing.assert_array_equal(a, b)
        assert code_a == code_b
    # Each voxel keeps its place in mm.
    place = np.argwhere(volume.array == voxels()[0, 1, 2])[0]
    np.testing.assert_allclose(
        (volume.affine @ [*place, 1])[:3], (oblique @ [0, 1, 2, 1])[:3], atol=1e-4
    )


def test_trailing_axes_of_one_survive(tmp_path: Path) -> None:
    save(tmp_path / "a.nii", voxels((*SHAPE, 1, 1)))
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.shape == SHAPE
    write_like(volume, volume.array, tmp_path / "b.nii")
    before, after = (nib.load(tmp_path / name) for name in ("a.nii", "b.nii"))
    assert before.shape == after.shape
    np.testing.assert_array_equal(before.get_fdata(), after.get_fdata())


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 1e-3), ("mm", 1.0)])
def test_units_other_than_mm(tmp_path: Path, unit: str, factor: float) -> None:
    image = nib.Nifti1Image(voxels(), ras_affine())
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.spacing, np.multiply(SPACING, factor))
    written = nib.load(write_like(volume, volume.array, tmp_path / "b.nii"))
    assert written.header.get_xyzt_units()[0] == unit
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "a.nii").affine)


def test_free_text_does_not_leave(tmp_path: Path) -> None:
    secret = b"DOE^JANE 1950"
    image = nib.Nifti1Image(voxels(), ras_affine())
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = secret
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secret))
    nib.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes().count(secret) == 5
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.array, voxels())  # the extension shifts the voxels
    write_like(volume, volume.array, tmp_path / "b.nii")
    content = (tmp_path / "b.nii").read_bytes()
    assert b"DOE" not in content
    assert len(nib.load(tmp_path / "b.nii").header.extensions) == 0


def test_compressed_output_names_no_file_and_no_time(tmp_path: Path) -> None:
    write_volume(voxels(), ras_affine(), tmp_path / "DOE.nii.gz")
    write_volume(voxels(), ras_affine(), tmp_path / "other.nii.gz")
    first, second = ((tmp_path / n).read_bytes() for n in ("DOE.nii.gz", "other.nii.gz"))
    assert first == second
    assert first[4:8] == b"\0\0\0\0"  # gzip's time stamp


def test_write_volume(tmp_path: Path) -> None:
    path = write_volume(voxels().astype(np.float64), ras_affine(), tmp_path / "new" / "a.nii.gz")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_allclose(volume.affine, ras_affine(), atol=1e-6)
    with pytest.raises(ValueError, match="2 axes"):
        write_volume(np.ones((3, 3)), np.eye(4), tmp_path / "b.nii")


# Writing leaves the old file or the complete new one


def source(tmp_path: Path) -> Volume:
    return read_volume(save(tmp_path / "source.nii.gz", voxels()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_result_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    volume, out = source(tmp_path), tmp_path / "out"
    array = volume.array.copy()
    array[0, 0, 0] = value
    with pytest.raises(InputError, match="1 voxels to write are NaN or Inf"):
        write_like(volume, array, out / "a.nii.gz")
    assert not out.exists()


def test_wrong_shape_or_name_is_not_written(tmp_path: Path) -> None:
    volume, out = source(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"shape \(5, 4, 3\), wanted \(3, 4, 5\)"):
        write_like(volume, volume.array.T, out / "a.nii.gz")
    with pytest.raises(InputError, match="not a NIfTI file name"):
        write_like(volume, volume.array, out / "a.mgz")
    assert not out.exists()


def test_crash_while_writing_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = source(tmp_path)
    path = write_like(volume, volume.array, tmp_path / "out" / "a.nii.gz")
    before = path.read_bytes()

    def full_disk(image: nib.Nifti1Image, name: Path) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("petite_fast.data.nifti.nib.save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_like(volume, volume.array * 2, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.nii.gz"]


def test_a_file_can_be_replaced_by_its_result(tmp_path: Path) -> None:
    volume = source(tmp_path)
    write_like(volume, volume.array * 2, volume.source)
    np.testing.assert_array_equal(read_volume(volume.source).array, voxels() * 2)


def test_same_grid(tmp_path: Path) -> None:
    def at(shape: tuple[int, int, int], affine: np.ndarray) -> Volume:
        return read_volume(save(tmp_path / "g.nii", voxels(shape), affine))

    base, moved, turned = ras_affine(), ras_affine(), ras_affine()
    first = at(SHAPE, base)
    moved[0, 3] += 5e-4
    assert same_grid(first, at(SHAPE, moved))
    moved[0, 3] += 0.01
    assert not same_grid(first, at(SHAPE, moved))
    assert not same_grid(first, at((3, 4, 6), base))
    turned[0, 2] = 1e-3  # no shift at the origin, 4e-3 mm at the far corner
    assert not same_grid(first, at(SHAPE, turned))


# Real PET


def test_real_pet_round_trip(tmp_path: Path, data_dir: Path) -> None:
    files = sorted(data_dir.glob("ibsi-sts/STS_*/PET_image.nii.gz"))[:5]
    assert files, "the data folder has no ibsi-sts volumes"
    for number, path in enumerate([*files, data_dir / "brain-fdg-template/CN_PET_TEMPLATE.nii.gz"]):
        volume, original = read_volume(path), nib.load(path)
        assert aff2axcodes(volume.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(
            volume.array, nib.as_closest_canonical(original).get_fdata(dtype=np.float32)
        )
        out = write_like(volume, volume.array, tmp_path / f"{number}.nii.gz")
        written = nib.load(out)
        np.testing.assert_array_equal(written.affine, original.affine)
        np.testing.assert_array_equal(
            written.get_fdata(dtype=np.float32), original.get_fdata(dtype=np.float32)
        )
        for field in ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x"):
            np.testing.assert_array_equal(written.header[field], original.header[field])
        again = read_volume(out)
        np.testing.assert_array_equal(again.array, volume.array)
        np.testing.assert_array_equal(again.affine, volume.affine)
