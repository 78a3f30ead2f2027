"""BIDS-PET sidecars: both generations of dcm2niix, and times that cannot be true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pet_trees import bids_tree, save_json
from sidecar_cases import BIDS
from volume_cases import save, voxels

from petite_fast.data import Timing, read_volume, to_suv
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


def test_what_nobody_knows_is_not_given() -> None:
    """BIDS has "n/a" for a required field without a value."""
    facts = parse(InjectedRadioactivity="n/a", InjectedRadioactivityUnits="n/a", Units="n/a")
    assert facts.units is None and facts.tracer is not None and facts.tracer.dose_bq is None


def test_dose_of_the_later_dcm2niix_is_in_bq() -> None:
    facts = parse(InjectedRadioactivity=None, RadionuclideTotalDose=3.5e8)
    assert facts.tracer is not None and facts.tracer.dose_bq == 3.5e8
    refused("RadionuclideTotalDose cannot be used", RadionuclideTotalDose="much")


def test_what_an_image_of_a_tree_inherits(tmp_path: Path) -> None:
    """Times at the root, length in its own file, weight in participants.tsv: enough for SUV."""
    tree = bids_tree(tmp_path, subjects=2)
    image = tree / "sub-02" / "pet" / "sub-02_trc-FDG_rec-short_pet.nii.gz"
    volume = read_volume(image)
    assert volume.units == "Bq/mL" and volume.timing == Timing((1800,), (300,), (0,))
    assert volume.tracer is not None and volume.tracer.weight_kg == 62
    wanted = volume.array * (62_000 / 388.8e6)  # corrected to the injection
    np.testing.assert_allclose(to_suv(volume).array, wanted, rtol=1e-6)
    (tree / "participants.tsv").write_text("nothing")  # validate says so; here it is no weight
    with pytest.raises(InputError, match="the body weight is not given"):
        to_suv(read_volume(image))
    save_json(tree / "sub-02" / "pet.json", {"InjectionStart": "soon"})
    with pytest.raises(InputError, match=r"sub-02.pet\.json: InjectionStart cannot be used"):
        read_volume(image)
    (tree / "sub-02" / "pet.json").write_text("{")
    with pytest.raises(InputError, match=r"sub-02.pet\.json: not valid JSON"):
        read_volume(image)
    assert read_volume(tree / "sub-01" / "pet" / image.name.replace("02", "01")).units == "Bq/mL"
