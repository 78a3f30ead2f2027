"""Small PET series in DICOM, made element by element."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    EnhancedPETImageStorage,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

ROWS, COLUMNS, SLICES = 5, 4, 3
SPACING = (2.5, 2.0, 3.0)  # between rows, between columns, between slices
SECRET = "DOE^JANE"

Change = Callable[[Dataset, int], Any]


def stored(k: int, frame: int = 0) -> np.ndarray:
    """Pixels [row, column] of slice k."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 7 + 100 * k + 31 * frame).astype(
        "<i2"
    )


def slope(k: int) -> float:
    return 0.5 + 0.25 * k


def item(**elements: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def header(series_uid: str = "1.2.3.4") -> FileDataset:
    """Everything that the slices of one series have in common."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.Modality, ds.SeriesInstanceUID, ds.StudyInstanceUID = "PT", series_uid, "1.2.3"
    ds.FrameOfReferenceUID = "1.2.3.5"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = SECRET, "ID-4711", "19500102"
    ds.AccessionNumber, ds.StudyDescription = "ACC-0815", f"PET of {SECRET}"
    ds.PatientWeight, ds.PatientSize, ds.PatientSex = 70, 1.75, "F"
    ds.SeriesDate = ds.AcquisitionDate = ds.StudyDate = "20240310"
    ds.SeriesTime, ds.AcquisitionTime, ds.SeriesNumber = "110000", "110000", 3
    ds.Units, ds.DecayCorrection, ds.SeriesType = "BQML", "START", ["STATIC", "IMAGE"]
    ds.CorrectedImage = ["DECY", "ATTN"]
    ds.Rows, ds.Columns, ds.NumberOfSlices = ROWS, COLUMNS, SLICES
    ds.SliceThickness = SPACING[2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RadiopharmaceuticalInformationSequence = [
        item(
            RadiopharmaceuticalStartTime="100000",
            RadionuclideTotalDose=3.5e8,
            RadionuclideHalfLife=6588,
            RadionuclideCodeSequence=[
                item(CodeValue="C-111A1", CodingSchemeDesignator="SRT", CodeMeaning="^18^Fluorine")
            ],
        )
    ]
    return ds


def make_series(
    folder: Path,
    change: Change | None = None,
    frames: int = 1,
    slices: int = SLICES,
    series_uid: str = "1.2.3.4",
) -> Path:
    """A series of axial slices, named so that the order of names is not that of space.

    Args:
        change: called as change(dataset, number), number = frame * slices + slice, before writing;
            a slice for which it returns False is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(frames):
        for k in range(slices):
            ds = header(series_uid)
            ds.file_meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
            ds.SOPClassUID, ds.SOPInstanceUID = (
                PositronEmissionTomographyImageStorage,
                generate_uid(),
            )
            ds.PixelSpacing = list(SPACING[:2])
            ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            ds.ImagePositionPatient = [-10, -20, 30 + SPACING[2] * k]
            ds.RescaleSlope, ds.RescaleIntercept = slope(k), 0
            ds.AcquisitionTime = f"{110000 + 500 * t}"
            ds.ActualFrameDuration, ds.FrameReferenceTime = 300_000, 300_000.0 * t + 149_000
            ds.PixelData = stored(k, t).tobytes()
            if change is not None and change(ds, t * slices + k) is False:
                continue
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.save_as(folder / f"{t}-{(k * 7) % 10}.dcm", enforce_file_format=True)
    return folder


def make_enhanced(path: Path, frames: int = 1) -> Path:
    """One enhanced multi-frame file; frames of the file run through space first, backwards."""
    ds = header()
    del ds.Units, ds.DecayCorrection, ds.SeriesType, ds.NumberOfSlices
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = EnhancedPETImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.DecayCorrected, ds.DecayCorrectionDateTime = "YES", "20240310110000"
    units = item(CodeValue="Bq/ml", CodingSchemeDesignator="UCUM", CodeMeaning="Bq/ml")
    ds.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=list(SPACING[:2]), SliceThickness=3)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        )
    ]
    groups, pixels = [], []
    for t in range(frames):
        for k in reversed(range(SLICES)):
            mapping = item(
                RealWorldValueSlope=slope(k),
                RealWorldValueIntercept=0.0,
                MeasurementUnitsCodeSequence=[units],
            )
            content = item(
                FrameAcquisitionDateTime=f"20240310{110000 + 500 * t}",
                FrameAcquisitionDuration=300_000.0,
            )
            position = item(ImagePositionPatient=[-10, -20, 30 + SPACING[2] * k])
            groups.append(
                item(
                    FrameContentSequence=[content],
                    PlanePositionSequence=[position],
                    RealWorldValueMappingSequence=[mapping],
                )
            )
            pixels.append(stored(k, t))
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.NumberOfFrames, ds.PixelData = len(pixels), np.stack(pixels).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def expected(frames: int = 1) -> np.ndarray:
    """Voxels [T, X, Y, Z] of both: columns run to the patient's left, rows to posterior."""
    array = np.zeros((frames, COLUMNS, ROWS, SLICES), np.float32)
    for t in range(frames):
        for k in range(SLICES):
            array[t, :, :, k] = (stored(k, t) * slope(k)).T[::-1, ::-1]
    return array
