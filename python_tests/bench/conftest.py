"""bench/ is scripts, not a package: its modules are importable inside these tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("cases", "gpu", "measure", "report", "run")
    ]:
        del sys.modules[name]
