"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker() -> None:
    """Parallel test processes share the cores instead of fighting for them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is forced, whatever the tests run with: what dispatch chooses by itself."""
    monkeypatch.delenv("PETITE_FAST_BACKEND", raising=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout the tests lie in (the package under test may be installed elsewhere)."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real PET: PETITE_FAST_TEST_DATA, else ../shared/data; else skip."""
    named = os.environ.get("PETITE_FAST_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set PETITE_FAST_TEST_DATA)")
    return folder
