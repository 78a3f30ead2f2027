"""What a PET DICOM header says about units, times and injection, by the vendor-neutral rules.

Source of the rules: QIBA/RSNA vendor-neutral pseudo-code for SUV, and DICOM PS3.3 C.8.9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.valuerep import DA, DT, TM

from petite_fast.data.acquisition import (
    HALF_LIFE_S,
    NEEDS_DATE_S,
    Timing,
    Tracer,
    elapsed_of_day,
    known_nuclide,
    mean_rate_time,
    plausible_elapsed,
)
from petite_fast.errors import InputError

GE_PRIVATE = (0x0009, "GEMS_PETD_01")
PHILIPS_PRIVATE = (0x7053, "Philips PET Private Group")
_SUV_UNITS = {"BW": "SUVbw", "LBM": "SUVlbm", "LBMJANMA": "SUVlbm", "BSA": "SUVbsa"}
_UCUM_UNITS = {
    "Bq/ml": "Bq/mL",
    "{SUVbw}g/ml": "SUVbw",
    "{SUVlbm}g/ml": "SUVlbm",
    "{SUVbsa}cm2/ml": "SUVbsa",
    "{counts}": "counts",
}
# Mass numbers of nuclides imaged with a gamma camera; none of a positron emitter among them.
_SINGLE_PHOTON = {67, 75, 81, 99, 111, 117, 123, 125, 131, 133, 153, 166, 177, 186, 188, 201}
_GAMMA_COLLIMATORS = {"PARA", "PINH", "FANB", "CONE", "SLNT", "ASTG", "DIVG"}
_ANNIHILATION_KEV = 511.0
_AGREE_S = 5.0  # FrameReferenceTime is rounded differently by each vendor


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """When one slice was taken, in seconds; clocks count from year 1 (proleptic, no zone).

    Attributes:
        clock_s: start of the acquisition.
        duration_s: ActualFrameDuration.
        reference_s: FrameReferenceTime, from the series' reference to the mean rate of counts.
    """

    clock_s: float | None
    duration_s: float | None
    reference_s: float | None


def number(ds: Dataset, keyword: str) -> float | None:
    """A finite number, or None where the element is missing or empty.

    Raises:
        ValueError, TypeError: it is no number; who reads a file makes an InputError of them.
    """
    value = ds.get(keyword)
    if value is None or value == "":
        return None
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{keyword} is not finite")
    return result


def clock(ds: Dataset, stem: str) -> float | None:
    """Seconds from year 1 of ``<stem>DateTime``, or of ``<stem>Date`` and ``<stem>Time``."""
    joined = ds.get(f"{stem}DateTime")
    if joined:
        return _seconds(_parsed(DT, joined))
    time = ds.get(f"{stem}Time")
    day = ds.get(f"{stem}Date") or ds.get("SeriesDate") or ds.get("StudyDate")
    if not time:
        return None
    # Without any date (de-identified) all clocks are of one day.
    days = _parsed(DA, day).toordinal() if day else 1
    return days * 86400.0 + of_day(_parsed(TM, time))


def _parsed(kind: Any, value: Any) -> Any:
    """A DICOM date or time; what cannot be read is not quoted."""
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError("a date or time in the header cannot be read") from None


def of_day(time: Any) -> float:
    """Seconds of the day of a time."""
    return time.hour * 3600.0 + time.minute * 60.0 + time.second + time.microsecond * 1e-6


def _seconds(moment: Any) -> float:
    if not isinstance(moment, datetime):
        raise ValueError("no date and time")
    return moment.toordinal() * 86400.0 + of_day(moment)


def private(ds: Dataset, block: tuple[int, str], offset: int) -> Any:
    """Value of a private element, or None."""
    try:
        value = ds.private_block(*block)[offset].value
    except KeyError:
        return None
    if isinstance(value, bytes):  # implicit VR and an element pydicom does not know
        value = value.decode("ascii", "ignore").strip("\0 ")
    return value if value != "" else None


def modality(ds: Dataset) -> str:
    """Modality, or "unknown" where the element holds anything else than a code."""
    code = str(ds.get("Modality", ""))
    return code if code.isalnum() and len(code) <= 16 else "unknown"


def require_pet(ds: Dataset, where: Path) -> None:
    """Refuse other modalities, and SPECT stored as PET.

    Raises:
        InputError: Modality is not PT, or collimator, energy window or nuclide are those of a
            gamma camera.
    """
    if modality(ds) != "PT":
        raise InputError(f"{where}: modality {modality(ds)}; expected PET (PT)")
    windows = [
        (number(w, "EnergyWindowLowerLimit"), number(w, "EnergyWindowUpperLimit"))
        for w in ds.get("EnergyWindowRangeSequence") or ()
    ]
    known = [(low, high) for low, high in windows if low is not None and high is not None and high]
    off_peak = known and not any(low <= _ANNIHILATION_KEV <= high for low, high in known)
    named = " ".join(_nuclide_names(ds))
    masses = {int(n) for n in re.findall(r"(?<!\d)\d{2,3}(?!\d)", named)}
    if (
        off_peak
        or masses & _SINGLE_PHOTON
        or str(ds.get("CollimatorType", "")) in _GAMMA_COLLIMATORS
    ):
        raise InputError(
            f"{where}: a SPECT image stored as PT (its nuclide, energy window or collimator is"
            " that of a gamma camera); expected PET"
        )


def _nuclide_names(ds: Dataset) -> list[str]:
    names = []
    for item in ds.get("RadiopharmaceuticalInformationSequence") or ():
        codes = item.get("RadionuclideCodeSequence") or ()
        names += [str(code.get("CodeMeaning", "")) for code in codes]
    return names


def units_of(ds: Dataset) -> str | None:
    """Units of the rescaled voxels, in the words of `Volume`; counts that Philips scales are Bq/mL.

    SUVType is BW where it is not given (PS3.3 C.8.9.1).
    """
    code = str(ds.get("Units", ""))
    if code == "GML":
        return _SUV_UNITS.get(str(ds.get("SUVType") or "BW"))
    if code == "CNTS":
        return "Bq/mL" if activity_factor(ds) is not None else "counts"
    return {"BQML": "Bq/mL", "CM2ML": "SUVbsa"}.get(code)


def ucum_units(code: str) -> str | None:
    """Units of a real-world value mapping."""
    return _UCUM_UNITS.get(code)


def suv_factor(ds: Dataset) -> float | None:
    """SUVbw per rescaled count, (7053,xx00), where Philips gives it."""
    value = private(ds, PHILIPS_PRIVATE, 0x00) if str(ds.get("Units", "")) == "CNTS" else None
    return float(value) if value is not None and float(value) > 0 else None


def activity_factor(ds: Dataset) -> float | None:
    """Bq/mL per rescaled count, (7053,xx09), where Philips gives it and no SUV factor."""
    if str(ds.get("Units", "")) != "CNTS" or suv_factor(ds) is not None:
        return None
    value = private(ds, PHILIPS_PRIVATE, 0x09)
    return float(value) if value is not None and float(value) > 0 else None


def timing_and_tracer(
    ds: Dataset, frames: Sequence[Sequence[FrameTimes]]
) -> tuple[Timing | None, Tracer]:
    """Timing (zero: the scan's start) and tracer of a series.

    Timing is None where times are missing, or values are decay-corrected to an unknown moment.

    Args:
        ds: header of any slice.
        frames: for each frame, the times of its slices.
    """
    injected = (ds.get("RadiopharmaceuticalInformationSequence") or [Dataset()])[0]
    half_life = number(injected, "RadionuclideHalfLife")
    nuclide = next((n for text in _nuclide_names(ds) if (n := known_nuclide(text))), None)
    if half_life is None and nuclide is not None:
        half_life = HALF_LIFE_S[nuclide]
    timing, elapsed, problem = None, None, Tracer.problem
    try:
        start = scan_start(ds, [t for frame in frames for t in frame], half_life)
        kind = _decay_correction(ds)
        begins, lengths, beds = _spans(frames, start)
        since, problem = _since_injection(injected, start, half_life, _end(begins, lengths))
        reference: float | None = None
        if kind == "ADMIN":
            reference = None if since is None else -since
        elif kind == "START":
            moment = clock(ds, "DecayCorrection")  # enhanced objects say it outright
            reference = 0.0 if moment is None else moment - start
        if lengths and (kind == "NONE" or reference is not None):
            decay = None if reference is None else (reference,) * len(frames)
            timing = Timing(begins, lengths, decay)
        _require_corrections(ds)
        if kind == "ADMIN":
            elapsed = (0.0,) * len(frames)
        elif since is not None and reference is not None:
            elapsed = (since + reference,) * len(frames)
        elif since is not None and half_life is not None:
            if not lengths or beds:
                raise ValueError("values are not decay-corrected and slices have no common time")
            elapsed = tuple(
                since + s + mean_rate_time(d, half_life)
                for s, d in zip(begins, lengths, strict=True)
            )
    except ValueError as error:
        problem = str(error)
    sex = str(ds.get("PatientSex", ""))
    return timing, Tracer(
        half_life_s=half_life,
        dose_bq=number(injected, "RadionuclideTotalDose"),
        weight_kg=number(ds, "PatientWeight"),
        height_m=number(ds, "PatientSize"),
        sex=sex if sex in ("M", "F") else None,
        elapsed_s=elapsed,
        problem=problem,
        nuclide=nuclide,
        suv_factor=suv_factor(ds),
    )


def _require_corrections(ds: Dataset) -> None:
    listed = ds.get("CorrectedImage")
    if listed and "ATTN" not in listed:
        raise ValueError("CorrectedImage lists no attenuation correction (ATTN)")
    if listed and "DECY" not in listed and ds.get("DecayCorrection") in ("START", "ADMIN"):
        raise ValueError("CorrectedImage lists no decay correction (DECY) but DecayCorrection does")


def _decay_correction(ds: Dataset) -> str:
    """START, ADMIN or NONE; enhanced objects say YES or NO, and to which moment."""
    kind = str(ds.get("DecayCorrection") or ds.get("DecayCorrected") or "")
    if kind == "YES" and clock(ds, "DecayCorrection") is None:
        raise ValueError("DecayCorrectionDateTime is not given")
    kinds = {"START": "START", "ADMIN": "ADMIN", "NONE": "NONE", "YES": "START", "NO": "NONE"}
    if kind not in kinds:
        raise ValueError("DecayCorrection is not given")
    return kinds[kind]


def _spans(
    frames: Sequence[Sequence[FrameTimes]], start: float
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Starts and lengths of the frames, and whether slices of one were taken at several times.

    Starts and lengths are empty if a slice has no time or no length.
    """
    every = [t for frame in frames for t in frame]
    if any(t.clock_s is None or not t.duration_s or t.duration_s <= 0 for t in every):
        return (), (), False
    clocks = [[t.clock_s or 0.0 for t in frame] for frame in frames]
    return (
        tuple(min(c) - start for c in clocks),
        tuple(max(t.duration_s or 0.0 for t in frame) for frame in frames),
        any(max(c) - min(c) > 1 for c in clocks),
    )


def _end(begins: Sequence[float], lengths: Sequence[float]) -> float:
    return max((s + d for s, d in zip(begins, lengths, strict=True)), default=0.0)


def scan_start(ds: Dataset, times: Sequence[FrameTimes], half_life_s: float | None) -> float:
    """Clock (seconds from year 1) that START refers to.

    1. SeriesDate and SeriesTime, if no slice was acquired earlier: AcquisitionTime is later for
       every bed position but the first.
    2. Otherwise the series was stored after processing, at a time that means nothing: GE's
       private scan time (0009,xx0d), or
    3. AcquisitionTime - FrameReferenceTime + `mean_rate_time`, on which all slices must agree.

    Raises:
        ValueError: none of them is there, or slices disagree.
    """
    series = clock(ds, "Series")
    acquired = [t.clock_s for t in times if t.clock_s is not None]
    if series is not None and (not acquired or series <= min(acquired) + 1):
        return series
    if stored := private(ds, GE_PRIVATE, 0x0D):
        return _seconds(_parsed(DT, stored))
    starts = [
        t.clock_s - t.reference_s + mean_rate_time(t.duration_s, half_life_s)
        for t in times
        if t.clock_s is not None and t.reference_s is not None and t.duration_s and half_life_s
    ]
    if not starts:
        raise ValueError("neither SeriesTime nor the slices tell when the scan started")
    if max(starts) - min(starts) > _AGREE_S:
        raise ValueError(
            "SeriesTime is later than AcquisitionTime and slices disagree on the start"
        )
    return min(starts)


def _since_injection(
    injected: Dataset, start: float, half_life_s: float | None, length_s: float
) -> tuple[float | None, str]:
    """Seconds from injection to `start`, or None and why they are unknown.

    The date of RadiopharmaceuticalStartDateTime counts if it is plausible; otherwise the time of
    day: de-identification moves dates apart, but leaves times.
    """
    joined, time = (
        injected.get(f"RadiopharmaceuticalStart{k}") or None for k in ("DateTime", "Time")
    )
    if half_life_s is None or half_life_s <= 0:
        return None, "the half-life is not given"
    try:
        if joined:
            moment = _parsed(DT, joined)
            try:
                return plausible_elapsed(start - _seconds(moment), half_life_s, length_s), ""
            except ValueError:
                if half_life_s > NEEDS_DATE_S:
                    raise
                time = time or f"{moment:%H%M%S.%f}"
        if not time:
            return None, Tracer.problem
        injection = of_day(_parsed(TM, time))
        elapsed = elapsed_of_day(start % 86400, injection, half_life_s, length_s)
        return plausible_elapsed(elapsed, half_life_s, length_s), ""
    except ValueError as error:
        return None, str(error)
