"""The main job on real PET: thin, adapt, reconstruct; same grid and header, smaller error."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pet_trees import thinned_dataset

from petite_fast.data import read_volume
from petite_fast.models import CVTGANGenerator, save_network
from petite_fast.training import tasks
from petite_fast.training.loop import TrainSettings
from petite_fast.training.metrics import nrmse

PATCH = (32, 32, 32)


@pytest.fixture
def dataset(test_data: Path, tmp_path: Path) -> Path:
    found = sorted(test_data.glob("ibsi-sts/STS_00[1-4]/PET_image.nii.gz"))
    if len(found) < 3:
        pytest.skip(f"no IBSI scans under {test_data}")
    return thinned_dataset(tmp_path, found[:3], 2)


@pytest.mark.parametrize(("recipe", "lr"), [("petite", 1e-2), ("full", 3e-3)])
def test_real_pet_end_to_end(recipe, lr, dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, run = tmp_path / "base", tmp_path / "run"
    save_network(base, CVTGANGenerator((8, 16, 16, 16)), normalisation="paired")
    settings = TrainSettings(run, steps=60, batch=2, lr=lr, seed=1)
    data = tasks.TrainingData(dataset, 0, PATCH)
    report = tasks.finetune(base, data, settings, recipe=recipe, rank=4)
    assert len(report.rows) == 60

    source = tmp_path / "short-2.nii.gz"  # the subject that no training saw
    out = tmp_path / "out"
    before = tasks.load_reconstructor(base).file(source, out / "before")
    tuned = (run, None) if recipe == "full" else (base, run)
    after = tasks.load_reconstructor(*tuned).file(source, out / "after")

    old, new = nib.load(source), nib.load(after)
    assert new.shape == old.shape and new.get_data_dtype() == np.float32
    np.testing.assert_array_equal(new.affine, old.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units"):
        np.testing.assert_array_equal(new.header[field], old.header[field])

    entries = json.loads(dataset.read_text())["training"]
    target = read_volume(entries[2]["label"]).array
    short, base_error, error = (
        nrmse(read_volume(p).array, target) for p in (source, before, after)
    )
    assert error < 0.8 * base_error
    if recipe == "full":
        assert error < short  # better than the scan that went in
