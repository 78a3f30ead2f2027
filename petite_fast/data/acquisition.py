"""When a scan was taken and what was injected: what SUV and frame averages are computed from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from petite_fast.errors import InputError

# Seconds. Nuclear Data Sheets, as tabulated by NIST and the LNHB decay data.
HALF_LIFE_S = {
    "C11": 1221.8,
    "N13": 597.9,
    "O15": 122.24,
    "F18": 6586.2,
    "Cu64": 45721.0,
    "Ga68": 4062.6,
    "Rb82": 76.38,
    "Zr89": 282276.0,
    "I124": 360806.4,
}
_DAY_S = 86400.0
NEEDS_DATE_S = 6 * 3600.0
_MOST_HALF_LIVES = 10  # less than a thousandth is left: no scan, a wrong clock
_TOLERANCE_S = 1.0  # headers round times to whole seconds


@dataclass(frozen=True)
class Timing:
    """Frames of a scan, in seconds from one common zero.

    Attributes:
        start_s: start of each frame.
        duration_s: length of each frame.
        reference_s: moment that each frame's values are decay-corrected to; None: not corrected.
    """

    start_s: tuple[float, ...]
    duration_s: tuple[float, ...]
    reference_s: tuple[float, ...] | None = None

    @property
    def end_s(self) -> tuple[float, ...]:
        """End of each frame."""
        return tuple(s + d for s, d in zip(self.start_s, self.duration_s, strict=True))


def check_timing(timing: Timing, frames: int, where: str | os.PathLike[str]) -> None:
    """Refuse frame times that cannot be those of `frames` frames.

    Raises:
        InputError: wrong number of times, a duration that is not positive, frames out of order or
            overlapping by more than 1 s; durations that are really frame ends are named.
    """
    start, duration = timing.start_s, timing.duration_s
    if len(start) != frames or len(duration) != frames:
        raise InputError(
            f"{where}: {len(start)} FrameTimesStart and {len(duration)} FrameDuration for"
            f" {frames} frames; expected one of each per frame"
        )
    if not all(map(math.isfinite, start + duration)) or min(duration) <= 0:
        raise InputError(
            f"{where}: FrameTimesStart or FrameDuration holds a value that is not finite or a"
            " duration that is not positive; expected seconds"
        )
    overlaps = [
        k for k in range(frames - 1) if start[k] + duration[k] > start[k + 1] + _TOLERANCE_S
    ]
    pairs = zip(duration[:-1], start[1:], strict=True)
    if overlaps and all(abs(d - s) <= _TOLERANCE_S for d, s in pairs):
        raise InputError(
            f"{where}: FrameDuration holds frame ends ({_few(duration)}, the starts of the next"
            " frames); expected the length of each frame"
        )
    if overlaps:
        k = overlaps[0]
        raise InputError(
            f"{where}: frame {k + 1} ends at {start[k] + duration[k]:g} s, after frame {k + 2}"
            f" starts ({start[k + 1]:g} s); expected FrameTimesStart and FrameDuration in order"
            " and without overlap"
        )


def _few(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values[:3]) + (", ..." if len(values) > 3 else "")


@dataclass(frozen=True)
class Tracer:
    """What SUV needs besides the voxels; None where the file does not say.

    Attributes:
        half_life_s: of the radionuclide.
        dose_bq: injected activity, at the time of injection.
        weight_kg: body weight.
        height_m: body height.
        sex: "M" or "F".
        elapsed_s: per frame, from the injection to the moment that its values stand for: what
            they are decay-corrected to, or, uncorrected, when the mean rate of counts occurred.
        problem: why `elapsed_s` is None.
        nuclide: such as "F18", if the file names one that is known here.
        suv_factor: SUVbw per stored unit, where the scanner gives it itself (Philips, counts).
    """

    half_life_s: float | None = None
    dose_bq: float | None = None
    weight_kg: float | None = None
    height_m: float | None = None
    sex: str | None = None
    elapsed_s: tuple[float, ...] | None = None
    problem: str = "the time of injection is not given"
    nuclide: str | None = None
    suv_factor: float | None = None


def known_nuclide(text: str) -> str | None:
    """The key of `HALF_LIFE_S` that `text` ("18F", "^18^Fluorine", "F-18", "[18F]") names."""
    match = re.search(r"\d+", text)
    elements = {"fluor": "F", "carbon": "C", "nitrogen": "N", "oxygen": "O", "copper": "Cu"}
    elements |= {"gallium": "Ga", "rubidium": "Rb", "zirconium": "Zr", "iodine": "I"}
    if match is None:
        return None
    word = re.sub(r"[^a-z]", "", text.lower())
    symbol = next((s for name, s in elements.items() if word.startswith(name)), word.capitalize())
    key = f"{symbol}{match.group()}"
    return key if key in HALF_LIFE_S else None


def mean_rate_time(duration_s: float, half_life_s: float) -> float:
    """Seconds from a frame's start to the moment at which the activity equals its frame mean.

        t = ln(x / (1 - exp(-x))) / lambda,  x = lambda * duration,  lambda = ln 2 / half-life

    Source: QIBA vendor-neutral pseudo-code for SUV.
    """
    rate = math.log(2) / half_life_s
    x = rate * duration_s
    return math.log(x / -math.expm1(-x)) / rate if x > 1e-9 else duration_s / 2


def elapsed_of_day(scan_s: float, injection_s: float, half_life_s: float, length_s: float) -> float:
    """Seconds from injection to scan, both given as seconds of a day without a date.

    An injection of the evening before is recognised by being more than half a day later than
    the scan. An injection during the scan (dynamic series) gives a negative number.

    Args:
        scan_s: time of day of the scan's start.
        injection_s: time of day of the injection.
        half_life_s: of the nuclide: a long-lived one may be scanned days later.
        length_s: from the scan's start to its end.

    Raises:
        ValueError: the day is ambiguous or the order impossible; the message says so.
    """
    if half_life_s > NEEDS_DATE_S:
        raise ValueError(
            f"the injection has a time but no usable date, and the half-life of {half_life_s:g} s"
            " allows a scan days later"
        )
    elapsed = scan_s - injection_s
    if elapsed < -_DAY_S / 2:
        elapsed += _DAY_S
    return plausible_elapsed(elapsed, half_life_s, length_s)


def plausible_elapsed(elapsed_s: float, half_life_s: float, length_s: float) -> float:
    """`elapsed_s`, if a scan can begin so long after the injection.

    Raises:
        ValueError: the injection is later than the scan's end, or ten half-lives before it.
    """
    if elapsed_s < 0 and -elapsed_s > length_s:
        raise ValueError(f"the injection is {-elapsed_s:.0f} s after the start of the scan")
    if elapsed_s > _MOST_HALF_LIVES * half_life_s:
        raise ValueError(
            f"the injection is {elapsed_s:.0f} s before the scan, more than {_MOST_HALF_LIVES}"
            f" half-lives of {half_life_s:g} s"
        )
    return elapsed_s
