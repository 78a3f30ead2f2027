"""Standardised uptake values: the known answer, and no guess where a fact is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import expected, make_series
from pydicom.dataset import Dataset

from petite_fast.data import read_volume, to_static, to_suv
from petite_fast.errors import InputError

WEIGHT, DOSE, HALF_LIFE = 70_000.0, 3.5e8, 6588.0  # g, Bq, s
FACTOR = WEIGHT / (DOSE * 2 ** (-3600 / HALF_LIFE))  # injected at 10:00, SeriesTime 11:00


def injection(ds: Dataset) -> Dataset:
    return ds.RadiopharmaceuticalInformationSequence[0]


def series(tmp_path: Path, frames: int = 1, injected: dict | None = None, **elements: object):
    """A series with elements changed; None deletes one."""

    def change(ds: Dataset, n: int) -> None:
        for target, changes in ((ds, elements), (injection(ds), injected or {})):
            for keyword, value in changes.items():
                if value is None:
                    del target[keyword]
                else:
                    setattr(target, keyword, value)

    return read_volume(make_series(tmp_path / "s", change, frames))


def factor(volume) -> float:
    """SUV over stored values; the same in every voxel."""
    ratio = to_suv(volume).array / np.where(volume.array == 0, 1, volume.array)
    np.testing.assert_allclose(ratio[volume.array != 0], ratio.max(), rtol=1e-6)
    return float(ratio.max())


def refused(volume, *words: str, kind: str = "bw") -> None:
    with pytest.raises(InputError) as caught:
        to_suv(volume, kind)
    for word in ("no SUV", "expected", *words):
        assert word in str(caught.value), str(caught.value)


def test_real_whole_body_series_has_the_known_answer(test_data: Path) -> None:
    """IBSI released the same patient in SUV, cropped and cast by other software."""
    volume = to_suv(read_volume(test_data / "wholebody-dicom"))
    known = read_volume(test_data / "ibsi-sts" / "STS_001" / "PET_image.nii.gz").array
    lps, reference = volume.array[::-1, ::-1], known[::-1, ::-1].astype(np.float64)
    x, y, z = reference.shape
    ours = lps[59 : 59 + x, 45 : 45 + y, :z].astype(np.float64)
    assert (ours * reference).sum() / (reference**2).sum() == pytest.approx(1, abs=1e-4)
    assert np.abs(ours - reference).max() < 1e-3 * reference.max()
    assert volume.units == "SUVbw"
    tracer = volume.tracer
    assert tracer is not None and tracer.elapsed_s == (2711.0,)


def test_start_counts_from_series_time_not_acquisition_time(tmp_path: Path) -> None:
    volume = series(tmp_path, AcquisitionTime="111500")
    assert factor(volume) == pytest.approx(FACTOR, rel=1e-6)


def test_administration(tmp_path: Path) -> None:
    assert factor(series(tmp_path, DecayCorrection="ADMIN")) == pytest.approx(WEIGHT / DOSE)


def test_values_without_decay_correction(tmp_path: Path) -> None:
    volume = series(tmp_path, 2, DecayCorrection="NONE", CorrectedImage=["ATTN"])
    rate, length = math.log(2) / HALF_LIFE, 300.0
    # activity at the mean rate of counts: the mean of 2^-t over the frame
    mean = (1 - math.exp(-rate * length)) / (rate * length)
    suv = to_suv(volume).array
    for t in range(2):
        dose = DOSE * math.exp(-rate * (3600 + 300 * t)) * mean
        np.testing.assert_allclose(suv[t], expected(2)[t] * WEIGHT / dose, rtol=1e-5)


def test_midnight(tmp_path: Path) -> None:
    injected = {"RadiopharmaceuticalStartTime": "233000"}
    volume = series(tmp_path, 1, injected, SeriesTime="003000", AcquisitionTime="003000")
    assert factor(volume) == pytest.approx(FACTOR, rel=1e-6)


def test_start_date_time_counts_if_its_date_can_be_true(tmp_path: Path) -> None:
    two_hours = WEIGHT / (DOSE * 2 ** (-7200 / HALF_LIFE))
    dated = {"RadiopharmaceuticalStartDateTime": "20240310090000"}
    assert factor(series(tmp_path / "a", 1, dated)) == pytest.approx(two_hours, rel=1e-6)
    shifted = {"RadiopharmaceuticalStartDateTime": "19990101100000"}  # de-identified
    assert factor(series(tmp_path / "b", 1, shifted)) == pytest.approx(FACTOR, rel=1e-6)
    alone = {**shifted, "RadiopharmaceuticalStartTime": None}
    assert factor(series(tmp_path / "c", 1, alone)) == pytest.approx(FACTOR, rel=1e-6)


def test_series_stored_after_processing(tmp_path: Path) -> None:
    """SeriesTime after the acquisition means nothing; frames tell the start."""
    late = series(tmp_path / "a", SeriesTime="150000")
    rate = math.log(2) / HALF_LIFE
    middle = math.log(300 * rate / (1 - math.exp(-300 * rate))) / rate
    elapsed = 3600 - 149 + middle
    known = WEIGHT / (DOSE * 2 ** (-elapsed / HALF_LIFE))
    assert factor(late) == pytest.approx(known, rel=1e-6)

    def ge(ds: Dataset, n: int) -> None:
        ds.SeriesTime = "150000"
        block = ds.private_block(0x0009, "GEMS_PETD_01", create=True)
        block.add_new(0x0D, "DT", "20240310105000")

    volume = read_volume(make_series(tmp_path / "b", ge))
    assert factor(volume) == pytest.approx(WEIGHT / (DOSE * 2 ** (-3000 / HALF_LIFE)), rel=1e-6)

    def unclear(ds: Dataset, n: int) -> None:
        ds.SeriesTime, ds.AcquisitionTime = "150000", f"{110000 + 100 * n}"

    refused(read_volume(make_series(tmp_path / "c", unclear)), "slices disagree")


def philips(ds: Dataset, suv: float, activity: float) -> None:
    ds.Units = "CNTS"
    block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x00, "DS", str(suv))
    block.add_new(0x09, "DS", str(activity))


def test_philips_counts(tmp_path: Path) -> None:
    direct = read_volume(make_series(tmp_path / "a", lambda ds, n: philips(ds, 0.0025, 3.0)))
    assert direct.units == "counts" and factor(direct) == pytest.approx(0.0025)
    scaled = read_volume(make_series(tmp_path / "b", lambda ds, n: philips(ds, 0, 3.0)))
    assert scaled.units == "Bq/mL"
    np.testing.assert_allclose(scaled.array, 3 * expected()[0])
    assert factor(scaled) == pytest.approx(FACTOR, rel=1e-6)
    refused(series(tmp_path / "c", Units="CNTS"), "counts")


def test_suv_is_passed_on(tmp_path: Path) -> None:
    volume = series(
        tmp_path, Units="GML", SUVType="BW", PatientWeight=None, DecayCorrection="ADMIN"
    )
    assert volume.units == "SUVbw" and to_suv(volume) is volume
    refused(volume, "body weight is not given", kind="bsa")


@pytest.mark.parametrize(("sex", "base", "slope"), [("F", 8780, 244), ("M", 6680, 216)])
def test_lean_body_mass_and_surface(tmp_path: Path, sex: str, base: int, slope: int) -> None:
    volume = series(tmp_path, PatientSex=sex)
    weight, body = to_suv(volume).array, to_suv(volume, "lbm")
    lean = 9270 * 70 / (base + slope * 70 / 1.75**2)
    np.testing.assert_allclose(body.array, weight * lean / 70, rtol=1e-6)
    surface = 0.007184 * 70**0.425 * 175**0.725 * 1e4  # Du Bois, cm^2
    bsa = to_suv(volume, "bsa")
    np.testing.assert_allclose(bsa.array, weight * surface / 70_000, rtol=1e-6)
    assert (body.units, bsa.units) == ("SUVlbm", "SUVbsa")
    back = to_suv(bsa).array  # from one kind to another by the masses
    np.testing.assert_allclose(back, weight, rtol=1e-6)


def test_dynamic_series(tmp_path: Path) -> None:
    volume = to_suv(series(tmp_path, 3))
    np.testing.assert_allclose(volume.array, expected(3) * FACTOR, rtol=1e-6)


# Nothing is guessed


@pytest.mark.parametrize(
    ("elements", "injected", "words"),
    [
        ({"PatientWeight": None}, {}, ["weight is not given"]),
        ({"PatientWeight": -70}, {}, ["weight is -70 kg"]),
        ({"PatientWeight": 0}, {}, ["weight is 0"]),
        ({"PatientWeight": 70_000}, {}, ["weight is 70000"]),
        ({}, {"RadionuclideTotalDose": None}, ["dose is not given"]),
        ({}, {"RadionuclideTotalDose": -1e8}, ["dose is -1e+08"]),
        ({}, {"RadionuclideTotalDose": 350}, ["dose is 350 Bq"]),  # MBq
        ({}, {"RadionuclideHalfLife": 109.8}, ["half-life is 109.8", "F18"]),  # minutes
        ({}, {"RadionuclideHalfLife": -5}, ["half-life"]),
        ({}, {"RadionuclideHalfLife": None, "RadionuclideCodeSequence": None}, ["half-life"]),
        ({}, {"RadiopharmaceuticalStartTime": None}, ["time of injection"]),
        ({}, {"RadiopharmaceuticalStartTime": "113000"}, ["after the start of the scan"]),
        (
            {},
            {"RadionuclideHalfLife": 282276, "RadionuclideCodeSequence": None},
            ["no usable date"],
        ),
        ({"DecayCorrection": None}, {}, ["DecayCorrection is not given"]),
        ({"Units": "PROPCPS"}, {}, ["units"]),
        ({"CorrectedImage": ["DECY"]}, {}, ["ATTN"]),
        ({"CorrectedImage": ["ATTN"]}, {}, ["DECY"]),
    ],
)
def test_missing_or_impossible_facts(
    tmp_path: Path, elements: dict, injected: dict, words: list[str]
) -> None:
    volume = series(tmp_path, 1, injected, **elements)
    assert volume.array.max() > 0  # the image itself can be read
    refused(volume, *words)


def test_missing_height_and_sex(tmp_path: Path) -> None:
    volume = series(tmp_path)
    tracer = volume.tracer
    assert tracer is not None
    refused(replace(volume, tracer=replace(tracer, height_m=None)), "height", kind="lbm")
    refused(replace(volume, tracer=replace(tracer, height_m=175.0)), "175 m", kind="bsa")
    refused(replace(volume, tracer=replace(tracer, sex=None)), "sex", kind="lbm")
    with pytest.raises(ValueError, match="kind is 'ideal'"):
        to_suv(volume, "ideal")  # type: ignore[arg-type]


def test_nuclide_gives_the_half_life(tmp_path: Path) -> None:
    volume = series(tmp_path, 1, {"RadionuclideHalfLife": None})
    known = WEIGHT / (DOSE * 2 ** (-3600 / 6586.2))
    assert factor(volume) == pytest.approx(known, rel=1e-6)


def test_image_without_any_facts(tmp_path: Path) -> None:
    from petite_fast.data import write_volume

    plain = read_volume(write_volume(np.ones((3, 3, 3)), np.eye(4), tmp_path / "a.nii"))
    refused(plain, "units are not given")
    refused(replace(plain, units="Bq/mL"), "weight")


def test_lean_body_mass_of_another_formula_is_not_converted(tmp_path: Path) -> None:
    volume = series(tmp_path, Units="GML", SUVType="LBM")
    assert to_suv(volume, "lbm") is volume
    refused(volume, "which formula")


def test_frame_times_do_not_need_the_injection(tmp_path: Path) -> None:
    unknown = {"RadiopharmaceuticalStartTime": None, "RadionuclideHalfLife": None}
    volume = series(tmp_path, 3, {**unknown, "RadionuclideCodeSequence": None})
    assert volume.timing is not None and volume.timing.start_s == (0, 300, 600)
    assert to_static(volume).shape == volume.shape[1:]
    refused(volume, "half-life")


def test_text_in_a_time_is_not_quoted(tmp_path: Path) -> None:
    volume = series(tmp_path, 1, {"RadiopharmaceuticalStartTime": None})

    def change(ds: Dataset, n: int) -> None:
        ds.RadiopharmaceuticalInformationSequence[0].add_new(0x00181072, "LO", "DOE^JANE")

    volume = read_volume(make_series(tmp_path / "t", change))
    with pytest.raises(InputError) as caught:
        to_suv(volume)
    assert "date or time" in str(caught.value) and "DOE" not in str(caught.value)
