"""The benchmark's own machinery on a tiny case: it measures, tabulates and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch


def _result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import measure
    from cases import ops

    tiny = [ops.ConvCase(4, 4, 6, 2), ops.ConvCase(4, 4, 6, 2, groups=4)]
    monkeypatch.setattr(ops, "CASES", tiny)
    return {
        "suite": "ops",
        "device": "cpu",
        "quick": True,
        "machine": measure.machine("cpu"),
        "cases": ops.run("cpu", quick=True),
    }


def test_ops_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = json.loads(json.dumps(_result(monkeypatch)))
    dense, depthwise = (record["providers"] for record in result["cases"])
    assert {"full", "frozen", "peft", "ours-eager", "floor"} <= set(dense)
    unit = result["cases"][0]["unit_bytes"]
    assert unit == 4 * 6**3 * 4
    assert dense["ours-eager"]["saved_bytes"] == dense["frozen"]["saved_bytes"] == unit
    assert dense["peft"]["saved_bytes"] > unit
    assert dense["floor"]["ms"] <= dense["frozen"]["ms"]
    assert all(p["ms"] > 0 and p["peak_bytes"] >= unit for p in dense.values())
    assert "why_not" in depthwise["peft"]  # HF PEFT asks r to be a multiple of the groups
    assert result["machine"]["ceilings"]["copy_gb_per_s"] > 0

    import report

    text = report.table(result)
    assert "ours-eager" in text and "cannot" in text
    assert report.markdown(result).count("\n| conv") == 1
    report.figure(result, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 1000


def test_forced_backend_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from measure import forced

    monkeypatch.setenv("PETITE_FAST_BACKEND", "eager")
    with forced("native"):
        assert os.environ["PETITE_FAST_BACKEND"] == "native"
    assert os.environ["PETITE_FAST_BACKEND"] == "eager"


def test_peak_counts_what_is_alive_at_once() -> None:
    from measure import Provider, peak

    def forward() -> torch.Tensor:
        torch.zeros(1000)  # freed before the next one
        return torch.zeros(1000) + 1

    assert 8000 <= peak(Provider("p", forward, lambda y: None), "cpu") <= 8200
