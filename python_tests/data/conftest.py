"""Small NIfTI files and pair lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from petite_fast.data import Pair, write_volume


@pytest.fixture(scope="session")
def data_dir(test_data: Path) -> Path:
    """Folder of real PET (skips when it is absent)."""
    return test_data


@pytest.fixture
def blob() -> np.ndarray:
    """A noisy bright ball in an empty field, [12, 10, 9]."""
    x, y, z = np.meshgrid(*(np.arange(n) - n / 2 for n in (12, 10, 9)), indexing="ij")
    ball = np.exp(-(x**2 + y**2 + z**2) / 16) * 9000
    return np.random.default_rng(0).poisson(ball).astype(np.float32)


@pytest.fixture
def pairs(tmp_path: Path, blob: np.ndarray) -> list[Pair]:
    """Five pairs; the target is twice the input, and pair k is k times as bright as the first."""
    made = []
    for k in range(1, 6):
        names = tmp_path / f"in_{k}.nii.gz", tmp_path / f"out_{k}.nii.gz"
        write_volume(blob * k, np.diag([2, 2, 3, 1]), names[0])
        write_volume(blob * 2 * k, np.diag([2, 2, 3, 1]), names[1])
        made.append(Pair(*names, f"sub-{k:02d}"))
    return made


@pytest.fixture
def write_list(tmp_path: Path, pairs: list[Pair]) -> Callable[..., Path]:
    """Write a dataset JSON of the five pairs, changed by keywords; its path."""

    def write(**changes: object) -> Path:
        content: dict[str, object] = {
            "training": [
                {"image": p.image.name, "label": p.label.name, "subject": p.subject} for p in pairs
            ],
            "folds": [
                {"training": ["sub-01", "sub-02", "sub-03"], "validation": ["sub-04", "sub-05"]},
                {"training": ["sub-04", "sub-05"], "validation": ["sub-01"]},
            ],
        }
        content.update(changes)
        path = tmp_path / "dataset.json"
        kept = {key: value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(kept))
        return path

    return write
