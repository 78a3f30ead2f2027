"""Values as BIDS-PET sidecars write them: numbers, times of day, units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

BQ_PER_UNIT = {"bq": 1.0, "kbq": 1e3, "mbq": 1e6, "gbq": 1e9, "uci": 3.7e4, "mci": 3.7e7}
UNITS = {
    **dict.fromkeys(("bq/ml", "bqml"), "Bq/mL"),
    **dict.fromkeys(("suv", "suvbw", "g/ml", "gml"), "SUVbw"),
    **dict.fromkeys(("counts", "cnts"), "counts"),
}
"""Units of voxels that are read, as written in lower case."""


def number(value: object) -> float | None:
    """A finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def numbers(value: object) -> tuple[float, ...] | None:
    """Finite numbers; a single one, as some converters write it for a static scan, is a list."""
    entries = value if isinstance(value, list) else [value]
    found = tuple(n for entry in entries if (n := number(entry)) is not None)
    return found if found and len(found) == len(entries) else None


def clock(value: object) -> float | None:
    """Seconds after midnight of "hh:mm:ss" with or without a fraction."""
    text = value.strip() if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d\d?):(\d\d):(\d\d(?:\.\d*)?)", text)
    if match is None:
        return None
    hours, minutes, seconds = int(match[1]), int(match[2]), float(match[3])
    if hours > 23 or minutes > 59 or seconds >= 61:
        return None
    return 3600.0 * hours + 60.0 * minutes + seconds


def dose_bq(fields: Mapping[str, Any]) -> float | None:
    """InjectedRadioactivity in Bq; of fields without it, RadionuclideTotalDose (later dcm2niix)."""
    if "InjectedRadioactivity" not in fields:
        return number(fields.get("RadionuclideTotalDose"))
    dose, unit = number(fields["InjectedRadioactivity"]), fields.get("InjectedRadioactivityUnits")
    text = unit.strip().lower() if isinstance(unit, str) else ""
    scale = BQ_PER_UNIT.get(text.replace("\u00b5", "u").replace("\u03bc", "u"))
    return None if dose is None or scale is None else dose * scale
