"""Write a result as a DICOM series derived from the one it was computed from."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, ornt_transform
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from petite_fast._version import __version__
from petite_fast.data.damage import damaged_is_input_error
from petite_fast.data.dicom import Series, Slice
from petite_fast.data.dicom_header import GE_PRIVATE, PHILIPS_PRIVATE, suv_factor
from petite_fast.data.lazy import Volume, require_finite
from petite_fast.data.nifti import CANONICAL
from petite_fast.errors import InputError

# What a derived slice takes over from its source. Everything else is left behind: descriptions,
# comments, protocol names and private elements are free text that may identify a patient.
_KEPT = (
    "StudyDate SeriesDate AcquisitionDate StudyTime SeriesTime AcquisitionTime Manufacturer "
    "ManufacturerModelName PatientSex PatientAge PatientSize PatientWeight PatientPosition "
    "FrameOfReferenceUID PositionReferenceIndicator SliceThickness CorrectedImage CollimatorType "
    "DecayCorrection DecayCorrectionDateTime DecayCorrected ReconstructionMethod "
    "AttenuationCorrectionMethod ScatterCorrectionMethod RandomsCorrectionMethod CountsSource "
    "NumberOfSlices NumberOfTimeSlices ActualFrameDuration FrameReferenceTime DecayFactor "
    "SeriesType LossyImageCompression TimezoneOffsetFromUTC"
).split()
_KEPT_OF_INJECTION = (
    "RadiopharmaceuticalStartTime RadiopharmaceuticalStartDateTime RadiopharmaceuticalStopTime "
    "RadiopharmaceuticalVolume RadionuclideTotalDose RadionuclideHalfLife "
    "RadionuclidePositronFraction"
).split()
_CODES_OF_INJECTION = ("RadionuclideCodeSequence", "RadiopharmaceuticalCodeSequence")
_IDENTITY = (
    "PatientName PatientID IssuerOfPatientID PatientBirthDate AccessionNumber StudyID "
    "ReferringPhysicianName StudyInstanceUID"
).split()
_UNITS = {"Bq/mL": "BQML", "SUVbw": "GML", "SUVlbm": "GML", "SUVbsa": "CM2ML", "counts": "CNTS"}
_SUV_TYPES = {"SUVbw": "BW", "SUVlbm": "LBM", "SUVbsa": "BSA"}
_MOST = 32767  # 16-bit signed, because a network's output may be negative


def write_dicom(
    volume: Volume,
    array: np.ndarray,
    folder: str | os.PathLike[str],
    *,
    keep_ids: bool = False,
) -> Path:
    """Write `array` as a derived PET series, one file per slice, on the slices of `volume`.

    Each slice is 16-bit with a rescale of its own, slope = max |value| / 32767 and intercept 0 (as
    PS3.3 C.8.9.4 asks of PET): nothing is clipped, and the error is at most half a slope. Series
    and instances get new UIDs; each instance names its source slice (SourceImageSequence); frame of
    reference, geometry, units, times and injection are kept, so SUV can be computed as before.

    Args:
        volume: read from DICOM; its ``units`` are those of `array`.
        array: the axes and shape of ``volume.array``.
        folder: must not hold anything yet; it appears only when complete.
        keep_ids: keep name, ID, birth date, accession number and study, so that an archive files
            the series with its source. Otherwise they are empty, and the study's UID is new.

    Returns:
        `folder`.

    Raises:
        ValueError: `array` has another shape than the volume.
        InputError: `volume` does not come from DICOM slices, has no units, `array` holds NaN or
            Inf, or `folder` is not empty.
        OSError: a file cannot be written; nothing is left behind.
    """
    target, series = Path(folder), volume.dicom
    if array.shape != volume.shape:
        raise ValueError(f"array has shape {array.shape}, wanted {volume.shape}")
    if series is None:
        raise InputError(f"{volume.source}: not a DICOM series; expected one to derive from")
    if volume.units not in _UNITS:
        raise InputError(
            f"{volume.source}: its units are not given; expected Bq/mL, SUV or counts for DICOM"
        )
    require_finite(array, target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: there is something already; expected a new or empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(4)}-{target.name}")
    temporary.mkdir()
    try:
        _write_slices(volume, series, array, temporary, keep_ids)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_slices(
    volume: Volume, series: Series, array: np.ndarray, folder: Path, keep_ids: bool
) -> None:
    back = ornt_transform(CANONICAL, volume.orientation)
    frames = array if array.ndim == 4 else array[None]
    uids = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    step_mm = float(np.linalg.norm(volume.header.get_best_affine()[:3, 2]))
    now, instance = datetime.now(), 0
    for slices, frame in zip(series.slices, frames, strict=True):
        on_file_axes = apply_orientation(frame, back)  # [column, row, slice]
        for k, source in enumerate(slices):
            instance += 1
            with damaged_is_input_error(source.path, "a complete DICOM file"):
                original = dcmread(source.path, stop_before_pixels=True)
            ds = _derived(original, source, uids, keep_ids, now)
            ds.InstanceNumber = ds.ImageIndex = instance
            _set_place_and_time(ds, series, source, step_mm)
            _set_units(ds, original, volume.units or "")
            _set_pixels(ds, on_file_axes[:, :, k].T)
            ds.save_as(folder / f"{instance:06d}.dcm", enforce_file_format=True)


def _derived(
    original: Dataset, source: Slice, uids: Mapping[str, str], keep_ids: bool, now: datetime
) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    _copy(original, ds, _KEPT)
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyID"):
        setattr(ds, keyword, "")
    ds.ReferringPhysicianName = ""
    ds.StudyInstanceUID = uids["StudyInstanceUID"]
    if keep_ids:
        _copy(original, ds, (*_IDENTITY, "SpecificCharacterSet", "PatientIdentityRemoved"))
    else:
        ds.PatientIdentityRemoved = "YES"
        ds.DeidentificationMethod = "Only geometry, units, times and injection were copied"
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID = uids["SeriesInstanceUID"]
    ds.SeriesNumber = int(original.get("SeriesNumber") or 0) + 1000
    ds.Modality = "PT"
    ds.SeriesDescription = "petite_fast, derived"
    ds.SoftwareVersions = f"petite_fast {__version__}"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.DerivationDescription = "Standard scan estimated from a short scan by a neural network"
    # SeriesDate and SeriesTime stay the source's: decay correction (START) refers to them.
    ds.ContentDate = ds.InstanceCreationDate = now.strftime("%Y%m%d")
    ds.ContentTime = ds.InstanceCreationTime = now.strftime("%H%M%S")
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.class_uid
    reference.ReferencedSOPInstanceUID = source.uid
    if source.index is not None:
        reference.ReferencedFrameNumber = source.index + 1
    ds.SourceImageSequence = [reference]
    injections = []
    for item in original.get("RadiopharmaceuticalInformationSequence") or ():
        kept = Dataset()
        _copy(item, kept, _KEPT_OF_INJECTION)
        for keyword in _CODES_OF_INJECTION:
            codes = [_code(code) for code in item.get(keyword) or ()]
            setattr(kept, keyword, codes)
        injections.append(kept)
    ds.RadiopharmaceuticalInformationSequence = injections
    _copy_private(original, ds)
    return ds


def _copy(source: Dataset, target: Dataset, keywords: tuple[str, ...] | list[str]) -> None:
    for keyword in keywords:
        if keyword in source:
            target[keyword] = source[keyword]


def _code(source: Dataset) -> Dataset:
    code = Dataset()
    _copy(source, code, ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"))
    return code


def _copy_private(original: Dataset, ds: Dataset) -> None:
    """GE's scan time, without which a later SeriesTime cannot be told from the scan's."""
    try:
        element = original.private_block(*GE_PRIVATE)[0x0D]
    except KeyError:
        return
    ds.private_block(*GE_PRIVATE, create=True).add_new(0x0D, "DT", element.value)


def _set_place_and_time(ds: Dataset, series: Series, source: Slice, step_mm: float) -> None:
    ds.PixelSpacing = [_decimal(v) for v in series.grid[:2]]
    ds.ImageOrientationPatient = [_decimal(v) for v in series.grid[2:]]
    ds.ImagePositionPatient = [_decimal(v) for v in source.position]
    ds.SliceThickness = ds.get("SliceThickness") or _decimal(step_mm)
    times = source.times
    if source.index is not None:  # an enhanced object has them elsewhere
        if times.duration_s is not None:
            ds.ActualFrameDuration = round(times.duration_s * 1000)
        if times.clock_s is not None:
            days, seconds = divmod(times.clock_s, 86400)
            moment = datetime.fromordinal(int(days)) + timedelta(seconds=seconds)
            ds.AcquisitionDate = moment.strftime("%Y%m%d")
            ds.AcquisitionTime = moment.strftime("%H%M%S.%f")


def _set_units(ds: Dataset, original: Dataset, units: str) -> None:
    ds.Units = _UNITS[units]
    if units in _SUV_TYPES:
        ds.SUVType = _SUV_TYPES[units]
    factor = suv_factor(original)
    if units == "counts" and factor is not None:
        ds.private_block(*PHILIPS_PRIVATE, create=True).add_new(0x00, "DS", _decimal(factor))


def _set_pixels(ds: Dataset, values: np.ndarray) -> None:
    """Store [rows, columns] values; the slope is taken as it can be written, in 16 characters."""
    peak = float(abs(values).max())
    slope = _decimal(peak / _MOST if peak > 0 else 1.0)
    if float(slope) * _MOST < peak:  # rounded down: the peak would not fit
        slope = _decimal(float(slope) * (1 + 1e-9))
    stored = np.rint(values.astype(np.float64) / float(slope))
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = slope, 0
    ds.PixelData = np.clip(stored, -_MOST, _MOST).astype("<i2").tobytes()


def _decimal(value: float) -> DSfloat:
    return DSfloat(float(value), auto_format=True)
