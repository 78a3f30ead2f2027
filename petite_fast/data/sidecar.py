"""The BIDS-PET sidecar (.json) beside a NIfTI file: units, frame times, injection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petite_fast.data.acquisition import (
    HALF_LIFE_S,
    Timing,
    Tracer,
    check_timing,
    elapsed_of_day,
    known_nuclide,
    mean_rate_time,
    plausible_elapsed,
)
from petite_fast.data.inheritance import (
    body_weights,
    entities_of,
    inherited_sidecar,
    load_sidecar,
    tree_root,
)
from petite_fast.data.sidecar_values import UNITS, clock, dose_bq, numbers
from petite_fast.errors import InputError

_UNITS = UNITS | {"bq/cc": "Bq/mL", "bq/cm3": "Bq/mL"}
_UNKNOWN = "n/a"  # what BIDS writes for a required field that nobody knows
_CLOCK_TOLERANCE_S = 60.0  # between scanner clocks and rounded times


@dataclass(frozen=True)
class Facts:
    """What a sidecar says; see the attributes of `Volume`."""

    units: str | None = None
    timing: Timing | None = None
    tracer: Tracer | None = None


def read_sidecar(image: Path, frames: int) -> Facts:
    """Read what sidecars say of `image` (.nii or .nii.gz, of `frames` frames), if there are any.

    An image with a BIDS-PET name has those that it inherits, and its subject's weight from
    participants.tsv (see `petite_fast.data.inheritance`); any other the one of its own name.

    Raises:
        InputError: the sidecar is no JSON object, or a field of it is of the wrong kind, or its
            times contradict each other or the image; the message names file and field.
    """
    entities = entities_of(image)
    if entities is None:
        path = image.with_name(re.sub(r"\.nii(\.gz)?$", "", image.name, flags=re.I) + ".json")
        content = load_sidecar(path) if path.is_file() else {}
        return parse_sidecar(content, frames, path) if content else Facts()
    root = tree_root(image)
    weight = body_weights(root)[0].get(f"sub-{entities['sub']}")
    info, problems = inherited_sidecar(root, image, weight)
    if problems:
        raise InputError(str(problems[0]))
    if not info.fields:
        return Facts()
    return parse_sidecar(info.fields, frames, Path(info.file), info.origin)


def parse_sidecar(
    content: Mapping[str, Any], frames: int, where: Path, origin: Mapping[str, str] | None = None
) -> Facts:
    """Units, timing and tracer of a sidecar's `content`.

    Both forms are read: with TimeZero (BIDS; dcm2niix until 2026-04) all times are seconds from
    it; without (later dcm2niix) they are seconds from SeriesTime.

    Args:
        content: the JSON object.
        frames: of the image it belongs to.
        where: names the sidecar in errors.
        origin: the file that a field stands in, where that is another one.

    Raises:
        InputError: see `read_sidecar`.
    """
    fields = _Fields(content, where, origin or {})
    timing = _timing(fields, frames)
    if timing is not None:
        check_timing(timing, frames, where)
    _check_clock(fields, timing)
    units = fields.text("Units")
    return Facts(
        _UNITS.get(units.lower().replace(" ", "")) if units else None,
        timing,
        _tracer(fields, timing),
    )


@dataclass(frozen=True)
class _Fields:
    """Typed access to a sidecar."""

    content: Mapping[str, Any]
    where: Path
    origin: Mapping[str, str]

    def fail(self, field: str, expected: str) -> InputError:
        # The value is not quoted: a field in the wrong place may hold anything.
        where = self.origin.get(field, self.where)
        return InputError(f"{where}: {field} cannot be used; expected {expected}")

    def number(self, field: str) -> float | None:
        values = self.numbers(field)
        if values is not None and len(values) != 1:
            raise self.fail(field, "one number")
        return values[0] if values else None

    def numbers(self, field: str) -> tuple[float, ...] | None:
        value = self.content.get(field)
        if value in (None, _UNKNOWN):
            return None
        found = numbers(value)
        if found is None:
            raise self.fail(field, "finite numbers")
        return found

    def text(self, field: str) -> str | None:
        value = self.content.get(field)
        if value is not None and not isinstance(value, str):
            raise self.fail(field, "a text")
        return None if value == _UNKNOWN else value

    def clock(self, field: str) -> float | None:
        """Seconds of the day of "HH:MM:SS[.ffffff]"."""
        value = self.text(field)
        if value is None:
            return None
        seconds = clock(value)
        if seconds is None:
            raise self.fail(field, "a time HH:MM:SS")
        return seconds


def _timing(fields: _Fields, frames: int) -> Timing | None:
    start, duration = fields.numbers("FrameTimesStart"), fields.numbers("FrameDuration")
    if start is None or duration is None:
        return None
    corrected = fields.content.get("ImageDecayCorrected")
    if corrected is not None and not isinstance(corrected, bool):
        raise fields.fail("ImageDecayCorrected", "true or false")
    reference = fields.number("ImageDecayCorrectionTime")
    kind = fields.text("DecayCorrection")  # dcm2niix copies DICOM's
    if corrected is False or (corrected is None and kind == "NONE"):
        return Timing(start, duration, None)
    if reference is None and kind == "START":
        reference = 0.0 if "TimeZero" not in fields.content else fields.number("ScanStart")
    if reference is None and kind == "ADMIN":
        reference = fields.number("InjectionStart")
    return Timing(start, duration, None if reference is None else (reference,) * frames)


def _check_clock(fields: _Fields, timing: Timing | None) -> None:
    """Refuse a TimeZero that frames, scan start or the scanner's clock contradict."""
    zero, scan = fields.clock("TimeZero"), fields.number("ScanStart")
    injection = fields.number("InjectionStart")
    if zero is None:
        return
    if timing is not None and scan is not None and timing.start_s[0] < scan - 1:
        raise InputError(
            f"{fields.where}: FrameTimesStart begins at {timing.start_s[0]:g} s, before ScanStart"
            f" ({scan:g} s); expected both relative to TimeZero"
        )
    if scan and injection and min(abs(scan), abs(injection)) > 1:
        raise InputError(
            f"{fields.where}: TimeZero is neither the scan start (ScanStart {scan:g} s) nor the"
            f" injection (InjectionStart {injection:g} s); expected one of them to be 0"
        )
    clocks = [fields.clock(f) for f in ("AcquisitionTime", "SeriesTime")]
    known = [c for c in clocks if c is not None]
    if known and scan is not None:
        off = [abs((zero + scan - c + 43200) % 86400 - 43200) for c in known]
        if min(off) > _CLOCK_TOLERANCE_S:
            raise InputError(
                f"{fields.where}: TimeZero + ScanStart is {min(off):.0f} s off AcquisitionTime and"
                " SeriesTime; expected the time of the scan's start"
            )


def _tracer(fields: _Fields, timing: Timing | None) -> Tracer:
    named = fields.text("TracerRadionuclide") or fields.text("Radionuclide")
    nuclide = known_nuclide(named) if named else None
    half_life = fields.number("RadionuclideHalfLife") or fields.number("IsotopeHalfLife")
    if half_life is None and nuclide is not None:
        half_life = HALF_LIFE_S[nuclide]
    for field in ("InjectedRadioactivity", "RadionuclideTotalDose"):
        fields.number(field)  # refuses what is no number
    fields.text("InjectedRadioactivityUnits")
    elapsed, problem = None, Tracer.problem
    try:
        elapsed = _elapsed(fields, timing, half_life)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        problem = str(error)
    return Tracer(
        half_life_s=half_life,
        dose_bq=dose_bq(fields.content),
        weight_kg=fields.number("PatientWeight"),
        height_m=fields.number("PatientSize"),
        sex=fields.text("PatientSex"),
        elapsed_s=elapsed,
        problem=problem,
        nuclide=nuclide,
    )


def _elapsed(
    fields: _Fields, timing: Timing | None, half_life: float | None
) -> tuple[float, ...] | None:
    """Seconds from the injection to what each frame's values stand for."""
    if timing is None:
        raise ValueError("FrameTimesStart and FrameDuration are not given")
    if half_life is None or half_life <= 0:
        raise ValueError("the half-life is not given")
    length = timing.end_s[-1] - timing.start_s[0]
    injection = fields.number("InjectionStart")
    if injection is None:
        series, injected = fields.clock("SeriesTime"), fields.clock("RadiopharmaceuticalStartTime")
        if "TimeZero" in fields.content or series is None or injected is None:
            return None
        injection = -elapsed_of_day(series, injected, half_life, length)
    if timing.reference_s is not None:
        return tuple(
            plausible_elapsed(r - injection, half_life, max(length, 0.0))
            for r in timing.reference_s
        )
    if fields.content.get("ImageDecayCorrected") is not False and (
        fields.text("DecayCorrection") != "NONE"
    ):
        raise ValueError("ImageDecayCorrected and ImageDecayCorrectionTime are not given")
    return tuple(
        s + mean_rate_time(d, half_life) - injection
        for s, d in zip(timing.start_s, timing.duration_s, strict=True)
    )
