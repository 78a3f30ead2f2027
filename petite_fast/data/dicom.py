"""PET series in DICOM: folders of slices, multi-frame files; headers first, pixels on demand."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder, iter_pixels

from petite_fast.data.damage import damaged_is_input_error
from petite_fast.data.dicom_geometry import sort_slices
from petite_fast.data.dicom_header import (
    FrameTimes,
    activity_factor,
    clock,
    modality,
    number,
    require_pet,
    suv_factor,
    timing_and_tracer,
    ucum_units,
    units_of,
)
from petite_fast.data.lazy import Volume, require_finite
from petite_fast.data.nifti import canonical_grid, grid_header
from petite_fast.errors import InputError

_EXPECTED = "a complete DICOM file"
_DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Must be the same in all slices; the words of the error.
_COMMON = (
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
    "Units",
    "SUVType",
    "DecayCorrection",
    "PatientWeight",
    "PatientID",
    "FrameOfReferenceUID",
)


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice: where it lies in space, in time and on disk.

    Attributes:
        path: the file.
        index: frame number in a multi-frame file, else None.
        uid: SOPInstanceUID; class_uid: SOPClassUID.
        position: ImagePositionPatient, mm (LPS).
        slope, intercept: of the rescale to the units of the volume.
        times: when it was taken.
    """

    path: str
    index: int | None
    uid: str
    class_uid: str
    position: tuple[float, float, float]
    slope: float
    intercept: float
    times: FrameTimes


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of a volume.

    Attributes:
        source: the folder or file.
        slices: ``slices[t][k]`` is slice k of frame t, in order along the normal.
        rows, columns: pixels of a slice.
        orientation: 3x2, nibabel orientation of (column, row, slice).
        grid: PixelSpacing, then ImageOrientationPatient, as stored.
    """

    source: Path
    slices: tuple[tuple[Slice, ...], ...]
    rows: int
    columns: int
    orientation: np.ndarray
    grid: tuple[float, ...]

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield frames float32 [X, Y, Z], decoded slice by slice."""
        for t in indices:
            frame = np.empty((self.columns, self.rows, len(self.slices[t])), np.float32)
            k = 0
            for path, group in groupby(self.slices[t], key=lambda s: s.path):
                for s, stored in _decoded(Path(path), list(group)):
                    if stored.shape != (self.rows, self.columns):
                        raise InputError(
                            f"{path}: a slice of {stored.shape} pixels; expected"
                            f" {(self.rows, self.columns)}"
                        )
                    with np.errstate(over="ignore", invalid="ignore"):
                        frame[:, :, k] = stored.T.astype(np.float64) * s.slope + s.intercept
                    k += 1
            require_finite(frame, self.source)
            yield np.ascontiguousarray(apply_orientation(frame, self.orientation))


def _decoded(path: Path, slices: list[Slice]) -> list[tuple[Slice, np.ndarray]]:
    indices = None if slices[0].index is None else [s.index for s in slices if s.index is not None]
    with damaged_is_input_error(path, _EXPECTED):
        return list(zip(slices, iter_pixels(path, indices=indices), strict=True))


def read_dicom(source: Path) -> Volume:
    """Headers of the PET series in folder `source` (not in folders below), or of one file.

    Files that are not DICOM, and DICOM objects without an image, are passed over.

    Raises:
        InputError: see `petite_fast.data.volume.read_volume`.
    """
    first: Dataset | None = None
    slices: list[Slice] = []
    grid = None
    counts: Counter[tuple[str, str]] = Counter()
    for path in _files(source):
        with damaged_is_input_error(path, _EXPECTED):
            ds = dcmread(path, stop_before_pixels=True)
            if "Rows" not in ds:
                continue
            counts[str(ds.get("SeriesInstanceUID", "")), modality(ds)] += 1
            if len(counts) > 1:
                continue  # only counted, for the error
            if first is None:
                require_pet(ds, source)
                first = ds
            _require_decoder(ds, path)
            found, place = _slices_of(ds, path)
            grid = place if grid is None else grid
            _require_common(first, ds, grid, place, path)
            slices += found
    if first is None or grid is None:
        raise InputError(f"{source}: no DICOM image in this folder; expected one PET series")
    if len(counts) > 1:
        listed = ", ".join(f"{kind} with {n} files" for (_, kind), n in counts.items())
        raise InputError(f"{source}: {len(counts)} series ({listed}); expected one")
    return _volume(source, first, slices, grid)


def patient_and_scanner(series: Series) -> tuple[str, str]:
    """PatientID of a series, "" without one, and manufacturer with model, else "unknown".

    The ID tells whether two series are of one patient; it must not be written anywhere.
    """
    path = Path(series.slices[0][0].path)
    tags = ["PatientID", "Manufacturer", "ManufacturerModelName"]
    with damaged_is_input_error(path, _EXPECTED):
        ds = dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        patient, *names = (str(ds.get(tag) or "").strip() for tag in tags)
    return patient, " ".join(filter(None, names)) or "unknown"


def _volume(source: Path, ds: Dataset, slices: list[Slice], grid: tuple[float, ...]) -> Volume:
    with damaged_is_input_error(source, _EXPECTED):
        kinds = [str(k) for k in ds.get("SeriesType") or ()]
        if "GATED" in kinds or "REPROJECTION" in kinds:
            raise InputError(f"{source}: a gated or reprojected series; expected slices over time")
        thickness = number(ds, "SliceThickness")
        frames, affine = sort_slices(slices, grid[2:], grid[:2], thickness, source)
        stated = number(ds, "NumberOfSlices")
        if stated is not None and stated > len(frames[0]):
            raise InputError(
                f"{source}: {len(frames[0])} slices; expected the {stated:.0f} of NumberOfSlices"
            )
        affine = _LPS_TO_RAS @ affine
        timing, tracer = timing_and_tracer(ds, [[s.times for s in frame] for frame in frames])
        units = _mapped_units(ds) or units_of(ds)
        rows, columns = int(ds.Rows), int(ds.Columns)
    shape = (columns, rows, len(frames[0]))
    orientation, canonical, spatial = canonical_grid(affine, shape, source)
    series = Series(source, frames, rows, columns, orientation, grid)
    return Volume(
        spatial if len(frames) == 1 else (len(frames), *spatial),
        canonical,
        source,
        series,
        grid_header(shape if len(frames) == 1 else (*shape, len(frames)), affine),
        orientation,
        units,
        timing,
        tracer,
        series,
    )


def _files(source: Path) -> Iterator[Path]:
    """DICOM files, by name; what is named like one and is none is refused."""
    if not source.is_dir():
        paths = [source]
    else:
        with os.scandir(source) as entries:
            paths = sorted(
                Path(e.path) for e in entries if e.is_file() and not e.name.startswith(".")
            )
    for path in paths:
        with path.open("rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                yield path
            elif path.name.lower().endswith(_DICOM_SUFFIXES):
                raise InputError(f"{path}: not a DICOM file; expected one with DICM at byte 128")


def _require_decoder(ds: Dataset, path: Path) -> None:
    """Refuse pixels that cannot be decoded here, and files too short for what they announce."""
    syntax = ds.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise InputError(
            f"{path}: the transfer syntax is unknown or holds no image;"
            " expected an uncompressed one"
        ) from None
    if not decoder.is_available:
        ways = [w.split("requires ", 1)[-1] for w in decoder.missing_dependencies]
        raise InputError(
            f"{path}: pixels are compressed ({syntax.name}) and no decoder is installed; expected"
            f" one of these packages: {'; or '.join(reversed(ways))}"
        )
    frames = int(ds.get("NumberOfFrames") or 1)
    if int(ds.get("SamplesPerPixel", 1)) != 1 or min(ds.Rows, ds.Columns, frames) < 1:
        raise InputError(f"{path}: a colour or empty image; expected one value per pixel")
    needed = int(ds.Rows) * int(ds.Columns) * frames * int(ds.BitsAllocated) // 8
    size = path.stat().st_size
    if not (syntax.is_encapsulated or syntax.is_deflated) and size < needed:
        raise InputError(f"{path}: the file is truncated, {size} bytes; expected over {needed}")


def _require_common(
    first: Dataset, ds: Dataset, grid: tuple[float, ...], place: tuple[float, ...], path: Path
) -> None:
    differing = [k for k in _COMMON if first.get(k) != ds.get(k)]
    if suv_factor(first) != suv_factor(ds):
        differing.append("the SUV factor")
    if not np.allclose(grid, place, atol=1e-4):
        differing.append("PixelSpacing or ImageOrientationPatient")
    if differing:
        raise InputError(
            f"{path}: {', '.join(differing)} not as in the other slices; expected one series"
        )


def _slices_of(ds: Dataset, path: Path) -> tuple[list[Slice], tuple[float, ...]]:
    """The slices in a file, and their common (row spacing, column spacing, orientation)."""
    uid, kind = str(ds.SOPInstanceUID), str(ds.SOPClassUID)
    if "PerFrameFunctionalGroupsSequence" not in ds:
        if int(ds.get("NumberOfFrames") or 1) > 1:
            raise InputError(
                f"{path}: several frames without functional groups; expected slices, or an"
                " enhanced multi-frame image"
            )
        slope, intercept = number(ds, "RescaleSlope"), number(ds, "RescaleIntercept") or 0.0
        if slope is None:
            raise InputError(f"{path}: no RescaleSlope; expected one in each PET slice")
        factor = activity_factor(ds) or 1.0
        times = FrameTimes(
            clock(ds, "Acquisition"),
            _seconds(ds, "ActualFrameDuration"),
            _seconds(ds, "FrameReferenceTime"),
        )
        position = _vector(ds.ImagePositionPatient, 3)
        grid = (*_vector(ds.PixelSpacing, 2), *_vector(ds.ImageOrientationPatient, 6))
        one = Slice(str(path), None, uid, kind, position, slope * factor, intercept * factor, times)  # type: ignore[arg-type]
        return [one], grid
    return _enhanced_slices(ds, path, uid, kind)


def _enhanced_slices(
    ds: Dataset, path: Path, uid: str, kind: str
) -> tuple[list[Slice], tuple[float, ...]]:
    slices, grids = [], set()
    for k in range(int(ds.NumberOfFrames)):
        content = _group(ds, k, "FrameContentSequence")
        measures = _group(ds, k, "PixelMeasuresSequence")
        plane = _group(ds, k, "PlaneOrientationSequence")
        mapping = _group(ds, k, "RealWorldValueMappingSequence")
        rescale = _group(ds, k, "PixelValueTransformationSequence")
        slope = number(mapping, "RealWorldValueSlope") or number(rescale, "RescaleSlope")
        intercept = number(
            *((mapping, "RealWorldValueIntercept") if mapping else (rescale, "RescaleIntercept"))
        )
        if slope is None:
            raise InputError(f"{path}: frame {k + 1} has no rescale; expected one in each frame")
        position = _vector(_group(ds, k, "PlanePositionSequence").ImagePositionPatient, 3)
        grids.add((*_vector(measures.PixelSpacing, 2), *_vector(plane.ImageOrientationPatient, 6)))
        times = FrameTimes(
            clock(content, "FrameAcquisition"), _seconds(content, "FrameAcquisitionDuration"), None
        )
        slices.append(
            Slice(str(path), k, uid, kind, position, slope, intercept or 0.0, times)  # type: ignore[arg-type]
        )
    if len(grids) != 1:
        raise InputError(f"{path}: frames are on different grids; expected one stack")
    return slices, grids.pop()


def _group(ds: Dataset, k: int, keyword: str) -> Dataset:
    """Functional group of frame k, its own or the shared one; empty if there is none."""
    shared = ds.get("SharedFunctionalGroupsSequence") or [Dataset()]
    for groups in (ds.PerFrameFunctionalGroupsSequence[k], shared[0]):
        if groups.get(keyword):
            return groups[keyword].value[0]
    return Dataset()


def _mapped_units(ds: Dataset) -> str | None:
    if "PerFrameFunctionalGroupsSequence" not in ds:
        return None
    mapping = _group(ds, 0, "RealWorldValueMappingSequence")
    codes = mapping.get("MeasurementUnitsCodeSequence") or [Dataset()]
    return ucum_units(str(codes[0].get("CodeValue", "")))


def _seconds(ds: Dataset, keyword: str) -> float | None:
    milliseconds = number(ds, keyword)
    return None if milliseconds is None else milliseconds / 1000


def _vector(value: Any, length: int) -> tuple[float, ...]:
    vector = tuple(float(v) for v in value)
    if len(vector) != length or not np.isfinite(vector).all():
        raise ValueError("not a finite vector")
    return vector
