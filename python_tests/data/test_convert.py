"""Conversion between the layouts: same voxels, same splits, nothing about patients."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pet_trees import bids_tree, nnunet_folder, save, save_json, scan

from petite_fast.data import read_volume
from petite_fast.data.collection import Collection, Layout, read_collection, read_pairs
from petite_fast.data.convert import convert
from petite_fast.data.validate import validate
from petite_fast.errors import InputError

SECRET = "MILLER"
LAYOUTS: tuple[Layout, ...] = ("bids", "decathlon", "nnunet")


def voxels(collection: Collection) -> dict[str, list[bytes]]:
    """The voxels of each subject's files."""
    found: dict[str, list[bytes]] = {}
    for case in collection.cases:
        files = found.setdefault(case.subject, [])
        files += [read_volume(file).array.tobytes() for file in case.files]
    return found


def contents(root: Path) -> bytes:
    """Every name and every byte under `root`, volumes decompressed."""
    parts = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        parts.append(str(path.relative_to(root)).encode())
        plain = path.name.endswith(".nii.gz")
        parts.append(nib.load(path).to_bytes() if plain else path.read_bytes())
    return b"\n".join(parts)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_voxels_splits_units_and_scanner_survive(
    tmp_path: Path, first: Layout, second: Layout
) -> None:
    tree = bids_tree(tmp_path / "tree", subjects=4, sessions=2)
    convert(tree, tmp_path / "first", first)
    convert(tmp_path / "first", tmp_path / "second", second)
    before, after = read_collection(tree), read_collection(tmp_path / "second")
    assert after.layout == second and after.problems == ()
    assert voxels(after) == voxels(before) and after.splits == before.splits
    assert {c.units for c in after.cases} == {"Bq/mL"}
    assert {c.scanner for c in after.cases} == {"GE MEDICAL SYSTEMS Discovery ST"}
    if second != "nnunet":  # which has no sessions; its names keep them
        assert [c.session for c in after.cases] == [c.session for c in before.cases]
    for split in ("training", "validation", "test"):
        pairs = read_pairs(tmp_path / "second", 0, split)
        assert [p.name for p in pairs] == [p.name for p in read_pairs(tree, 0, split)]
    assert [p for p in validate(tmp_path / "second")[1] if p.fatal] == []


def test_a_bids_tree_keeps_what_quantification_needs(tmp_path: Path) -> None:
    tree = bids_tree(tmp_path / "tree", subjects=3)
    convert(tree, tmp_path / "out", "bids")
    for old, new in zip(
        read_collection(tree).cases, read_collection(tmp_path / "out").cases, strict=True
    ):
        for key in ("image", "label"):
            assert new.infos[key].fields == old.infos[key].fields  # weight and frames, too
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["DatasetType"] == "raw" and "BIDSVersion" in description


def decathlon(root: Path, **changes: object) -> Path:
    """A list with a patient's name wherever one can be."""
    entries = []
    for k in range(6):
        names = f"{SECRET}_{k}.nii.gz", f"{SECRET}_{k}_std.nii.gz"
        for name, factor in zip(names, (1, 2), strict=True):
            image = nib.load(save(root / name, factor * scan(k)))
            image.header["descrip"] = f"{SECRET}^JOHN"
            nib.save(image, root / name)
        entries.append({"image": names[0], "label": names[1], "subject": f"{SECRET}{k // 2}"})
    content = {"training": entries, "PatientName": SECRET, "units": "SUVbw"} | changes
    return save_json(root / "dataset.json", content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_that_identifies_a_patient_comes_along(tmp_path: Path, layout: Layout) -> None:
    source = decathlon(tmp_path / SECRET)
    out = tmp_path / "out"
    convert(source, out, layout)
    assert SECRET.encode() not in contents(out)
    collection = read_collection(out)
    assert {c.subject for c in collection.cases} == {"sub-001", "sub-002", "sub-003"}
    assert len({f for c in collection.cases for f in c.files}) == 12  # two visits each, all apart


def test_sidecar_fields_about_the_patient_stay_behind(tmp_path: Path) -> None:
    tree = bids_tree(tmp_path / "tree", 3)
    fields = {
        "PatientName": SECRET,
        "PatientID": SECRET,
        "AccessionNumber": SECRET,
        "InstitutionName": SECRET,
        "SeriesDescription": SECRET,
        "PatientBirthDate": "1950-01-01",
    }
    save_json(tree / "sub-01" / "sub-01_pet.json", fields)
    convert(tree, tmp_path / "out", "bids")
    text = contents(tmp_path / "out")
    assert SECRET.encode() not in text and b"1950" not in text and b"TracerName" in text


def test_nnunet_cases_without_a_standard_scan(tmp_path: Path) -> None:
    root = nnunet_folder(tmp_path / "nn")
    assert convert(root, tmp_path / "list", "decathlon") == []
    content = json.loads((tmp_path / "list" / "dataset.json").read_text())
    assert len(content["training"]) == 5 and len(content["test"]) == 2
    assert ["label" in entry for entry in content["test"]] == [True, False]
    (root / "labelsTr" / "MILLER_1.nii.gz").unlink()
    remarks = convert(root, tmp_path / "less", "nnunet")
    assert remarks == ["1 of 7 cases are no pair and were left out"]
    assert json.loads((tmp_path / "less" / "dataset.json").read_text())["numTraining"] == 4


def test_a_seed_splits_anew_and_keeps_the_test(tmp_path: Path) -> None:
    root = nnunet_folder(tmp_path / "nn", training=8)
    found = []
    for seed in (1, 2):
        convert(root, tmp_path / str(seed), "nnunet", seed)
        found.append(read_collection(tmp_path / str(seed)).splits)
    assert found[0].folds != found[1].folds
    assert found[0].test == found[1].test and len(found[0].test) == 2


def test_plain_lists_become_one_fold(tmp_path: Path) -> None:
    source = decathlon(tmp_path / "a")
    entries = json.loads(source.read_text())["training"]
    save_json(source, {"training": entries[:4], "validation": entries[4:], "units": "SUVbw"})
    convert(source, tmp_path / "b", "bids")
    splits = read_collection(tmp_path / "b").splits
    assert len(splits.folds) == 1 and splits.folds[0].validation == {"sub-003"}
    assert splits.test == frozenset()


def test_several_scanners_stay_several(tmp_path: Path) -> None:
    source = decathlon(tmp_path / "a")
    content = json.loads(source.read_text())
    for k, entry in enumerate(content["training"]):
        entry["scanner"] = f"scanner-{k % 2}"
    save_json(source, content)
    for layout in LAYOUTS:
        convert(source, tmp_path / layout, layout)
        source = tmp_path / layout
        cases = read_collection(source).cases
        assert [c.scanner for c in cases] == [f"scanner-{k % 2}" for k in range(6)], layout


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    source = decathlon(tmp_path / "a")
    with pytest.raises(InputError, match="not an empty folder"):
        convert(source, tmp_path / "a", "bids")
    entries = json.loads(source.read_text())["training"]
    save_json(source, {"training": entries[:3], "validation": entries[3:]})  # 1 subject in both
    with pytest.raises(InputError, match="MILLER1 in training and validation"):
        convert(source, tmp_path / "b", "bids")
    save_json(source, {"training": entries})
    (tmp_path / "a" / entries[3]["label"]).write_text("no longer a volume")
    with pytest.raises(InputError, match="_3_std.nii.gz: the file is not gzip"):
        convert(source, tmp_path / "b", "bids")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # nothing half-written
    save_json(source, {"training": []})
    with pytest.raises(InputError, match="nothing to convert"):
        convert(source, tmp_path / "b", "bids")
    assert not (tmp_path / "b").exists()


def test_real_scans_of_three_scanners(test_data: Path, tmp_path: Path) -> None:
    """The three voxel sizes of the IBSI patients are three scanners, told by the BIDS tree."""
    found = sorted(test_data.glob("ibsi-sts/STS_00[1-6]/PET_image.nii.gz"))
    if len(found) != 6:
        pytest.skip(f"no IBSI scans under {test_data}")
    entries = []
    for k, path in enumerate(found):
        volume = read_volume(path)
        short = save(tmp_path / f"{k}.nii.gz", volume.array * 0.9, volume.spacing)
        label = save(tmp_path / f"{k}_std.nii.gz", volume.array, volume.spacing)
        names = {"image": short.name, "label": label.name, "subject": path.parent.name}
        entries.append(names | {"scanner": f"GE {volume.spacing[0]:.2f}"})
    source = save_json(tmp_path / "dataset.json", {"training": entries, "units": "SUVbw"})
    convert(source, tmp_path / "bids", "bids")
    collection, problems = validate(tmp_path / "bids")
    assert [p for p in problems if p.fatal] == []
    assert {c.scanner for c in collection.cases} == {"GE 5.47", "GE 4.69", "GE 3.91"}
    for case, path in zip(collection.cases, found, strict=True):
        assert case.label is not None
        np.testing.assert_array_equal(read_volume(case.label).array, read_volume(path).array)
    for entry in entries:
        entry["scanner"] = "GE"
    save_json(source, {"training": entries, "units": "SUVbw"})
    (problem,) = (p for p in validate(source)[1] if p.fatal)
    assert problem.where == "scanner GE" and "voxel sizes differ: " in problem.what
    assert all(size in problem.what for size in ("5.469x", "4.688x", "3.906x"))
