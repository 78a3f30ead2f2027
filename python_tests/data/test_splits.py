"""Splits: by subject, seeded, validation and test apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from pet_trees import bids_tree, save_json

from petite_fast.data.collection import read_collection, read_pairs
from petite_fast.data.splits import Fold, Splits, parse_splits, read_splits, split_subjects
from petite_fast.errors import InputError


@pytest.mark.parametrize("count", [3, 4, 5, 10, 23])
def test_every_subject_is_in_one_part(count: int) -> None:
    names = {f"sub-{k:02d}" for k in range(count)}
    splits = split_subjects(names)
    assert splits.faults() == [] and splits.subjects == names
    assert len(splits.test) == max(1, round(count / 5))
    validated = [name for fold in splits.folds for name in sorted(fold.validation)]
    assert sorted(validated) == sorted(names - splits.test)  # once each, and no test subject
    for fold in splits.folds:
        assert fold.training | fold.validation == names - splits.test and fold.training


def test_seeded_and_independent_of_order_and_repetition() -> None:
    names = [f"sub-{k:02d}" for k in range(12)]
    assert split_subjects(names, 3) == split_subjects([*reversed(names), *names], 3)
    assert len({split_subjects(names, seed) for seed in range(5)}) == 5


def test_a_given_test_stays() -> None:
    names = [f"sub-{k}" for k in range(6)]
    splits = split_subjects(names, test=frozenset(["sub-5", "other"]))
    assert splits.test == {"sub-5", "other"} and splits.subjects == {*names, "other"}


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]])
def test_fewer_than_three_subjects_are_not_split(names: list[str]) -> None:
    assert split_subjects(names) == Splits()


def test_visits_of_a_subject_stay_together(tmp_path: Path) -> None:
    tree = bids_tree(tmp_path, subjects=4, sessions=2)
    for fold in range(len(read_collection(tree).splits.folds)):
        parts = [read_pairs(tree, fold, split) for split in ("training", "validation", "test")]
        subjects = [{pair.subject for pair in part} for part in parts]
        assert sum(map(len, subjects)) == 4 == len(set.union(*subjects))
        assert [len(part) for part in parts] == [2 * len(s) for s in subjects]
    assert {p.subject for p in read_pairs(tree)} == subjects[0] | subjects[1]  # not the test
    with pytest.raises(InputError, match="no fold was chosen; expected fold 0 to 2"):
        read_pairs(tree, None, "validation")
    with pytest.raises(InputError, match="no fold 3; expected one of 3 folds"):
        read_pairs(tree, 3)


def test_splits_of_the_folder_are_used(tmp_path: Path) -> None:
    tree = bids_tree(tmp_path, subjects=3)
    splits = Splits((Fold(frozenset(["sub-03"]), frozenset(["sub-01"])),), frozenset(["sub-02"]))
    save_json(tree / "splits.json", splits.to_json())
    assert read_splits(tree) == splits == read_collection(tree).splits
    assert [p.subject for p in read_pairs(tree, 0, "validation")] == ["sub-01"]
    shared = Splits((Fold(frozenset(["sub-02"]), frozenset(["sub-01"])),), frozenset(["sub-02"]))
    save_json(tree / "splits.json", shared.to_json())
    with pytest.raises(InputError, match="sub-02 in training of fold 0 and the test"):
        read_pairs(tree, 0)


@pytest.mark.parametrize("content", [[], {}, {"folds": 1}, {"folds": [[]]}, {"folds": [{}]}])
def test_broken_splits_are_refused(content: object) -> None:
    with pytest.raises(InputError, match="s.json.*expected"):
        parse_splits(content, "s.json")
