"""validate and convert, and BIDS trees and nnU-Net folders wherever a data set is taken."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import pytest
from pet_trees import bids_tree, dynamic_tree, nnunet_folder, save, save_json, scan

from petite_fast import __version__
from petite_fast.data import read_volume
from petite_fast.models import load_network
from petite_fast.peft.io import state_sha256

SECRET = "MILLER"
TRAIN = ("--patch", "16,16,16", "--batch", "2", "--steps", "2")


@pytest.fixture
def tree(tmp_path) -> Path:
    root = bids_tree(tmp_path / "bids", subjects=3, sessions=2)
    fields = {"PatientName": SECRET, "InstitutionName": SECRET}
    save_json(root / "sub-01" / "sub-01_pet.json", fields)
    return root


def test_validate_tells_by_its_exit_code(tree, run) -> None:
    result = run("validate", tree)
    assert result.code == 0, result
    assert "bids: 6 cases of 3 subjects, 2 folds, 1 subjects in the test; no problems" in result.out
    (tree / "sub-01" / "ses-1" / "pet" / "sub-01_ses-1_trc-FDG_rec-short_pet.nii.gz").unlink()
    (tree / "sub-02" / "ses-1" / "pet" / "sub-02_ses-1_trc-FDG_rec-short_pet.nii.gz").write_text("")
    result = run("validate", tree)
    assert result.code == 1 and "2 problems" in result.out and result.err == ""
    assert result.out.count("problem: ") == 2


def test_simulated_data_is_sound(project, run) -> None:
    result = run("validate", project.data)
    assert result.code == 0 and "no problems" in result.out, result
    assert run("validate", project.data.parent).out == result.out  # the folder is the data set


def test_validate_of_nothing_is_one_sentence(refused, tmp_path) -> None:
    assert "no data set; expected" in refused("validate", tmp_path)
    assert "no such file" in refused("validate", tmp_path / "dataset.json")


def test_convert_there_and_back(project, run, refused, tmp_path) -> None:
    out = tmp_path / "bids"
    result = run("convert", project.data, out, "--to", "bids")
    assert result.code == 0 and result.out.split() == ["bids:", str(out)]
    assert run("convert", out, tmp_path / "back", "--to", "decathlon").code == 0
    before = json.loads(project.data.read_text())
    after = json.loads((tmp_path / "back" / "dataset.json").read_text())
    for key in ("folds", "scanner", "units"):
        assert after[key] == before[key]
    assert "not an empty folder" in refused("convert", project.data, out, "--to", "nnunet")


def test_a_tree_is_reconstructed_into_derivatives_and_evaluated(
    project, tree, run, tmp_path
) -> None:
    out = tree / "derivatives" / "petite_fast"
    network = ("--base", project.base, "--adapter", project.adapter, "--device", "cpu")
    result = run("reconstruct", tree, *network, "--out", out)
    assert result.code == 0 and len(result.out.split()) == 6, result
    name = "sub-02_ses-1_trc-FDG_rec-short_desc-petite_pet"
    written = out / "sub-02" / "ses-1" / "pet" / f"{name}.nii.gz"
    assert str(written) in result.out
    source = tree / "sub-02" / "ses-1" / "pet" / "sub-02_ses-1_trc-FDG_rec-short_pet.nii.gz"
    assert (nib.load(written).affine == nib.load(source).affine).all()
    sidecar = json.loads(written.with_name(f"{name}.json").read_text())
    assert sidecar["Units"] == "Bq/mL" and sidecar["FrameDuration"] == [300]
    assert sidecar["Sources"] == [f"bids:raw:sub-02/ses-1/pet/{source.name}"]
    assert sidecar["SkullStripped"] is False
    made = sidecar["PetiteFast"]
    base = state_sha256(load_network(project.base).generator.state_dict())
    assert made["base_sha256"] == base != made["network_sha256"]
    assert made["version"] == __version__ and made["normalisation"] == "paired"
    assert made["adapter"]["recipe"] == "petite" and made["adapter"]["scanner"] == "63"
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["DatasetLinks"] == {"raw": "../.."}
    texts = [p.read_text() for p in out.rglob("*.json")]
    assert len(texts) == 7 and not [text for text in texts if SECRET in text]
    assert not [text for text in texts if str(tmp_path) in text]
    # results inside the tree are not taken for scans
    assert run("validate", tree).code == 0
    report = tmp_path / "report.json"
    result = run("evaluate", out, "--data", tree, "--split", "test", "--out", report)
    assert result.code == 0, result
    names = [row["subject"] for row in json.loads(report.read_text())["subjects"]]
    assert len(names) == 2 and {n.partition("_")[2] for n in names} == {"ses-1", "ses-2"}
    judged = tmp_path / "judged"
    result = run("evaluate", out, "--data", tree, "--split", "test", "--out", judged)
    assert result.code == 0, result
    assert run("report", judged).code == 0
    page = (judged / "report.html").read_text(encoding="utf-8")
    assert "sub-001" in page and names[0] not in page and str(tmp_path) not in page


def test_a_base_alone_and_no_link_out_of_the_tree(project, tree, run, tmp_path) -> None:
    scan = tree / "sub-02" / "ses-1" / "pet" / "sub-02_ses-1_trc-FDG_rec-short_pet.nii.gz"
    out = tmp_path / "elsewhere"
    assert run("reconstruct", scan, "--base", project.base, "--out", out).code == 0
    (sidecar,) = out.rglob("*_pet.json")
    made = json.loads(sidecar.read_text())["PetiteFast"]
    assert made["adapter"] is None and made["base_sha256"] == made["network_sha256"]
    assert "DatasetLinks" not in json.loads((out / "dataset_description.json").read_text())


def test_training_takes_a_tree_and_never_its_test(project, tree, run, refused, tmp_path) -> None:
    out = tmp_path / "run"
    base = ("--base", project.base)
    assert run("finetune", *base, "--data", tree, "--fold", 0, "--out", out, *TRAIN).code == 0
    record = json.loads((out / "adapter_config.json").read_text())
    assert record["scanner"] == "GE MEDICAL SYSTEMS Discovery ST"
    (state,) = out.glob("checkpoints/*/state.json")
    trained = set(json.loads(state.read_text())["config"]["subjects"])
    assert len(trained) == 1  # of 3: one validates in fold 0, one is in the test
    sentence = refused("finetune", *base, "--data", tree, "--fold", 3, "--out", out, *TRAIN)
    assert "there is no fold 3; expected one of 2 folds" in sentence


def test_nnunet_folder_in_a_row(project, run, tmp_path) -> None:
    root = nnunet_folder(tmp_path / "nn", training=3, test=1)
    out = tmp_path / "out"
    network = ("--base", project.base, "--device", "cpu")
    assert run("reconstruct", root, *network, "--split", "test", "--out", out).code == 0
    assert [p.name for p in out.iterdir()] == ["MILLER_3_0000_desc-petite.nii.gz"]
    result = run("evaluate", out, "--data", root, "--split", "test")
    assert result.code == 0 and "case-004" in result.out and SECRET not in result.out


def test_dynamic_series_from_pairs_to_reconstruction(project, run, refused, tmp_path) -> None:
    tree, out = dynamic_tree(tmp_path / "bids"), tmp_path / "pairs"
    result = run("validate", tree)
    assert result.code == 1 and "a dynamic series of 6 frames" in result.out
    assert "petite-fast pairs" in result.out
    result = run("pairs", tree, "--out", out, "--short", 2, "--standard", "0-5")
    assert result.code == 0, result
    assert result.out.split() == ["decathlon:", f"{out}/dataset.json,", "of", "3", "scans"]
    result = run("validate", out)
    assert result.code == 0 and "3 cases of 3 subjects" in result.out, result
    derived = tmp_path / "derived"
    network = ("--base", project.base, "--device", "cpu", "--out", derived)
    assert "a dynamic series of 6 frames" in refused("reconstruct", tree, *network)
    assert run("reconstruct", tree, *network, "--frames", "1-2").code == 0
    (written,) = (derived / "sub-01").rglob("*_pet.nii.gz")
    result = read_volume(written)
    assert len(result.shape) == 3 and result.timing is not None
    assert (result.timing.start_s, result.timing.duration_s) == ((2100.0,), (600.0,))
    sidecar = json.loads(written.with_name(written.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["PetiteFast"]["frames"] == [1, 2]
    assert "expected numbers from 0" in refused("reconstruct", tree, *network, "--frames", "x")


def test_standard_scans_are_thinned(run, refused, tmp_path) -> None:
    for k in range(3):
        save(tmp_path / "in" / f"{SECRET}{k}.nii.gz", scan(k))
    out = tmp_path / "out"
    result = run("pairs", tmp_path / "in", "--out", out, "--dose", 4, "--dose", 10)
    assert result.code == 0, result
    content = json.loads((out / "dataset.json").read_text())
    assert content["pairs"] == {"dose_reduction": [4, 10], "counts_per_voxel": 100.0, "seed": 0}
    assert len(content["training"]) == 4 and len(content["test"]) == 2 and "folds" in content
    assert SECRET not in json.dumps(content)
    assert not [path for path in out.rglob("*") if SECRET in path.name]
    assert "not an empty folder" in refused("pairs", tmp_path / "in", "--out", out, "--dose", 4)
    assert "expected one of them" in refused("pairs", tmp_path / "in", "--out", tmp_path / "b")
    assert "no such file" in refused("pairs", tmp_path / "c", "--out", tmp_path / "b", "--dose", 4)
