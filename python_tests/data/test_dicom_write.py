"""A derived DICOM series: same grid, new identity, nothing clipped, nobody named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import SECRET, SLICES, make_enhanced, make_series
from pydicom import dcmread
from pydicom.dataset import Dataset

from petite_fast.data import Volume, read_volume, same_grid, to_suv, write_volume
from petite_fast.data.dicom_write import write_dicom
from petite_fast.errors import InputError

IDENTIFIERS = (SECRET.encode(), b"ID-4711", b"19500102", b"ACC-0815")


def result(volume: Volume) -> np.ndarray:
    """What a network might give: other values, some negative, one slice empty."""
    array = volume.array * 1.37 - 20
    array[..., 1] = 0
    return array


def headers(folder: Path) -> list[Dataset]:
    return [dcmread(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("enhanced", [False, True])
def test_round_trip(tmp_path: Path, frames: int, enhanced: bool) -> None:
    path = tmp_path / "in" / "a.dcm"
    made = make_enhanced(path, frames) if enhanced else make_series(tmp_path / "in", frames=frames)
    volume = read_volume(made)
    array = result(volume)
    again = read_volume(write_dicom(volume, array, tmp_path / "out"))
    assert same_grid(again, volume, 0) and again.units == volume.units
    assert again.timing == volume.timing and again.tracer == volume.tracer
    for ds in headers(tmp_path / "out"):
        assert ds.RescaleIntercept == 0 and ds.pixel_array.dtype == np.int16
    # each slice [X, Y] has its own range: half a step of it is the error
    step = np.abs(array).max(axis=(-3, -2)) / 32767
    assert (np.abs(again.array - array).max(axis=(-3, -2)) <= step * 0.501 + 1e-6).all()


def test_suv_of_the_result_is_that_of_its_values(tmp_path: Path) -> None:
    volume = read_volume(make_series(tmp_path / "in"))
    again = read_volume(write_dicom(volume, volume.array * 2, tmp_path / "out"))
    np.testing.assert_allclose(to_suv(again).array, 2 * to_suv(volume).array, rtol=1e-3, atol=1e-3)
    suv = to_suv(volume)
    stored = read_volume(write_dicom(suv, suv.array, tmp_path / "suv"))
    assert stored.units == "SUVbw"
    np.testing.assert_allclose(stored.array, suv.array, atol=suv.array.max() / 60000)


def test_identity_and_references(tmp_path: Path) -> None:
    source = make_series(tmp_path / "in")
    volume = read_volume(source)
    write_dicom(volume, volume.array, tmp_path / "out")
    originals = {ds.SOPInstanceUID: ds for ds in headers(source)}
    derived = headers(tmp_path / "out")
    assert len(derived) == SLICES
    assert len({ds.SOPInstanceUID for ds in derived} - set(originals)) == SLICES
    assert len({ds.SeriesInstanceUID for ds in derived}) == 1
    assert len({ds.StudyInstanceUID for ds in derived}) == 1
    for ds in derived:
        assert ds.SeriesInstanceUID != "1.2.3.4" and ds.StudyInstanceUID != "1.2.3"
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.ImageType[0] == "DERIVED" and ds.FrameOfReferenceUID == "1.2.3.5"
        reference = originals.pop(ds.SourceImageSequence[0].ReferencedSOPInstanceUID)
        assert reference.ImagePositionPatient == ds.ImagePositionPatient
        assert reference.SOPClassUID == ds.SourceImageSequence[0].ReferencedSOPClassUID
        assert ds.SeriesTime == reference.SeriesTime  # decay correction refers to it
    assert not originals


def test_nobody_is_named_unless_asked_for(tmp_path: Path) -> None:
    def plant(ds: Dataset, n: int) -> None:
        ds.SeriesDescription = ds.ImageComments = f"for {SECRET}"
        ds.private_block(0x0011, "MADE UP", create=True).add_new(1, "LO", SECRET)
        ds.RadiopharmaceuticalInformationSequence[0].Radiopharmaceutical = SECRET

    source = make_series(tmp_path / "in", plant)
    volume = read_volume(source)
    write_dicom(volume, volume.array, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert not [i for i in IDENTIFIERS if i in content or i in path.name.encode()]
    write_dicom(volume, volume.array, tmp_path / "kept", keep_ids=True)
    for ds in headers(tmp_path / "kept"):
        assert (ds.PatientName, ds.PatientID, ds.StudyInstanceUID) == (SECRET, "ID-4711", "1.2.3")
        assert "ImageComments" not in ds and "SeriesDescription" in ds
        assert SECRET not in str(ds.SeriesDescription)


def test_philips_factor_is_kept(tmp_path: Path) -> None:
    def counts(ds: Dataset, n: int) -> None:
        ds.Units = "CNTS"
        block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(0x00, "DS", "0.0025")

    volume = read_volume(make_series(tmp_path / "in", counts))
    again = read_volume(write_dicom(volume, volume.array, tmp_path / "out"))
    np.testing.assert_allclose(to_suv(again).array, to_suv(volume).array, rtol=1e-3)


def test_refused(tmp_path: Path) -> None:
    volume = read_volume(make_series(tmp_path / "in"))
    with pytest.raises(ValueError, match="wanted"):
        write_dicom(volume, volume.array[1:], tmp_path / "out")
    broken = volume.array.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 voxels are NaN"):
        write_dicom(volume, broken, tmp_path / "out")
    nifti = read_volume(write_volume(volume.array, np.eye(4), tmp_path / "a.nii"))
    with pytest.raises(InputError, match="not a DICOM series"):
        write_dicom(nifti, nifti.array, tmp_path / "out")
    with pytest.raises(InputError, match="something already"):
        write_dicom(volume, volume.array, tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = read_volume(make_series(tmp_path / "in"))
    calls = []
    original: Callable = Dataset.save_as

    def save(self: Dataset, *args: object, **keywords: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on device")
        original(self, *args, **keywords)

    monkeypatch.setattr(Dataset, "save_as", save)
    with pytest.raises(OSError, match="no space"):
        write_dicom(volume, volume.array, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_whole_body_series(tmp_path: Path, test_data: Path) -> None:
    volume = read_volume(test_data / "wholebody-dicom")
    array = volume.array * 0.5 - 20
    again = read_volume(write_dicom(volume, array, tmp_path / "out"))
    assert same_grid(again, volume) and again.tracer == volume.tracer
    assert np.abs(again.array - array).max() <= array.max() / 32767 * 0.501
