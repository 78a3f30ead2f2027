"""Dataset JSON: folds, plain decathlon lists, and every way to get them wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petite_fast.data import Pair, read_collection, read_datalist
from petite_fast.errors import InputError

WriteList = Callable[..., Path]


def test_folds_choose_subjects(write_list: WriteList, pairs: list[Pair]) -> None:
    path = write_list()
    assert read_datalist(path, 0, "training") == pairs[:3]
    assert read_datalist(path, 0, "validation") == pairs[3:]
    assert read_datalist(path, 1, "validation") == pairs[:1]
    assert read_datalist(path) == pairs


def test_plain_decathlon_list(write_list: WriteList, pairs: list[Pair]) -> None:
    entries = [{"image": str(p.image), "label": str(p.label)} for p in pairs]
    path = write_list(folds=None, training=entries[:4], validation=entries[4:])
    training, validation = read_datalist(path), read_datalist(path, split="validation")
    assert [p.image for p in training] == [p.image for p in pairs[:4]]  # absolute paths work
    assert [p.subject for p in training + validation] == [
        "training-001",
        "training-002",
        "training-003",
        "training-004",
        "validation-001",
    ]


def test_every_missing_file_is_listed(write_list: WriteList, pairs: list[Pair]) -> None:
    path = write_list()
    pairs[0].image.unlink()
    pairs[2].label.unlink()
    pairs[4].label.unlink()  # in the other half of fold 0
    with pytest.raises(InputError, match="2 files do not exist") as caught:
        read_datalist(path, 0, "training")
    assert str(pairs[0].image) in str(caught.value) and str(pairs[2].label) in str(caught.value)


ENTRY = {"image": "in_1.nii.gz", "label": "out_1.nii.gz"}
BAD_LISTS = {
    "no training": ({"training": None}, None, "training", 'no list "training"'),
    "training is no list": ({"training": {"a": 1}}, None, "training", 'no list "training"'),
    "no validation": ({"folds": None}, None, "validation", 'no list "validation"'),
    "entry without label": ({"training": [{"image": "x"}]}, None, "training", 'entry 1 .* "label"'),
    "entry is a string": ({"training": ["x.nii"]}, None, "training", 'entry 1 .* "image"'),
    "image is a list": (
        {"training": [ENTRY, {**ENTRY, "image": ["x"]}]},
        None,
        "training",
        'entry 2 .* "image"',
    ),
    "empty": ({"training": [], "folds": None}, None, "training", "empty"),
    "fold without folds": ({"folds": None}, 0, "training", "fold 0"),
    "no such fold": ({}, 2, "training", "no fold 2; expected one of 2 folds"),
    "negative fold": ({}, -1, "training", "no fold -1"),
    "folds is no list": ({"folds": {"0": 1}}, 0, "training", "folds. is no list"),
    "folds is no list, none asked": ({"folds": 3}, None, "validation", "folds. is no list"),
    "fold without halves": ({"folds": [{}]}, 0, "training", 'no list "training"'),
    "validation without fold": ({}, None, "validation", "no fold was chosen"),
    "subject in both halves": (
        {"folds": [{"training": ["sub-01"], "validation": ["sub-01"]}]},
        0,
        "training",
        "sub-01.* in training and validation",
    ),
    "unknown subject": (
        {"folds": [{"training": ["sub-99"], "validation": []}]},
        0,
        "training",
        "unknown subjects .*sub-99",
    ),
    "empty half": (
        {"folds": [{"training": ["sub-01"], "validation": []}]},
        0,
        "validation",
        "empty",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_wrong_content_is_refused_in_one_sentence(write_list: WriteList, case: str) -> None:
    changes, fold, split, message = BAD_LISTS[case]
    path = write_list(**changes)
    with pytest.raises(InputError, match=message) as caught:
        read_datalist(path, fold, split)
    text = str(caught.value)
    assert text.startswith(str(path)) and "expected" in text and "\n" not in text


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1, 2]", b"null"])
def test_bad_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError, match="d.json: .*expected"):
        read_datalist(tmp_path / "d.json")


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_datalist(tmp_path / "d.json")


def test_split_is_checked(write_list: WriteList) -> None:
    with pytest.raises(ValueError, match="'holdout'"):
        read_datalist(write_list(), 0, "holdout")


def test_the_test_is_the_same_in_every_fold(write_list: WriteList, pairs: list[Pair]) -> None:
    entries = [
        {"image": p.image.name, "label": p.label.name, "subject": p.subject, "session": "ses-1"}
        for p in pairs
    ]
    folds = [{"training": ["sub-01", "sub-02"], "validation": ["sub-03"]}]
    path = write_list(training=entries[:3], test=entries[3:], folds=folds)
    assert [p.name for p in read_datalist(path, 0, "test")] == ["sub-04_ses-1", "sub-05_ses-1"]
    assert [p.subject for p in read_datalist(path, split="test")] == ["sub-04", "sub-05"]
    assert [p.subject for p in read_datalist(path)] == ["sub-01", "sub-02", "sub-03"]


@pytest.mark.parametrize("key", ["validation", "test"])
def test_a_subject_in_two_lists_is_refused(
    write_list: WriteList, pairs: list[Pair], key: str
) -> None:
    entries = [{"image": p.image.name, "label": p.label.name, "subject": "sub-A"} for p in pairs]
    path = write_list(folds=None, training=entries[:2], **{key: entries[2:]})
    with pytest.raises(InputError, match=f"sub-A in training and .*{key}; expected each subject"):
        read_datalist(path, split=key)


def test_monai_reads_the_same_file(write_list: WriteList, pairs: list[Pair]) -> None:
    data = pytest.importorskip("monai.data")
    entries = data.load_decathlon_datalist(str(write_list()), data_list_key="training")
    assert [Path(e["image"]).resolve() for e in entries] == [p.image.resolve() for p in pairs]
    assert json.loads(json.dumps(entries[0]))["label"].endswith("out_1.nii.gz")


ENTRIES = st.lists(
    st.none()
    | st.text(max_size=4)
    | st.dictionaries(
        st.sampled_from(["image", "label", "subject", "session", "scanner", "units"]),
        st.none() | st.integers() | st.text(max_size=4) | st.just("in_1.nii.gz"),
    ),
    max_size=3,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(["training", "validation", "test", "folds", "units"]),
        st.none() | st.integers() | ENTRIES,
    )
)
def test_any_list_ends_in_cases_or_one_sentence(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    for split in ("training", "validation", "test"):
        with pytest.raises(InputError, match="expected"):  # no pair is whole
            read_datalist(path, split=split)
    try:
        collection = read_collection(path)
    except InputError as error:
        assert "expected" in str(error)
    else:
        assert collection.problems  # at least that no file is there
