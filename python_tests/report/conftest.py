"""A run folder as demo leaves it, of made-up volumes whose files name a patient everywhere."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from petite_fast.report import page
from petite_fast.training.evaluate import Comparison
from petite_fast.training.record import record

SHAPE, SPACING = (13, 16, 11), (3.0, 2.0, 4.0)
PATIENT = "DOE-JANE-4711"


def write_scan(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.astype(np.float32), np.diag([*SPACING, 1.0]))
    image.header["descrip"] = PATIENT
    nib.save(image, path)
    return path


def phantom(seed: int) -> np.ndarray:
    """A warm ellipsoid with a hot corner, so that every axis and direction is different."""
    x, y, z = (np.linspace(-1, 1, n) for n in SHAPE)
    inside = x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None] ** 2 < 0.9
    target = 900.0 * inside + seed
    target[8:11, 9:12, 6:8] = 5000.0  # right, anterior, superior
    return target


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Leave out the PNG figures, which take longest and which test_figures.py looks at."""
    monkeypatch.setattr(page, "write_figures", lambda run, shown: [])


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder of `subjects` subjects, evaluated for methods of these noises."""

    def make(subjects: int = 2, noises: dict[str, float] | None = None) -> Path:
        run = tmp_path / "run"
        noises = noises or {"input": 400.0, "none": 200.0, "petite": 50.0}
        methods: dict[str, list[Comparison]] = {name: [] for name in noises}
        for number in range(subjects):
            rng = np.random.default_rng(number)
            target = phantom(number)
            folder = tmp_path / "data" / f"{PATIENT}-{number}"
            label = write_scan(folder / "standard.nii.gz", target)
            for method, noise in noises.items():
                scan = target * (1 + 0.01 * number) + rng.normal(0, noise + number, SHAPE)
                path = write_scan(folder / f"{method}.nii.gz", scan)
                methods[method].append(Comparison(f"{PATIENT}-{number}", path, label))
        record(run, methods, units="Bq/mL")
        for part in (".", "petite"):
            (run / part).mkdir(exist_ok=True)
            with (run / part / "log.csv").open("w", newline="") as file:
                rows = [(step, 5.0 / step, 1.0, 0.1) for step in range(1, 21)]
                csv.writer(file).writerows([("step", "loss", "loss_d", "seconds"), *rows])
        config = {"scanner": "63", "metadata": {"patch": [16, 16, 16]}}
        (run / "adapter_config.json").write_text(json.dumps(config))
        return run

    return make
