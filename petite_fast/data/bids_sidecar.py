"""What the JSON sidecar of a BIDS-PET image says, and what is wrong with it.

Field names and units are those of the BIDS specification, "Positron Emission Tomography". dcm2niix
before 1.0.20260416 writes TimeZero, AcquisitionTime and InjectionStart; since then it writes
SeriesTime instead of all three, the time that decay correction refers to. Both are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from petite_fast.data.sidecar_values import UNITS, clock, dose_bq, number, numbers

_OVERLAP_S = 0.5  # frame times are rounded to this by some converters
_CLOCK_S = 5.0  # clock times are written in whole seconds, and scanners' clocks differ a little
_DAY_S = 86400.0
_UNITS = UNITS | {"kbq/ml": "kBq/mL", "nci/ml": "nCi/mL", "arbitrary": "arbitrary"}
# Asked for by BIDS-PET; what this package itself needs is checked field by field below.
REQUIRED = (
    "Manufacturer",
    "ManufacturersModelName",
    "TracerName",
    "TracerRadionuclide",
    "InjectedRadioactivity",
    "InjectedRadioactivityUnits",
    "InjectedMass",
    "InjectedMassUnits",
    "SpecificRadioactivity",
    "SpecificRadioactivityUnits",
    "ModeOfAdministration",
    "TimeZero",
    "ScanStart",
    "InjectionStart",
    "FrameTimesStart",
    "FrameDuration",
    "AcquisitionMode",
    "ImageDecayCorrected",
    "ImageDecayCorrectionTime",
    "ReconMethodName",
    "ReconMethodParameterLabels",
    "ReconMethodParameterUnits",
    "ReconMethodParameterValues",
    "ReconFilterType",
    "AttenuationCorrection",
)
# What may leave with a converted image: how it was acquired and reconstructed. Everything else
# stays behind, because converters also write names, IDs, dates, accession numbers, institutions.
KEPT_FIELDS = frozenset(REQUIRED) | {
    "Units",
    "Modality",
    "BodyPart",
    "SeriesTime",
    "AcquisitionTime",
    "ScatterFraction",
    "DecayCorrection",
    "DecayCorrectionFactor",
    "DecayFactor",
    "DoseCalibrationFactor",
    "RadionuclideTotalDose",
    "RadionuclideHalfLife",
    "RadionuclidePositronFraction",
    "IsotopeHalfLife",
    "ReconFilterSize",
    "AttenuationCorrectionMethod",
    "InjectionEnd",
    "TracerMolecularWeight",
    "TracerMolecularWeightUnits",
    "MolarActivity",
    "MolarActivityUnits",
    "SkullStripped",
}


@dataclass(frozen=True)
class PetInfo:
    """The part of a sidecar that quantification needs; None is not said.

    Attributes:
        fields: all fields, inherited ones included; PatientWeight [kg] from participants.tsv.
        origin: the file that each field stands in.
        file: the nearest sidecar, or where one is missing.
    """

    fields: Mapping[str, Any]
    origin: Mapping[str, str]
    file: str

    @property
    def units(self) -> str | None:
        """Units of the voxels: "Bq/mL", "kBq/mL", "nCi/mL", "SUVbw", "counts" or "arbitrary"."""
        text = self.fields.get("Units")
        return _UNITS.get(text.strip().lower()) if isinstance(text, str) else None

    @property
    def tracer(self) -> str | None:
        """TracerName; of a file without one, DICOM's Radiopharmaceutical."""
        return _text(self.fields.get("TracerName", self.fields.get("Radiopharmaceutical")))

    @property
    def radionuclide(self) -> str | None:
        """TracerRadionuclide, as written."""
        return _text(self.fields.get("TracerRadionuclide"))

    @property
    def scanner(self) -> str:
        """Manufacturer and model, else "unknown"."""
        names = (self.fields.get(key) for key in ("Manufacturer", "ManufacturersModelName"))
        return " ".join(filter(None, map(_text, names))) or "unknown"

    @property
    def frame_starts_s(self) -> tuple[float, ...] | None:
        """FrameTimesStart in s from time zero; None if it holds anything but finite numbers."""
        return numbers(self.fields.get("FrameTimesStart"))

    @property
    def frame_durations_s(self) -> tuple[float, ...] | None:
        """FrameDuration in s; None if it holds anything but finite numbers."""
        return numbers(self.fields.get("FrameDuration"))

    @property
    def dose_bq(self) -> float | None:
        """The injected activity in Bq; see `petite_fast.data.sidecar_values.dose_bq`."""
        return dose_bq(self.fields)

    @property
    def weight_kg(self) -> float | None:
        """Body weight in kg: PatientWeight, which participants.tsv fills in."""
        return number(self.fields.get("PatientWeight"))

    def shareable(self) -> dict[str, Any]:
        """The fields that may leave with a copy of the image; see `KEPT_FIELDS`."""
        return {key: value for key, value in self.fields.items() if key in KEPT_FIELDS}


class Fault(NamedTuple):
    """What is wrong with a sidecar: the file, and "FIELD ...; expected ..."."""

    file: str
    text: str
    fatal: bool = True


def faults(info: PetInfo, frames: int | None = None) -> list[Fault]:
    """Everything that is wrong with a sidecar, each with its file and field.

    Args:
        info: what was read.
        frames: frames of the image, if they are known.
    """
    found = [
        Fault(info.origin.get(name, info.file), f"{name} {text}")
        for name, text in (*_units(info), *_frames(info, frames), *_times(info), *_dose(info))
    ]
    missing = [name for name in REQUIRED if name not in info.fields]
    if "SeriesTime" in info.fields:  # newer dcm2niix, in place of these
        missing = [name for name in missing if name not in ("TimeZero", "InjectionStart")]
    if missing:
        text = f"BIDS-PET also asks for {', '.join(missing)}"
        found.append(Fault(info.file, text, fatal=False))
    return found


def _units(info: PetInfo) -> Iterator[tuple[str, str]]:
    if "Units" not in info.fields:
        yield "Units", "is missing; expected the units of the voxels, such as Bq/mL"
    elif info.units is None:
        known = ", ".join(dict.fromkeys(_UNITS.values()))
        yield "Units", f"is {info.fields['Units']!r}; expected one of {known}"


def _frames(info: PetInfo, frames: int | None) -> Iterator[tuple[str, str]]:
    values = {"FrameTimesStart": info.frame_starts_s, "FrameDuration": info.frame_durations_s}
    for name, times in values.items():
        if name not in info.fields:
            continue
        if times is None:
            yield name, "is no list of finite numbers; expected seconds, one number per frame"
        elif frames is not None and len(times) != frames:
            yield name, f"has {len(times)} entries; expected {frames}, one per frame"
    starts, durations = values.values()
    if durations is not None and any(duration <= 0 for duration in durations):
        yield "FrameDuration", f"holds {min(durations):g}; expected positive seconds"
    if starts is None:
        return
    pairs = list(zip(starts, starts[1:], strict=False))
    if any(after <= before for before, after in pairs):
        yield "FrameTimesStart", "does not increase; expected the frames in order of time"
    elif durations is not None and len(durations) == len(starts):
        late = [k for k, (a, b) in enumerate(pairs) if a + durations[k] > b + _OVERLAP_S]
        ends = [abs(durations[k] - b) <= _OVERLAP_S for k, (_, b) in enumerate(pairs)]
        if late and all(ends):
            yield "FrameDuration", "holds the ends of the frames; expected their lengths in seconds"
        elif late:
            k = late[0]
            yield (
                "FrameDuration",
                f"lets frame {k} end at {starts[k] + durations[k]:g} s, after frame {k + 1} starts"
                f" at {starts[k + 1]:g} s; expected frames that do not overlap",
            )


def _times(info: PetInfo) -> Iterator[tuple[str, str]]:
    clocks = {}
    for name in ("TimeZero", "SeriesTime", "AcquisitionTime"):
        if name in info.fields:
            clocks[name] = clock(info.fields[name])
            if clocks[name] is None:
                yield name, f"is {info.fields[name]!r}; expected a time of day, hh:mm:ss"
    offsets = {}
    for name in ("ScanStart", "InjectionStart"):
        if name in info.fields:
            offsets[name] = number(info.fields[name])
            if offsets[name] is None:
                yield name, f"is {info.fields[name]!r}; expected seconds from TimeZero"
    scan, injection = offsets.get("ScanStart"), offsets.get("InjectionStart")
    if scan is not None and injection is not None and 0 not in (scan, injection):
        yield (
            "TimeZero",
            f"is neither the scan's start ({scan:g} s after it) nor the injection"
            f" ({injection:g} s after it); expected one of them",
        )
    starts = info.frame_starts_s
    if scan is not None and starts and starts[0] < scan - _CLOCK_S:
        yield (
            "TimeZero",
            f"and ScanStart put the scan's start at {scan:g} s, and FrameTimesStart the first"
            f" frame at {starts[0]:g} s; expected no frame before the scan",
        )
    zero, series = clocks.get("TimeZero"), clocks.get("SeriesTime")
    if zero is not None and series is not None:
        # ScanStart 0 is what converters leave out; a wrap around midnight is no difference
        apart = (zero + (scan or 0.0) - series + _DAY_S / 2) % _DAY_S - _DAY_S / 2
        if abs(apart) > _CLOCK_S:
            yield (
                "TimeZero",
                f"puts the scan's start {apart:g} s from SeriesTime, which decay correction refers"
                " to; expected the same (AcquisitionTime is that of one frame or bed)",
            )


def _dose(info: PetInfo) -> Iterator[tuple[str, str]]:
    for name in ("InjectedRadioactivity", "RadionuclideTotalDose"):
        dose = number(info.fields.get(name))
        if name in info.fields and (dose is None or dose <= 0):
            yield name, f"is {info.fields[name]!r}; expected a positive number"
            return
    if "InjectedRadioactivity" in info.fields and info.dose_bq is None:
        unit = info.fields.get("InjectedRadioactivityUnits")
        yield "InjectedRadioactivityUnits", f"is {unit!r}; expected Bq, kBq, MBq, GBq, uCi or mCi"
    weight = info.fields.get("PatientWeight")
    if weight is not None and not (info.weight_kg or 0) > 0:
        yield "PatientWeight", f"is {weight!r}; expected kg, a positive number"


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None
