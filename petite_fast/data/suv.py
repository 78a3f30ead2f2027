"""Standardised uptake values."""

from __future__ import annotations

import math
from typing import Literal, get_args

from petite_fast.data.acquisition import HALF_LIFE_S, Tracer
from petite_fast.data.lazy import Volume
from petite_fast.errors import InputError

Kind = Literal["bw", "lbm", "bsa"]
_CONVERTED = {"SUVbw": "bw", "SUVbsa": "bsa"}


def to_suv(volume: Volume, kind: Kind = "bw") -> Volume:
    """`volume` in SUV; nothing is decoded yet.

        SUV = c * m / (dose * 2^(-elapsed / half-life))

    with c in Bq/mL, the dose in Bq at injection, and elapsed the time from the injection to the
    moment that c is decay-corrected to (DecayCorrection START: SeriesTime; ADMIN: 0; NONE: the
    time of the mean rate of counts in each frame). The mass m is

        bw   body weight                                                  g      SUV in g/mL
        lbm  9270 w / (6680 + 216 w / h^2) male, 9270 w / (8780 + 244 w / h^2) female, in kg, * 1000
        bsa  71.84 w^0.425 (100 h)^0.725                                  cm^2   SUV in cm^2/mL

    with w in kg and h in m. What is in SUV already is passed on, or converted from one kind to
    another by the ratio of masses (not from lbm, which scanners find by several formulas).
    Philips' counts take the scanner's own SUV factor.

    Sources: QIBA vendor-neutral pseudo-code; Janmahasatian et al. 2005 (lean body mass, as
    PERCIST and EANM ask for); Du Bois and Du Bois 1916.

    Args:
        volume: what `read_volume` gave.
        kind: which mass.

    Raises:
        InputError: units that are no activity, or weight, height, sex, dose, half-life or a time
            that is missing or cannot be true. Nothing is guessed.
        ValueError: an unknown `kind`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}, wanted one of {get_args(Kind)}")
    tracer, units = volume.tracer or Tracer(), f"SUV{kind}"
    if volume.units == units:
        return volume
    frames = volume.frame_count
    if volume.units == "SUVlbm":
        raise _refused(volume, "by which formula its lean body mass was found is not known", "bw")
    if volume.units in _CONVERTED:
        factor = _mass(volume, kind) / _mass(volume, _CONVERTED[volume.units])
        return volume.scaled((factor,) * frames, units)
    if volume.units == "counts" and tracer.suv_factor is not None:
        ratio = 1.0 if kind == "bw" else _mass(volume, kind) / _mass(volume, "bw")
        return volume.scaled((tracer.suv_factor * ratio,) * frames, units)
    if volume.units != "Bq/mL":
        raise _refused(volume, f"its units are {volume.units or 'not given'}", "Bq/mL or SUV")
    mass, half_life, dose = _mass(volume, kind), _half_life(volume), _dose(volume)
    if tracer.elapsed_s is None:
        raise _refused(volume, tracer.problem, "times that tell how far the dose had decayed")
    return volume.scaled(
        [mass / (dose * 2 ** (-seconds / half_life)) for seconds in tracer.elapsed_s], units
    )


def _mass(volume: Volume, kind: str) -> float:
    """The mass (g), or surface (cm^2), that SUV of `kind` are relative to."""
    tracer = volume.tracer or Tracer()
    weight = _between(volume, "the body weight", tracer.weight_kg, 0.01, 500, "kg")
    if kind == "bw":
        return weight * 1000
    height = _between(volume, "the body height", tracer.height_m, 0.2, 2.8, "m")
    if kind == "bsa":
        return 71.84 * weight**0.425 * (100 * height) ** 0.725
    if tracer.sex not in ("M", "F"):
        raise _refused(volume, "the sex is not given", "M or F, for the lean body mass")
    base, slope = (6680, 216) if tracer.sex == "M" else (8780, 244)
    return 1000 * 9270 * weight / (base + slope * weight / height**2)


def _dose(volume: Volume) -> float:
    tracer = volume.tracer or Tracer()
    # Below: a header that holds MBq where Bq belong.
    return _between(volume, "the injected dose", tracer.dose_bq, 1e4, 1e11, "Bq")


def _half_life(volume: Volume) -> float:
    tracer = volume.tracer or Tracer()
    half_life = _between(volume, "the half-life", tracer.half_life_s, 1, 1e7, "s")
    known = HALF_LIFE_S.get(tracer.nuclide or "")
    if known is not None and abs(half_life / known - 1) > 0.05:
        raise _refused(
            volume, f"the half-life is {half_life:g} s", f"{known:g} s, that of {tracer.nuclide}"
        )
    return half_life


def _between(
    volume: Volume, name: str, value: float | None, low: float, high: float, unit: str
) -> float:
    if value is None:
        raise _refused(volume, f"{name} is not given", f"a value in {unit}")
    if not (math.isfinite(value) and low <= value <= high):
        raise _refused(volume, f"{name} is {value:g} {unit}", f"{low:g} to {high:g} {unit}")
    return value


def _refused(volume: Volume, problem: str, expected: str) -> InputError:
    return InputError(f"{volume.source}: no SUV, {problem}; expected {expected}")
