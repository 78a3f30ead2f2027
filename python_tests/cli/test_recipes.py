"""Every recipe of both networks, the 21 mixes among them, by one command each."""

from __future__ import annotations

import json

import pytest

from petite_fast.models import UNETR, save_network
from petite_fast.peft import feasible, recipes

pytest.importorskip("monai")

TRAIN = ("--fold", "0", "--patch", "32,16,16", "--batch", "2", "--steps", "2", "--rank", "2")


@pytest.fixture(scope="module")
def unetr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unetr")
    sizes = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "feature_size": 4}
    save_network(folder, UNETR((32, 16, 16), **sizes), patch=[32, 16, 16])
    return folder


def test_there_are_21_mixes() -> None:
    assert sum("+" in name for network in ("cvtgan", "unetr") for name in recipes(network)) == 21
    assert sum(len(feasible(network)) for network in ("cvtgan", "unetr")) == 21


@pytest.mark.parametrize("recipe", recipes("cvtgan"))
def test_cvtgan(recipe, project, run, tmp_path) -> None:
    _finetune(recipe, project.base, project.data, run, tmp_path)


@pytest.mark.parametrize("recipe", recipes("unetr"))
def test_unetr(recipe, unetr, project, run, tmp_path) -> None:
    _finetune(recipe, unetr, project.data, run, tmp_path)


def _finetune(recipe, base, data, run, tmp_path) -> None:
    out = tmp_path / "out"
    command = ("finetune", "--base", base, "--data", data, "--recipe", recipe, "--out", out)
    result = run(*command, *TRAIN)
    assert result.code == 0, result.err
    assert "2 steps" in result.out
    if recipe == "full":
        assert (out / "network.json").is_file()
    else:
        record = json.loads((out / "adapter_config.json").read_text())
        assert record["metadata"]["recipe"] == recipe
