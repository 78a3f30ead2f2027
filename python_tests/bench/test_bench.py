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
        "cases": list(ops.run(quick=True)),
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


def test_kernels_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import report
    from cases import kernels

    def tiny() -> Any:
        yield from kernels.Conv(4, 8, 6).kernels("forward", "grad_x + grad_weight")
        yield from kernels.Conv(4, 2, 3, 2, 2, transposed=True).kernels("forward")

    monkeypatch.setattr(kernels, "kernels", tiny)
    records = json.loads(json.dumps(list(kernels.run(quick=True))))
    forward, backward, transposed = records
    assert forward["flops"] == 2 * 27 * 4 * 8 * 6**3
    assert forward["bytes"] == 4 * (4 * 6**3 + 8 * 6**3 + 27 * 4 * 8)
    assert backward["flops"] == 2 * forward["flops"]
    assert set(forward["providers"]) == {"torch", "ours-eager", "ours"}
    assert set(transposed["providers"]) == {"torch", "ours-eager", "ours", "product"}
    rates = {"product_gflops_per_s": 0.1, "copy_gb_per_s": 1.0}
    about = {"cpu": "CPU", "gpu": None, "threads": 1, "date": "d", "versions": {"torch": "t"}}
    result = {"suite": "kernels", "cases": records, "machine": {**about, "ceilings": rates}}
    row = report.markdown(result).splitlines()[2].split(" | ")
    assert row[5] == f"{forward['flops'] / 0.1 / 1e6:.2f}"
    report.figure(result, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_every_measured_kernel_equals_torch() -> None:
    from cases import kernels
    from gpu import tensors

    torch.manual_seed(0)
    for kernel in kernels.kernels():
        wanted, found = tensors(kernel.torch()), tensors(kernel.ours())
        assert len(wanted) == len(found) > 0, kernel.label
        for theirs, ours in zip(wanted, found, strict=True):
            error = (ours.flatten() - theirs.flatten()).norm() / theirs.norm()
            assert error < 1e-4, f"{kernel.label}: {error}"


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
