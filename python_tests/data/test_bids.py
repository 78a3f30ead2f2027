"""BIDS-PET trees: names, sidecars with inheritance, participants, pairs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pet_trees import NEW_DCM2NIIX, SIDECAR, bids_tree, nnunet_folder, save, save_json, scan

from petite_fast.data.bids import read_tree
from petite_fast.data.bids_sidecar import PetInfo, faults
from petite_fast.data.collection import find_layout, read_collection, read_inputs, read_pairs
from petite_fast.data.inheritance import entities_of, inherited_sidecar
from petite_fast.errors import InputError


def info(**changes: object) -> PetInfo:
    fields = {k: v for k, v in (SIDECAR | changes).items() if v is not None}
    return PetInfo(fields, {}, "sub-01_pet.json")


def texts(found: PetInfo, frames: int | None = None) -> list[str]:
    return [fault.text for fault in faults(found, frames) if fault.fatal]


def test_pairs_sessions_and_what_the_sidecars_say(tmp_path: Path) -> None:
    cases, problems = read_tree(bids_tree(tmp_path, subjects=2, sessions=2))
    assert problems == []
    assert [(c.subject, c.session) for c in cases] == [
        ("sub-01", "ses-1"),
        ("sub-01", "ses-2"),
        ("sub-02", "ses-1"),
        ("sub-02", "ses-2"),
    ]
    first = cases[0]
    assert first.image and first.image.name == "sub-01_ses-1_trc-FDG_rec-short_pet.nii.gz"
    assert first.pair and first.pair.name == "sub-01_ses-1"
    assert first.scanner == "GE MEDICAL SYSTEMS Discovery ST" and first.units == "Bq/mL"
    short, standard = first.infos["image"], first.infos["label"]
    assert (short.tracer, short.radionuclide, short.weight_kg) == ("FDG", "F18", 61)
    assert short.dose_bq == pytest.approx(388.8e6)
    assert (short.frame_durations_s, standard.frame_durations_s) == ((300,), (1800,))
    assert short.origin["FrameDuration"].endswith("_rec-short_pet.json")
    assert short.origin["Units"] == str(tmp_path / "pet.json")
    assert texts(short, 1) == texts(standard, 1) == []


def test_the_nearer_sidecar_wins_and_foreign_entities_do_not_apply(tmp_path: Path) -> None:
    image = save(tmp_path / "sub-01" / "ses-a" / "pet" / "sub-01_ses-a_trc-FDG_pet.nii", scan(1))
    save_json(tmp_path / "pet.json", {"Units": "a", "TracerName": "a", "A": 1})
    save_json(tmp_path / "trc-FDG_pet.json", {"Units": "b", "TracerName": "b"})
    save_json(tmp_path / "trc-PIB_pet.json", {"Units": "PIB"})
    save_json(tmp_path / "sub-01" / "sub-01_pet.json", {"Units": "c"})
    save_json(image.parent / "sub-01_ses-b_pet.json", {"Units": "ses-b"})
    found, problems = inherited_sidecar(tmp_path, image)
    assert problems == [] and found.fields == {"Units": "c", "TracerName": "b", "A": 1}


def test_frame_duration_decides_where_names_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "sub-01" / "pet"
    for rec, seconds in (("b", 300), ("a", 1800)):
        save(folder / f"sub-01_rec-{rec}_pet.nii.gz", scan(1))
        save_json(folder / f"sub-01_rec-{rec}_pet.json", {"FrameDuration": seconds})
    (case,), problems = read_tree(tmp_path)
    assert problems == []
    assert case.image and case.label and "rec-b" in case.image.name and "rec-a" in case.label.name


def test_what_makes_no_pair_is_said(tmp_path: Path) -> None:
    alone = save(tmp_path / "sub-01" / "pet" / "sub-01_pet.nii.gz", scan(1))
    standard = save(tmp_path / "sub-02" / "pet" / "sub-02_rec-standard_pet.nii.gz", scan(2))
    for rec in ("a", "b", "c"):
        save(tmp_path / "sub-03" / "pet" / f"sub-03_rec-{rec}_pet.nii.gz", scan(3))
    wrong = save(tmp_path / "sub-04" / "pet" / "sub-05_pet.nii.gz", scan(4))
    save(tmp_path / "sub-04" / "pet" / "sub-04_desc-petite_pet.nii.gz", scan(4))  # a result
    cases, problems = read_tree(tmp_path)
    where = {problem.where: problem.what for problem in problems}
    assert "the other half of the pair is missing" in where[str(alone)]
    assert "the other half of the pair is missing" in where[str(standard)]
    assert "does not fit the folder" in where[str(wrong)]
    assert "which is the short" in where[str(tmp_path / "sub-03" / "pet")] and len(where) == 4
    assert [c.image is None for c in cases] == [False, True, False, False, False]
    assert read_inputs(tmp_path) == [c.image for c in cases if c.image]
    with pytest.raises(InputError, match="the training split is empty"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "[" * 100_000])
def test_a_broken_sidecar_is_named(tmp_path: Path, content: str) -> None:
    path = bids_tree(tmp_path, 1) / "sub-01" / "pet" / "sub-01_trc-FDG_rec-short_pet.json"
    path.write_text(content)
    _, problems = read_tree(tmp_path)
    assert [p.where for p in problems] == [str(path)] and "JSON" in problems[0].what


@pytest.mark.parametrize("table", ["participant_id\tweight\nsub-01\theavy\n", "weight\n70\n"])
def test_a_broken_participants_table_is_named(tmp_path: Path, table: str) -> None:
    (bids_tree(tmp_path, 1) / "participants.tsv").write_text(table)
    cases, problems = read_tree(tmp_path)
    assert [Path(p.where).name for p in problems] == ["participants.tsv"]
    assert cases[0].infos["image"].weight_kg is None


def test_the_new_spelling_of_dcm2niix() -> None:
    found = PetInfo(NEW_DCM2NIIX, {}, "x.json")
    assert texts(found, 1) == [] and found.units == "Bq/mL" and found.dose_bq == 3.5e8
    notes = [fault.text for fault in faults(found) if not fault.fatal]
    assert len(notes) == 1 and "InjectedMass" in notes[0] and "TimeZero" not in notes[0]


FIELDS = {*SIDECAR, *NEW_DCM2NIIX, "AcquisitionTime", "PatientWeight"}
ENDS = [10, 20, 30, 60, 120, 300]
WRONG = {
    "no units": ({"Units": None}, "Units is missing"),
    "unknown units": ({"Units": "furlongs"}, "Units is 'furlongs'; expected one of Bq/mL"),
    "units are a number": ({"Units": 3}, "Units is 3; expected"),
    "frame ends": (
        {"ScanStart": 0, "FrameTimesStart": [0, *ENDS[:-1]], "FrameDuration": ENDS},
        "FrameDuration holds the ends of the frames",
    ),
    "overlap": (
        {"ScanStart": 0, "FrameTimesStart": [0, 10, 30], "FrameDuration": [10, 25, 30]},
        "FrameDuration lets frame 1 end at 35 s, after frame 2 starts at 30 s",
    ),
    "backwards": (
        {"ScanStart": 0, "FrameTimesStart": [10, 0], "FrameDuration": [10, 10]},
        "FrameTimesStart does not increase",
    ),
    "zero duration": ({"FrameDuration": [0]}, "FrameDuration holds 0; expected positive"),
    "no numbers": ({"FrameDuration": ["x"]}, "FrameDuration is no list of finite numbers"),
    "infinite": ({"FrameTimesStart": [float("inf")]}, "FrameTimesStart is no list of finite"),
    "huge": ({"FrameTimesStart": [10**400]}, "FrameTimesStart is no list of finite"),
    "time zero is no time": ({"TimeZero": "25:00:00"}, "TimeZero is '25:00:00'; expected a time"),
    "neither scan nor injection": (
        {"ScanStart": 1800, "InjectionStart": -20},
        r"TimeZero is neither the scan's start \(1800 s",
    ),
    "frame before the scan": ({"FrameTimesStart": [0]}, "expected no frame before the scan"),
    # dcm2niix issue 983: a late window of a long scan, time zero taken from AcquisitionTime
    "acquisition time": (
        {
            "TimeZero": "17:10:15",
            "AcquisitionTime": "17:10:15.0",
            "SeriesTime": "16:20:16.0",
            "ScanStart": 0,
            "FrameTimesStart": [0],
        },
        "TimeZero puts the scan's start 2999 s from SeriesTime",
    ),
    "no dose": ({"InjectedRadioactivity": -1}, "InjectedRadioactivity is -1; expected a positive"),
    "dose unit": ({"InjectedRadioactivityUnits": "cups"}, "InjectedRadioactivityUnits is 'cups'"),
    "weight": ({"PatientWeight": 0}, "PatientWeight is 0; expected kg"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_fields_are_named(case: str) -> None:
    changes, message = WRONG[case]
    found = texts(info(**changes))
    assert len(found) == 1 and re.search(message, found[0]), found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*SIDECAR, *NEW_DCM2NIIX, "PatientWeight"]), JSON))
def test_any_content_ends_in_faults_that_name_the_field(changes: dict[str, object]) -> None:
    found = PetInfo(SIDECAR | changes, {}, "x.json")
    for fault in faults(found, 1):
        assert fault.file == "x.json"
        assert not fault.fatal or fault.text.split()[0] in FIELDS


def test_midnight_is_no_wrong_time_zero() -> None:
    changes = {"TimeZero": "23:50:00", "SeriesTime": "00:20:00"}
    assert texts(info(**changes)) == []  # injected before midnight, scanned 1800 s later


def test_frames_are_counted() -> None:
    assert texts(info(), frames=2) == [
        "FrameTimesStart has 1 entries; expected 2, one per frame",
        "FrameDuration has 1 entries; expected 2, one per frame",
    ]


@pytest.mark.parametrize(
    "name", ["sub-01_T1w.nii.gz", "sub-01_pet.json", "pet.nii", "sub-_pet.nii"]
)
def test_other_names_are_no_pet_images(name: str) -> None:
    assert entities_of(Path(name)) is None


def test_nnunet_raw_folder(tmp_path: Path) -> None:
    collection = read_collection(nnunet_folder(tmp_path))
    assert collection.layout == "nnunet" and collection.problems == ()
    # file names may be those of patients
    assert {c.subject for c in collection.cases} == {f"case-{k:03d}" for k in range(1, 8)}
    assert collection.splits.test == {"case-006", "case-007"} and len(collection.splits.folds) == 5
    assert {c.units for c in collection.cases} == {"SUVbw"}
    assert len(read_pairs(tmp_path)) == 5 and len(read_pairs(tmp_path, 0, "validation")) == 1
    assert len(read_pairs(tmp_path, split="test")) == 1  # the other has no standard scan
    assert len(read_inputs(tmp_path, split="test")) == 2 and len(read_inputs(tmp_path)) == 7


def test_what_is_wrong_with_an_nnunet_folder_is_said(tmp_path: Path) -> None:
    root = nnunet_folder(tmp_path)
    (root / "labelsTr" / "MILLER_1.nii.gz").unlink()
    (root / "imagesTr" / "MILLER_2_0000.nii.gz").rename(root / "imagesTr" / "MILLER_2_0001.nii.gz")
    text = " ".join(map(str, read_collection(root).problems))
    for words in ("standard scan of this case is missing", "short scan of this", "first channel"):
        assert words in text
    assert "numTraining is 5; expected 4" in text


def test_layouts_are_told_apart(tmp_path: Path) -> None:
    assert find_layout(bids_tree(tmp_path / "bids", 1)) == "bids"
    assert find_layout(nnunet_folder(tmp_path / "nn", 1, 0)) == "nnunet"
    assert find_layout(save_json(tmp_path / "list.json", {})) == "decathlon"
    save_json(tmp_path / "folder" / "dataset.json", {})
    assert find_layout(tmp_path / "folder") == "decathlon"
    assert find_layout(tmp_path) is None
    with pytest.raises(InputError, match="no data set; expected a dataset JSON, a BIDS-PET tree"):
        read_collection(tmp_path)
