"""Bad input: one clear sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from petite_fast.models import CVTGANDiscriminator, CVTGANGenerator, load_network, save_network

TRAIN = ("--fold", "0", "--patch", "16,16,16", "--batch", "2", "--steps", "3")
RNG = np.random.default_rng(5)


@pytest.fixture
def reconstruct_refused(project, refused, tmp_path):
    def refused_(scan: Path) -> str:
        sentence = refused("reconstruct", scan, "--base", project.base, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return sentence

    return refused_


def test_truncated_gzip(reconstruct_refused, scan) -> None:
    path = scan(RNG.random((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:-500])
    assert "truncated" in reconstruct_refused(path)


def test_html_saved_as_nifti(reconstruct_refused, tmp_path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_text("<!DOCTYPE html><html>Not Found</html>")
    assert "HTML" in reconstruct_refused(path)


def test_all_zero_volume(reconstruct_refused, scan) -> None:
    assert "no voxel is above zero" in reconstruct_refused(scan(np.zeros((20, 20, 20))))


def test_nan_voxels(reconstruct_refused, scan) -> None:
    array = RNG.random((20, 20, 20))
    array[3, 4, 5] = np.nan
    assert "NaN" in reconstruct_refused(scan(array))


def test_four_dimensions(reconstruct_refused, scan) -> None:
    assert "3-D" in reconstruct_refused(scan(RNG.random((20, 20, 20, 2))))


def test_no_such_input(reconstruct_refused, tmp_path) -> None:
    assert "no such file" in reconstruct_refused(tmp_path / "nothing.nii.gz")
    (tmp_path / "empty").mkdir()
    assert "no NIfTI" in reconstruct_refused(tmp_path / "empty")


def test_two_inputs_with_one_output_name(reconstruct_refused, scan, tmp_path) -> None:
    scan(RNG.random((20, 20, 20)), "in/a.nii")
    scan(RNG.random((20, 20, 20)), "in/a.nii.gz")
    assert "one output name" in reconstruct_refused(tmp_path / "in")


@pytest.fixture
def finetune_refused(project, refused, tmp_path):
    def refused_(data: Path, *options: object, base: Path | None = None) -> str:
        out = tmp_path / "run"
        command = ("finetune", "--base", base or project.base, "--data", data, "--out", out)
        sentence = refused(*command, *TRAIN, *options)
        assert not any(p.suffix in (".safetensors", ".json") for p in out.rglob("*"))
        return sentence

    return refused_


def listing(tmp_path: Path, *pairs: tuple[Path, Path]) -> Path:
    entries = [
        {"image": str(image), "label": str(label), "subject": f"s{i}"}
        for i, (image, label) in enumerate(pairs)
    ]
    subjects = [entry["subject"] for entry in entries]
    path = tmp_path / "dataset.json"
    fold = {"training": subjects, "validation": []}
    path.write_text(json.dumps({"training": entries, "folds": [fold]}))
    return path


def test_pair_on_different_grids(finetune_refused, scan, tmp_path) -> None:
    image = scan(RNG.random((20, 20, 20)), "a.nii.gz")
    label = scan(RNG.random((20, 20, 20)), "b.nii.gz", offset=7.0)
    assert "different grids" in finetune_refused(listing(tmp_path, (image, label)))


def test_json_with_missing_files(finetune_refused, scan, tmp_path) -> None:
    image = scan(RNG.random((20, 20, 20)), "a.nii.gz")
    data = listing(tmp_path, (image, tmp_path / "x.nii.gz"), (image, tmp_path / "y.nii.gz"))
    sentence = finetune_refused(data)
    assert "x.nii.gz" in sentence and "y.nii.gz" in sentence


def test_no_json(finetune_refused, tmp_path) -> None:
    assert "dataset JSON" in finetune_refused(tmp_path / "nothing.json")


def test_patch_larger_than_the_volume_is_padded(project, run, tmp_path) -> None:
    options = (*TRAIN, "--patch", "32,32,32")
    command = ("finetune", "--base", project.base, "--data", project.data, "--out", tmp_path)
    assert run(*command, *options).code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--patch", "20,16,16"), "multiples of 16"),
        (("--patch", "16,16"), "3 whole numbers"),
        (("--fold", "7"), "no fold 7"),
        (("--lr", "-1"), "--lr"),
        (("--steps", "0"), "--steps"),
        (("--rank", "0"), "r is 0"),
        (("--prompts", "0,0,0"), "num_prompts"),
        (("--recipe", "full", "--batch", "1"), "BatchNorm"),
        (("--resume", "nowhere"), "no training checkpoint"),
        (("--recipe", "magic"), "magic"),
    ],
)
def test_bad_options(options, words, finetune_refused, project) -> None:
    assert words in finetune_refused(project.data, *options)


def test_checkpoint_of_the_discriminator_given_as_generator(finetune_refused, project, tmp_path):
    path = tmp_path / "d.pt"
    torch.save({"state_dict": CVTGANDiscriminator().state_dict()}, path)
    assert "no generator" in finetune_refused(project.data, base=path)
    swapped = tmp_path / "swapped"
    shutil.copytree(project.base, swapped, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copy(swapped / "discriminator.safetensors", swapped / "generator.safetensors")
    assert "does not fit" in finetune_refused(project.data, base=swapped)


class Code:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_with_code_is_refused_and_not_run(finetune_refused, project, tmp_path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "g.pt"
    content = {"state_dict": Code(f"touch {trace}")}
    path.write_bytes(pickle.dumps(content))
    finetune_refused(project.data, base=path)
    torch.save(content, path)
    assert "code" in finetune_refused(project.data, base=path)
    assert not trace.exists()


def test_adapter_of_another_base(project, refused, tmp_path) -> None:
    loaded = load_network(project.base)
    other = CVTGANGenerator(**loaded.generator.config)
    save_network(tmp_path / "other", other, **loaded.metadata)
    scan = next((project.data.parent / "images").iterdir())
    network = ("--base", tmp_path / "other", "--adapter", project.adapter)
    sentence = refused("reconstruct", scan, *network, "--out", tmp_path / "out")
    assert "another base" in sentence and "sha256" in sentence
    refused("merge", *network, "--out", tmp_path / "merged")
    assert not (tmp_path / "out").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 3}, "adapter_model"),
        ({"target_modules": "nothing_like_it"}, "nothing_like_it"),
    ],
)
def test_adapter_with_a_wrong_config(change, words, project, refused, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(project.adapter / "adapter_model.safetensors", adapter)
    record = json.loads((project.adapter / "adapter_config.json").read_text())
    record["decoder"] |= change
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    scan = next((project.data.parent / "images").iterdir())
    network = ("--base", project.base, "--adapter", adapter)
    sentence = refused("reconstruct", scan, *network, "--out", tmp_path / "out")
    assert words in sentence or "lora_" in sentence
    assert not (tmp_path / "out").exists()


def test_evaluate_refusals(project, refused, scan, tmp_path) -> None:
    label = next((project.data.parent / "labels").iterdir())
    assert "either --data" in refused("evaluate", label)
    other = scan(RNG.random((20, 20, 20)))
    assert "different grids" in refused("evaluate", other, "--target", label)
    (tmp_path / "none").mkdir()
    sentence = refused("evaluate", tmp_path / "none", "--data", project.data, "--fold", 0)
    assert "reconstruct first" in sentence


def test_other_refusals(refused, run, tmp_path) -> None:
    assert "9999" in refused("simulate", "--scanner", "9999", "--out", tmp_path / "s")
    assert "no network at" in refused(
        "merge", "--base", tmp_path / "b", "--adapter", tmp_path, "--out", tmp_path / "m"
    )
    assert "--nonsense" in refused("info", "--nonsense")
    (tmp_path / "file").write_text("")
    sentence = refused("simulate", "--scanner", "63", "--reduce", 6, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in sentence


def test_unusable_device(project, refused, tmp_path) -> None:
    scan = next((project.data.parent / "images").iterdir())
    command = ("reconstruct", scan, "--base", project.base, "--out", tmp_path / "out")
    assert "--device" in refused(*command, "--device", "toaster")


def test_debug_shows_the_traceback(tmp_path) -> None:
    from petite_fast.cli import main
    from petite_fast.errors import InputError

    with pytest.raises(InputError):
        main(["--debug", "evaluate", str(tmp_path)])


def test_header_text_never_leaves(project, run, scan, tmp_path) -> None:
    path = scan(RNG.random((20, 20, 20)) + 1)
    image = nib.load(path)
    image.header["descrip"] = b"DOE^JANE 1960-01-01"
    nib.save(image, path)
    result = run("reconstruct", path, "--base", project.base, "--out", tmp_path / "out")
    assert result.code == 0
    written = tmp_path / "out" / "scan_desc-petite.nii.gz"
    assert b"DOE" not in nib.load(written).header.binaryblock
    assert "DOE" not in result.out + result.err
