"""Validation: every problem at once, none in a sound data set."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pet_trees import SIDECAR, bids_tree, nnunet_folder, save, save_json, scan

from petite_fast.data.validate import validate
from petite_fast.errors import InputError


def fatal(data: Path) -> list[str]:
    return [str(problem) for problem in validate(data)[1] if problem.fatal]


def test_a_sound_tree_has_no_problem(tmp_path: Path) -> None:
    collection, problems = validate(bids_tree(tmp_path, sessions=2))
    assert len(collection.cases) == 10 and problems == []


def test_every_problem_of_a_tree_is_listed_at_once(tmp_path: Path) -> None:
    tree = bids_tree(tmp_path, subjects=8)

    def image(k: int, kind: str) -> Path:
        return tree / f"sub-{k:02d}" / "pet" / f"sub-{k:02d}_trc-FDG_rec-{kind}_pet.nii.gz"

    def sidecar(k: int, kind: str, **fields: object) -> None:
        save_json(image(k, kind).with_name(image(k, kind).name[:-7] + ".json"), fields)

    image(1, "standard").unlink()
    save(image(2, "standard"), scan(2), (2.0, 2.0, 3.5))
    save(image(3, "short"), np.zeros((12, 10, 9)))
    array = scan(4)
    array[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(array, np.diag([2, 2, 3, 1])), image(4, "short"))
    image(5, "short").write_text("<!DOCTYPE html>")
    save(image(6, "short"), 2 * scan(71))  # the standard scan of subject 7
    sidecar(7, "short", Units="SUV", FrameDuration=300)
    sidecar(8, "short", FrameTimesStart=[1800, 1810], FrameDuration=[1810, 1820])
    sidecar(8, "standard", TimeZero="noon")
    save_json(
        tree / "splits.json",
        {"folds": [{"training": ["sub-01", "sub-02"], "validation": ["sub-02"]}], "test": ["x"]},
    )
    found = fatal(tree)
    expected = [
        (image(1, "short"), "the other half of the pair is missing"),
        (image(2, "short"), "different grids (12x10x9 voxels of 2x2x3 mm"),
        (image(3, "short"), "no voxel is above zero"),
        (image(4, "short"), "1 voxels are NaN or Inf"),
        (image(5, "short"), "an HTML or XML page"),
        ("", "the same voxels as in"),
        (image(7, "short").name[:-7] + ".json", "Units differ: SUVbw and, of the standard scan"),
        (image(8, "short").name[:-7] + ".json", "FrameDuration holds the ends of the frames"),
        (image(8, "short").name[:-7] + ".json", "FrameDuration has 2 entries; expected 1"),
        (image(8, "short").name[:-7] + ".json", "FrameTimesStart has 2 entries; expected 1"),
        (image(8, "standard").name[:-7] + ".json", "TimeZero is 'noon'; expected a time of day"),
        ("scanner GE MEDICAL SYSTEMS Discovery ST", "voxel sizes differ: 2x2x3 mm (12 files"),
        ("", "sub-02 in training and validation of fold 0"),
        ("", "the splits name x, of whom there is no scan"),
    ]
    for where, what in expected:
        assert [p for p in found if str(where) in p and what in p], (where, what, found)
    assert len(found) == len(expected), found


def test_units_and_files_of_lists(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", scan(1))
    save(tmp_path / "b.nii.gz", scan(1))
    entries = [
        {"image": "a.nii.gz", "label": "b.nii.gz", "subject": "s1"},
        {"image": "a.nii.gz", "label": "gone.nii.gz", "subject": "s2"},
        {"image": "b.nii.gz"},
        "c.nii.gz",
    ]
    path = save_json(tmp_path / "dataset.json", {"training": entries, "validation": entries[:1]})
    found = " | ".join(fatal(path))
    for words in (
        '"units" is missing (4 of 4 cases)',
        "gone.nii.gz: no such file",
        'entry 3 of "training" has no "label"',
        'entry 4 of "training" has no "image"',
        "s1 in training and validation",
        "a.nii.gz: the same voxels as in",
    ):
        assert words in found, found
    save_json(path, {"training": 3, "units": "Bq/mL"})
    found = " | ".join(fatal(path))
    assert '"training" is no list' in found and "no entry names a file" in found


def test_doses_may_share_a_standard_scan(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path / f"{number}.nii.gz", scan(number))
    entries = [{"image": f"{k}.nii.gz", "label": "3.nii.gz", "subject": "s"} for k in (1, 2)]
    path = save_json(tmp_path / "dataset.json", {"training": entries, "units": "SUVbw"})
    assert fatal(path) == []
    save_json(path, {"training": [*entries, entries[0]], "units": "SUVbw"})
    (problem,) = fatal(path)
    assert problem.startswith(f"{tmp_path / '1.nii.gz'}: the same voxels as in")


def test_a_pair_of_one_image_is_a_duplicate_and_nnunet_is_looked_at(tmp_path: Path) -> None:
    root = nnunet_folder(tmp_path)
    assert fatal(root) == []
    save(root / "labelsTr" / "MILLER_0.nii.gz", scan(0))  # the input as its own target
    content = json.loads((root / "dataset.json").read_text())
    save_json(root / "dataset.json", content | {"channel_names": {"0": "PET", "1": "CT"}})
    first, second = fatal(root)
    assert "channel_names" in first and "MILLER_0" in second and "the same voxels" in second


def test_what_bids_asks_for_and_we_do_not_need_is_a_note(tmp_path: Path) -> None:
    tree = bids_tree(tmp_path, 3)
    save_json(tree / "pet.json", {k: v for k, v in SIDECAR.items() if k != "AcquisitionMode"})
    problems = validate(tree)[1]
    assert {p.fatal for p in problems} == {False} and len(problems) == 6
    assert all("AcquisitionMode" in p.what for p in problems)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data set"):
        validate(tmp_path)
