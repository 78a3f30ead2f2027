"""UNETR through the commands: a tiny one, on the scans of the project."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("monai")

from petite_fast.models import UNETR, load_network, save_network, unetr

TRAIN = ("--fold", "0", "--patch", "32,16,16", "--batch", "1", "--steps", "2")
SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "feature_size": 4}


class TinyUNETR(UNETR):
    """A UNETR whose default sizes are tiny."""

    def __init__(self, img_size, **sizes) -> None:
        super().__init__(img_size, **{**SIZES, **sizes})


@pytest.fixture
def base(tmp_path) -> Path:
    save_network(tmp_path / "base", UNETR((32, 16, 16), **SIZES), patch=[32, 16, 16])
    return tmp_path / "base"


def test_pretrain(project, run, refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unetr, "UNETR", TinyUNETR)
    out, command = tmp_path / "unetr", ("pretrain", "--data", project.data, "--network", "unetr")
    sentence = refused(*command, "--widths", "4,8,16,16", "--out", out, *TRAIN)
    assert "--widths is for cvtgan, and --network is unetr" in sentence and not out.exists()
    assert run(*command, "--out", out, *TRAIN).code == 0
    assert json.loads((out / "network.json").read_text())["network"] == "unetr"
    loaded = load_network(out)
    assert loaded.generator.config["img_size"] == [32, 16, 16]
    assert loaded.generator.config["hidden_size"] == 24
    assert not (out / "discriminator.safetensors").exists()


@pytest.mark.parametrize(("recipe", "rest"), [("petite", False), ("vpt+adapter", True)])
def test_finetune_merge_reconstruct_export(recipe, rest, base, project, run, refused, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    command = ("finetune", "--base", base, "--data", project.data, "--recipe", recipe)
    prompts = ("--prompts", "5") if rest else ()
    result = run(*command, *prompts, "--rank", 2, "--lr", "0.05", "--out", adapter, *TRAIN)
    assert result.code == 0 and f"adapter: {adapter}" in result.out
    result = run("merge", "--base", base, "--adapter", adapter, "--out", merged)
    assert result.code == 0 and ("cannot be folded" in result.out) == rest
    scan = next((project.data.parent / "images").iterdir())
    two = ("--base", base, "--adapter", adapter)
    assert run("reconstruct", scan, *two, "--out", tmp_path / "two").code == 0
    assert run("reconstruct", scan, "--base", merged, "--out", tmp_path / "one").code == 0
    name = f"{scan.name.removesuffix('.nii.gz')}_desc-petite.nii.gz"
    first, second = (nib.load(tmp_path / f / name).get_fdata() for f in ("two", "one"))
    assert np.abs(first - second).max() <= 2e-5 * np.abs(first).max()
    out = tmp_path / "net.safetensors"
    export = ("export", "--base", merged, "--format", "state-dict", "--out", out)
    if rest:
        assert "cannot be folded" in refused(*export) and not out.exists()
    else:
        assert run(*export).code == 0
        assert load_file(out).keys() == load_network(merged).generator.state_dict().keys()


def test_refusals(base, project, refused, tmp_path) -> None:
    out = tmp_path / "out"
    command = ("finetune", "--base", base, "--data", project.data, "--out", out, *TRAIN)
    assert "made of convolutions" in refused(*command, "--recipe", "ssf+vpt")
    assert "no prompts" in refused(*command, "--prompts", "5")
    assert "expected 1" in refused(*command, "--recipe", "vpt", "--prompts", "0,8,32")
    assert "whole numbers" in refused(*command, "--recipe", "vpt", "--prompts", "many")
    export = ("export", "--base", base, "--format", "state-dict", "--out", tmp_path / "net.bin")
    assert "expected .safetensors or .pt" in refused(*export)
    assert not out.exists() and not (tmp_path / "net.bin").exists()
