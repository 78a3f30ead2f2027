"""DICOM series in: order in space and time, rescale, units; and what is refused."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import (
    COLUMNS,
    ROWS,
    SECRET,
    SLICES,
    SPACING,
    expected,
    item,
    make_enhanced,
    make_series,
)
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLossless, RLELossless

from petite_fast.data import read_volume, same_grid, write_like
from petite_fast.errors import InputError


def refused(path: Path, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path).array  # noqa: B018
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message and "expected" in message
    for word in words:
        assert word in message, message
    return message


def test_slices_are_sorted_by_geometry_and_rescaled_one_by_one(tmp_path: Path) -> None:
    volume = read_volume(make_series(tmp_path / "s"))
    assert volume.shape == (COLUMNS, ROWS, SLICES)
    assert volume.units == "Bq/mL"
    np.testing.assert_array_equal(volume.array, expected()[0])
    np.testing.assert_allclose(volume.spacing, (SPACING[1], SPACING[0], SPACING[2]))
    # the first stored pixel of the first slice lies at ImagePositionPatient, in LPS
    corner = volume.affine @ [COLUMNS - 1, ROWS - 1, 0, 1]
    np.testing.assert_allclose(corner[:3], (10, 20, 30))
    assert volume.timing is not None and volume.timing.duration_s == (300.0,)


def test_sagittal_series_with_falling_positions(tmp_path: Path) -> None:
    def sagittal(ds: Dataset, n: int) -> None:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        ds.ImagePositionPatient = [50 - 3 * n, 7, 8]

    volume = read_volume(make_series(tmp_path / "s", sagittal))
    assert volume.shape == (SLICES, COLUMNS, ROWS)
    lps = volume.affine @ [SLICES - 1, COLUMNS - 1, ROWS - 1, 1] * [-1, -1, 1, 1]
    place = np.argwhere(volume.array == 200 * 1.0)[0]  # first pixel of slice 2, at (44, 7, 8)
    np.testing.assert_allclose((volume.affine @ [*place, 1])[:3] * [-1, -1, 1], (44, 7, 8))
    assert lps[2] == pytest.approx(8)


def test_dynamic_series(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s", frames=3)
    volume = read_volume(folder)
    assert volume.shape == (3, COLUMNS, ROWS, SLICES)
    np.testing.assert_array_equal(volume.array, expected(3))
    assert volume.timing is not None
    assert volume.timing.start_s == (0, 300, 600) and volume.timing.reference_s == (0, 0, 0)
    np.testing.assert_array_equal(next(volume.frames([2])), expected(3)[2])
    again = read_volume(write_like(volume, volume.array, tmp_path / "s.nii.gz"))
    np.testing.assert_array_equal(again.array, volume.array)
    assert same_grid(again, volume)


@pytest.mark.parametrize("frames", [1, 2])
def test_enhanced_multi_frame(tmp_path: Path, frames: int) -> None:
    volume = read_volume(make_enhanced(tmp_path / "s" / "one.dcm", frames))
    np.testing.assert_array_equal(volume.array.reshape(expected(frames).shape), expected(frames))
    assert volume.units == "Bq/mL" and volume.tracer is not None
    assert volume.tracer.elapsed_s == (3600.0,) * frames
    assert same_grid(volume, read_volume(make_series(tmp_path / "c", frames=frames)))


def test_other_files_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    (folder / "readme.txt").write_text("hello")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "below").mkdir()
    report = dcmread(folder / "0-0.dcm")
    for keyword in ("Rows", "Columns", "PixelData"):
        del report[keyword]
    report.SeriesInstanceUID, report.Modality = "1.2.9", "SR"
    report.save_as(folder / "report.dcm")
    np.testing.assert_array_equal(read_volume(folder).array, expected()[0])


def test_compressed_with_a_decoder(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    for path in folder.iterdir():
        ds = dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    np.testing.assert_array_equal(read_volume(folder).array, expected()[0])


def test_order_of_files_does_not_matter(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s", frames=2)
    before = read_volume(folder).array
    names = sorted(folder.iterdir())
    for n, path in enumerate(random.Random(1).sample(names, len(names))):
        path.rename(folder / f"x{n}")  # a name without an ending is common
    np.testing.assert_array_equal(read_volume(folder).array, before)


# What is refused


def test_compressed_without_a_decoder_names_the_package(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    for path in folder.iterdir():
        ds = dcmread(path)
        ds.compress(RLELossless)
        ds.file_meta.TransferSyntaxUID = JPEGLossless
        ds.save_as(path)
    refused(folder, "compressed", "pylibjpeg-libjpeg")


def test_mixed_series(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    make_series(tmp_path / "other", series_uid="1.2.3.99")
    for path in (tmp_path / "other").iterdir():
        shutil.copy(path, folder / f"b{path.name}")
    refused(folder, "2 series", "PT with 3 files")


def test_missing_slice(tmp_path: Path) -> None:
    def keep(ds: Dataset, n: int) -> bool:
        ds.NumberOfSlices = 6
        return n != 2

    gap = make_series(tmp_path / "gap", keep, slices=6)
    refused(gap, "a slice is missing", "6 mm", "slices 2 and 3")
    end = make_series(tmp_path / "end", lambda ds, n: n != SLICES - 1)
    refused(end, "2 slices", "3 of NumberOfSlices")
    frame = make_series(tmp_path / "frame", lambda ds, n: n != 4, frames=2)
    refused(frame, "1 to 2 slices per position")


def test_slice_that_is_there_twice(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    shutil.copy(folder / "0-0.dcm", folder / "copy.dcm")
    refused(folder, "per position", "twice")
    for path in sorted(folder.glob("0-*")):
        shutil.copy(path, folder / f"copy-{path.name}")
    (folder / "copy.dcm").unlink()
    refused(folder, "same time", "without duplicates")


def test_frames_of_several_beds(tmp_path: Path) -> None:
    def beds(ds: Dataset, n: int) -> None:
        ds.AcquisitionTime = f"{110000 + 100 * n}"

    refused(make_series(tmp_path / "s", beds, frames=2), "frame 1", "different times")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Modality": "CT"}, ["modality CT"]),
        ({"CollimatorType": "PARA"}, ["SPECT"]),
        (
            {
                "EnergyWindowRangeSequence": [
                    item(EnergyWindowLowerLimit=187, EnergyWindowUpperLimit=229)
                ]
            },
            ["SPECT"],
        ),
        ({"SamplesPerPixel": 3}, ["colour"]),
        ({"SeriesType": ["GATED", "IMAGE"]}, ["gated"]),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, ["right angles"]),
        ({"PixelSpacing": [0, 2]}, ["PixelSpacing"]),
        ({"RescaleSlope": None}, ["RescaleSlope"]),
        ({"Rows": 500}, ["truncated"]),
    ],
)
def test_header_that_cannot_be_used(tmp_path: Path, changes: dict, words: list[str]) -> None:
    def change(ds: Dataset, n: int) -> None:
        for keyword, value in changes.items():
            setattr(ds, keyword, value)

    refused(make_series(tmp_path / "s", change), *words)


def test_spect_nuclide_stored_as_pt(tmp_path: Path) -> None:
    def lutetium(ds: Dataset, n: int) -> None:
        code = ds.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence[0]
        code.CodeMeaning = "^177^Lutetium"

    refused(make_series(tmp_path / "s", lutetium), "SPECT", "nuclide")


def test_slices_of_two_patients(tmp_path: Path) -> None:
    def change(ds: Dataset, n: int) -> None:
        ds.PatientID = f"ID-{n}"

    message = refused(make_series(tmp_path / "s", change), "PatientID", "one series")
    assert "ID-1" not in message


def test_uneven_and_crooked_stacks(tmp_path: Path) -> None:
    def crooked(ds: Dataset, n: int) -> None:
        ds.ImagePositionPatient = [-10 + 2 * (n == 1), -20, 3 * n]

    refused(make_series(tmp_path / "s", crooked), "straight line")


def test_damaged_slices(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    whole = (folder / "0-0.dcm").read_bytes()
    (folder / "0-0.dcm").write_bytes(whole[:-10])
    refused(folder, "damaged")
    (folder / "0-0.dcm").write_bytes(b"<html></html>")
    refused(folder, "0-0.dcm", "not a DICOM file")
    (folder / "0-0.dcm").write_bytes(b"")
    refused(folder, "not a DICOM file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no DICOM image")


def test_memory_is_one_frame_however_long_the_series(tmp_path: Path) -> None:
    """Stands for a folder larger than memory: headers first, then one slice at a time."""
    side, frames = 192, 12

    def large(ds: Dataset, n: int) -> None:
        ds.Rows = ds.Columns = side
        ds.PixelData = np.full((side, side), n, "<i2").tobytes()

    folder = make_series(tmp_path / "s", large, frames=frames, slices=3)
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    frame = side * side * 3 * 4
    tracemalloc.start()
    volume = read_volume(folder)
    after_headers = tracemalloc.get_traced_memory()[0]
    sums = [float(f.max()) for f in volume.frames()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sums == sorted(sums) and len(sums) == frames
    assert after_headers < on_disk / 4  # no pixels were kept
    assert peak - after_headers < 4 * frame < frames * frame / 2


# Real data


def test_whole_body_series(test_data: Path) -> None:
    volume = read_volume(test_data / "wholebody-dicom")
    assert volume.shape == (128, 128, 267) and volume.units == "Bq/mL"
    np.testing.assert_allclose(volume.spacing, (4.6875, 4.6875, 3.27), atol=1e-4)
    assert volume.dicom is not None
    slopes = {s.slope for s in volume.dicom.slices[0]}
    assert len(slopes) == 267
    assert volume.timing is not None and volume.timing.duration_s == (240.0,)
