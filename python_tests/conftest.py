"""Shared fixtures: where the real PET volumes are, and one thread per test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real PET: PETITE_FAST_TEST_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("PETITE_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real PET here: set PETITE_FAST_TEST_DATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Test processes run side by side: each has one core."""
    torch.set_num_threads(1)
