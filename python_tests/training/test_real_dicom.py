"""A whole-body DICOM series: thinned, reconstructed by a tuned network, back as NIfTI and DICOM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pet_trees import thinned_dataset

from petite_fast.data import read_volume, same_grid, thin, to_suv
from petite_fast.data.dicom_write import write_dicom
from petite_fast.models import CVTGANGenerator, save_network
from petite_fast.training import tasks
from petite_fast.training.loop import TrainSettings

PATCH = (32, 32, 32)


@pytest.fixture
def tuned(test_data: Path, tmp_path: Path) -> tasks.inference.Reconstructor:
    """A small generator with a PETITE adapter, tuned for a few steps on two real scans."""
    found = sorted(test_data.glob("ibsi-sts/STS_00[1-2]/PET_image.nii.gz"))
    if len(found) < 2:
        pytest.skip(f"no IBSI scans under {test_data}")
    listing = thinned_dataset(tmp_path, found, 2)
    torch.manual_seed(0)
    save_network(tmp_path / "base", CVTGANGenerator((8, 16, 16, 16)), normalisation="paired")
    settings = TrainSettings(tmp_path / "run", steps=5, batch=2, lr=1e-2, seed=1)
    data = tasks.TrainingData(listing, 0, PATCH)
    tasks.finetune(tmp_path / "base", data, settings, recipe="petite", rank=4)
    return tasks.load_reconstructor(tmp_path / "base", tmp_path / "run")


def test_whole_body_series(
    test_data: Path, tmp_path: Path, tuned: tasks.inference.Reconstructor
) -> None:
    source = test_data / "wholebody-dicom"
    if not source.is_dir():
        pytest.skip(f"no whole-body DICOM under {test_data}")
    whole = read_volume(source)
    body = np.count_nonzero(whole.array > 0.1 * whole.array.mean())
    short = thin(whole.array, 1 / 6, np.random.default_rng(0), 100.0 * body)
    write_dicom(whole, short, tmp_path / "short")

    out = tmp_path / "out"
    image = tuned.file(tmp_path / "short", out, "series-001", dicom=True)
    assert image == out / "series-001_desc-petite.nii.gz"
    nifti, dicom = read_volume(image), read_volume(out / "series-001_desc-petite_dicom")
    assert same_grid(nifti, whole) and same_grid(dicom, whole)
    assert dicom.units == whole.units == "Bq/mL"
    step = np.abs(nifti.array).max(axis=(0, 1)) / 32767  # a slice's own
    assert (np.abs(dicom.array - nifti.array).max(axis=(0, 1)) <= 0.51 * step + 1e-3).all()
    # weight, dose and times went along: SUV of the result by the same factor as of the source
    factor = to_suv(whole).array.max() / whole.array.max()
    assert to_suv(dicom).array.max() / dicom.array.max() == pytest.approx(factor, rel=1e-5)
