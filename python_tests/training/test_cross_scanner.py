"""Across scanners on real PET: three spacings are three scanners; one network, an adapter each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pet_trees import thinned_dataset

from petite_fast.data import read_volume
from petite_fast.models import CVTGANGenerator, save_network
from petite_fast.training import tasks
from petite_fast.training.evaluate import Comparison, evaluate
from petite_fast.training.loop import TrainSettings

PATCH = (32, 32, 32)
SPACINGS = (5.47, 4.69, 3.91)  # mm, in-plane


def test_one_base_and_an_adapter_for_each_scanner(test_data: Path, tmp_path: Path) -> None:
    scanners: list[list[Path]] = [[] for _ in SPACINGS]
    for path in sorted(test_data.glob("ibsi-sts/STS_*/PET_image.nii.gz")):
        spacing = read_volume(path).spacing[0]
        scanners[int(np.argmin([abs(spacing - s) for s in SPACINGS]))].append(path)
    if min(map(len, scanners)) < 3:
        pytest.skip(f"no three subjects of each of three spacings under {test_data}")
    source, *targets = [
        thinned_dataset(tmp_path / f"scanner-{k}", files[:3], 2) for k, files in enumerate(scanners)
    ]

    torch.manual_seed(0)
    save_network(tmp_path / "start", CVTGANGenerator((8, 16, 16, 16)), normalisation="paired")
    settings = TrainSettings(tmp_path / "base", steps=40, batch=2, lr=3e-3, seed=1)
    data = tasks.TrainingData(source, 0, PATCH)
    tasks.finetune(tmp_path / "start", data, settings, recipe="full")

    for k, listing in enumerate(targets):
        run = tmp_path / f"adapter-{k}"
        settings = TrainSettings(run, steps=40, batch=2, lr=1e-2, seed=1)
        data = tasks.TrainingData(listing, 0, PATCH)
        report = tasks.finetune(tmp_path / "base", data, settings, recipe="petite", rank=4)
        assert len(report.rows) == 40
        held_out = json.loads(listing.read_text())["training"][2]
        errors = {}
        for name, adapter in (("base", None), ("petite", run)):
            reconstructor = tasks.load_reconstructor(tmp_path / "base", adapter)
            image = reconstructor.file(listing.parent / held_out["image"], tmp_path / f"{name}-{k}")
            found = evaluate([Comparison("s2", image, Path(held_out["label"]))])
            errors[name] = found["overall"]["nrmse"]["mean"]
        assert errors["petite"] < errors["base"], f"scanner {SPACINGS[k + 1]} mm: {errors}"
