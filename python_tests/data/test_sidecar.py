"""BIDS-PET sidecars: both generations of dcm2niix, and times that cannot be true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sidecar_cases import BIDS
from volume_cases import save, voxels

from petite_fast.data import Timing, read_volume
from petite_fast.data.sidecar import Facts, parse_sidecar
from petite_fast.errors import InputError


def parse(frames: int = 3, **changes: Any) -> Facts:
    content = {k: v for k, v in {**BIDS, **changes}.items() if v is not None}
    return parse_sidecar(content, frames, Path("sub-01_pet.json"))


def refused(*words: str, frames: int = 3, **changes: Any) -> None:
    with pytest.raises(InputError) as caught:
        parse(frames, **changes)
    message = str(caught.value)
    for word in ("sub-01_pet.json", "expected", *words):
        assert word in message, message


def test_bids() -> None:
    facts = parse()
    assert facts.units == "Bq/mL"
    assert facts.timing == Timing((0, 10, 30), (10, 20, 30), (0, 0, 0))
    assert facts.tracer is not None
    assert facts.tracer.dose_bq == pytest.approx(5.73e8)
    assert facts.tracer.half_life_s == pytest.approx(1221.8)
    assert facts.tracer.elapsed_s == (0, 0, 0)


def test_static_scan_after_injection() -> None:
    """TimeZero at the injection; the image is corrected to the scan's start."""
    facts = parse(
        1,
        ScanStart=3000,
        FrameTimesStart=[3000],
        FrameDuration=[1200],
        ImageDecayCorrectionTime=3000,
    )
    assert facts.tracer is not None and facts.tracer.elapsed_s == (3000,)
    assert facts.timing == Timing((3000,), (1200,), (3000,))


def test_later_dcm2niix_has_series_time_instead_of_time_zero() -> None:
    facts = parse(
        1,
        TimeZero=None,
        ScanStart=None,
        InjectionStart=None,
        ImageDecayCorrected=None,
        ImageDecayCorrectionTime=None,
        FrameTimesStart=0.0,
        FrameDuration=1200.0,
        DecayCorrection="START",
        SeriesTime="00:20:11.5",
        RadiopharmaceuticalStartTime="23:50:11.5",
    )
    assert facts.tracer is not None and facts.tracer.elapsed_s == (1800,)


@pytest.mark.parametrize(
    ("unit", "factor"), [("Bq", 1), ("kBq", 1e3), ("GBq", 1e9), ("mCi", 3.7e7)]
)
def test_units_of_the_dose(unit: str, factor: float) -> None:
    facts = parse(InjectedRadioactivityUnits=unit)
    assert facts.tracer is not None and facts.tracer.dose_bq == pytest.approx(573 * factor)


def test_dose_without_a_unit_is_not_guessed() -> None:
    for unit in (None, "MegaBq"):
        facts = parse(InjectedRadioactivityUnits=unit)
        assert facts.tracer is not None and facts.tracer.dose_bq is None


def test_frame_duration_that_holds_frame_ends() -> None:
    refused(
        "FrameDuration holds frame ends",
        FrameTimesStart=[0, 10, 30, 60],
        FrameDuration=[10, 30, 60, 90],
        frames=4,
    )


def test_other_frame_times_that_cannot_be_true() -> None:
    refused("frame 2 ends at 60 s", FrameDuration=[10, 50, 30])
    refused("2 FrameTimesStart", FrameTimesStart=[0, 10])
    refused("for 4 frames", frames=4)
    refused("not positive", FrameDuration=[10, 20, 0])
    refused("FrameDuration cannot be used", FrameDuration=[10, "20", 30])
    refused("FrameTimesStart cannot be used", FrameTimesStart=[0, math.nan, 30])
    refused("FrameTimesStart cannot be used", FrameTimesStart=[0, True, 30])
    refused("FrameDuration cannot be used", FrameDuration=[10, 20, 10**400])


def test_wrong_time_zero() -> None:
    refused("TimeZero cannot be used", TimeZero="1pm")
    refused("TimeZero cannot be used", TimeZero="25:00:00")
    refused("TimeZero cannot be used", TimeZero=47082)
    refused("before ScanStart", ScanStart=3000)
    refused(
        "TimeZero is neither",
        ScanStart=3000,
        InjectionStart=600,
        FrameTimesStart=[3000, 3010, 3030],
    )
    refused("1078 s off", AcquisitionTime="13:22:40")
    # one clock is enough: with several bed positions AcquisitionTime is later
    parse(AcquisitionTime="13:22:40", SeriesTime="13:04:50")


def test_wrong_kinds() -> None:
    refused("Units cannot be used", Units=5)
    refused("InjectionStart cannot be used", InjectionStart=[0, 1])
    refused("ImageDecayCorrected cannot be used", ImageDecayCorrected="yes")


def test_injection_after_the_scan_leaves_suv_unknown() -> None:
    facts = parse(ScanStart=0, InjectionStart=500)
    assert facts.tracer is not None and facts.tracer.elapsed_s is None
    assert "after the start of the scan" in facts.tracer.problem


def test_sidecar_beside_the_image(tmp_path: Path) -> None:
    path = save(tmp_path / "sub-01_pet.nii.gz", voxels())
    sidecar = tmp_path / "sub-01_pet.json"
    assert read_volume(path).units is None
    sidecar.write_text(json.dumps({"Units": "Bq/mL"}))
    assert read_volume(path).units == "Bq/mL" and read_volume(path).timing is None
    for content in ("<html>", "[1]", '"a"', "[" * 100_000, "\udcff"):
        sidecar.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=r"sub-01_pet.json: .*; expected a BIDS-PET sidecar"):
            read_volume(path)
