"""What `bench/run.py --device cuda` does, without a GPU: tiny cases on the CPU, in bfloat16."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petite_fast.backends import eager
from petite_fast.ops import dispatch

LAST = torch.channels_last_3d
RATES = {"product_gflops_per_s": 1000.0, "copy_gb_per_s": 1.0}
ABOUT = {
    "cpu": "CPU", "gpu": "a card", "threads": 1, "date": "d", "versions": {"torch": "t"},
    "ceilings": RATES,
}  # fmt: skip
TIMES = {"ms_quartiles": [1.0, 2.0], "gflops_per_s": 3.0, "saved_bytes": 64, "peak_bytes": 128}


def put_kernel(
    monkeypatch: pytest.MonkeyPatch, op: str, **kernels: Callable[..., Any] | str
) -> None:
    """Give backends a kernel for an op, or a reason why they have none."""
    rows = []
    for name, kernel in kernels.items():
        can = (False, kernel) if isinstance(kernel, str) else (True, "")
        rows.append((name, lambda *args, c=can: c, kernel))
    monkeypatch.setitem(dispatch._TABLE, op, rows)
    monkeypatch.setattr(dispatch, "_is_there", lambda backend, tensor: True)


def out_of_memory(*args: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("\nCUDA out of memory.\nTried to allocate all of it.")


def test_every_gpu_kernel_equals_torch_in_bfloat16() -> None:
    """The cases themselves, with edges a sixteenth as long."""
    import gpu
    from cases import gpu_kernels
    from cases.kernels import Form

    found = list(gpu_kernels.pairs(Form("cpu", torch.bfloat16, LAST), 16))
    assert len({kernel.label for kernel, _ in found}) == len(found) > 25
    for kernel, plain in found:
        with torch.no_grad():
            right = gpu.tensors((plain or kernel).torch())
            ours = gpu.tensors(kernel.ours())
        assert len(right) == len(ours) > 0 < kernel.bytes, kernel.label
        assert gpu.relative_error(ours, right) <= gpu.LARGEST_ERROR, kernel.label
        if "quantise" not in kernel.label and "low-rank" not in kernel.label:
            assert ours[0].dtype == torch.bfloat16, kernel.label
        if kernel.label.startswith(("conv 32", "depthwise", "norm_act", "bottleneck")):
            assert ours[0].dim() != 5 or ours[0].is_contiguous(memory_format=LAST), kernel.label


def test_no_kernel_wrong_and_failing_providers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import report
    from cases import gpu_kernels
    from cases.kernels import Conv, Form

    def records(**kernels: Any) -> dict[str, Any]:
        put_kernel(monkeypatch, "conv", **kernels)
        form = Form("cpu", torch.bfloat16, LAST)
        pair = next(gpu_kernels.twins(lambda f: Conv(4, 8, 6).kernels("forward", form=f), form))
        record = gpu_kernels.compared(*pair, ["native", "triton"], "cpu", 2)
        return json.loads(json.dumps(record))

    first = records(native="only for a Tuesday", triton=lambda *args: 2 * eager.conv(*args))
    providers = first["providers"]
    assert list(providers) == ["torch", "torch-ndhwc", "ours", "ours-native", "ours-triton"]
    assert providers["ours-native"] == {
        "why_not": "no kernel: conv (native: only for a Tuesday)",
        "ran": {"conv": {"eager": 1}},
    }
    assert providers["ours-triton"]["why_not"] == "wrong: relative error 1"
    assert providers["ours-triton"]["error"] == pytest.approx(1, abs=0.01)
    assert providers["ours"]["why_not"] == "wrong: relative error 1"  # dispatch took Triton
    assert all(providers[name]["ms"] > 0 for name in ("torch", "torch-ndhwc"))
    assert providers["torch-ndhwc"]["error"] < 0.01 and "error" not in providers["torch"]

    second = records(native=eager.conv, triton=out_of_memory)
    providers = second["providers"]
    assert providers["ours-native"]["ms"] > 0 and providers["ours-native"]["error"] < 0.01
    assert providers["ours-native"]["ran"] == providers["ours"]["ran"] == {"conv": {"native": 1}}
    assert providers["ours-triton"] == {"why_not": "OutOfMemoryError: CUDA out of memory."}

    third = records(native=lambda *args: eager.conv(*args) * math.nan, triton=eager.conv)
    assert third["providers"]["ours-native"]["why_not"] == "wrong: relative error nan"
    assert third["providers"]["ours-native"]["error"] is None

    result = {"suite": "kernels", "machine": ABOUT, "cases": [first, second, third]}
    rows = [line.split(" | ") for line in report.markdown(result).splitlines()[2:5]]
    assert [row[3:5] for row in rows] == [
        ["no kernel", "wrong"],
        [f"{providers['ours-native']['ms']:.3f}", "cannot"],
        ["wrong", f"{third['providers']['ours-triton']['ms']:.3f}"],
    ]
    report.figure(result, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_a_provider_that_fails_late_is_dropped() -> None:
    from measure import Provider, compare

    calls = []

    def forward() -> None:
        calls.append(1)
        if len(calls) == 6:
            raise ValueError("six\nis too many")

    providers = [Provider(name, run, lambda y: None) for name, run in
                 (("late", forward), ("sound", lambda: None))]  # fmt: skip
    figures = compare(providers, "cpu", 4, goes_on=True)
    assert figures["late"] == {"why_not": "ValueError: six"} and len(calls) == 6
    assert figures["sound"]["ms"] > 0
    calls.clear()
    with pytest.raises(ValueError, match="too many"):
        compare(providers, "cpu", 4)


def test_a_lost_gpu_ends_the_suite_and_what_was_measured_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    import gpu
    import measure
    import run

    def dead(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def suite(quick: bool) -> Iterator[dict[str, Any]]:
        yield {"case": "first", "flops": 1e6, "bytes": 0.0, "providers": {"torch": {"ms": 1.0}}}
        monkeypatch.setattr(measure, "wait", dead)
        bad = measure.Provider("ours-native", out_of_memory, lambda y: None, backend="native")
        gpu.measured("second", [bad], "cpu", 2)

    monkeypatch.setitem(run.SUITES, "kernels", {"cuda": suite})
    result = {"suite": "kernels", "device": "cuda", "quick": True, "machine": ABOUT, "cases": []}
    assert not run.measure(result, tmp_path / "out" / "kernels-cuda")
    written = json.loads((tmp_path / "out" / "kernels-cuda.json").read_text())
    assert [record["case"] for record in written["cases"]] == ["first"]
    assert written["ended"] == "second: ours-native: OutOfMemoryError: CUDA out of memory."
    assert "the GPU was lost: second: ours-native" in capsys.readouterr().err


def test_ops_on_a_gpu_have_both_layouts_and_ran_what_was_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cases import ops

    put_kernel(monkeypatch, "conv", native=eager.conv, triton="not today")
    monkeypatch.setitem(dispatch._TABLE, "effective_weight", [])
    case = ops.ConvCase(4, 8, 6, 2, batch=2)
    forced = ["eager", "native", "triton"]
    record = ops.gpu_record(case, "cpu", torch.bfloat16, LAST, forced, 2)
    providers = json.loads(json.dumps(record))["providers"]
    plain = ["full", "frozen", "peft"]
    assert list(providers) == [
        *plain, *(f"{name}-ndhwc" for name in plain),
        "ours", "ours-eager", "ours-native", "ours-triton", "floor",
    ]  # fmt: skip
    assert record["unit_bytes"] == 2 * 2 * 4 * 6**3
    assert providers["ours-native"]["saved_bytes"] == record["unit_bytes"]
    assert providers["ours-native"]["ran"]["conv"] == {"native": 1}
    assert providers["ours-native"]["ran"]["effective_weight"] == {"eager": 2}
    assert providers["ours-eager"]["ran"]["conv"] == {"eager": 1}
    assert "conv (triton: not today)" in providers["ours-triton"]["why_not"]
    assert all("ms" in providers[name] for name in providers if name != "ours-triton")


@pytest.mark.parametrize("times, floor", [((2.0, 1.0), 1.0), ((1.0, 2.0), 1.0), ((2.0, None), 2.0),
                                          ((None, 3.0), 3.0), ((None, None), None)])  # fmt: skip
def test_the_floor_is_the_faster_layout(
    monkeypatch: pytest.MonkeyPatch, times: tuple[float | None, float | None], floor: float | None
) -> None:
    import gpu
    from cases import ops

    figures = {
        name: {"why_not": "no"} if ms is None else {"ms": ms}
        for name, ms in zip(("frozen", "frozen-ndhwc"), times, strict=True)
    }
    monkeypatch.setattr(gpu, "measured", lambda *args: dict(figures))
    record = ops.gpu_record(ops.ConvCase(2, 2, 4, 2), "cpu", torch.bfloat16, LAST, [], 2)
    assert record["providers"]["floor"].get("ms") == floor


def test_memory_on_a_gpu_is_under_autocast(
    free_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import measure
    from cases import memory

    case = memory.CASES[0]._replace(
        build=lambda: memory.Blocks(nn.InstanceNorm3d, 4), size=(1, 4, 8, 8, 8)
    )
    setting = memory.Setting("cpu", torch.bfloat16, LAST, more=("triton",))
    assert {step.forward().dtype for step in memory._providers(case, setting)[:2]} == {
        torch.bfloat16
    }
    monkeypatch.setattr(measure, "kept", lambda provider: 0)  # takes a second in a test run
    providers = memory.gpu_record(case, setting, 2)["providers"]
    assert "was forced and cannot run" in providers.pop("ours-lora-triton")["why_not"]
    assert set(providers) >= {"full", "peft", "checkpoint", "memsave", "ours-lora", "floor"}
    assert all("ms" in value for value in providers.values())
    assert set(providers["ours-lora"]["ran"]) >= {"conv", "effective_weight", "norm_act"}


@pytest.mark.parametrize("norm", [nn.InstanceNorm3d, nn.BatchNorm3d])
def test_memsave_computes_the_same_under_autocast(norm: type[nn.Module]) -> None:
    from cases.layers import frozen
    from cases.memory import Blocks
    from cases.others import memsave

    torch.manual_seed(0)
    net = frozen(Blocks(norm, 4))
    x = torch.randn(2, 4, 6, 6, 6)
    found = []
    for each in (net, memsave(copy.deepcopy(net))):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = each(leaf)
        assert y.dtype == torch.bfloat16
        found.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())


def test_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which cases, dtype, layout and backends; on a machine that has both."""
    import gpu
    from cases import gpu_kernels, memory, ops

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu.native, "cuda_available", lambda index: (False, "no nvcc"))
    monkeypatch.setattr(gpu.triton, "available", lambda index: (index == 0, ""))
    assert gpu.backends() == ["triton"]
    for module, name in (
        (ops, "gpu_record"), (memory, "gpu_record"), (gpu_kernels, "compared"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args: [args])
    asked = [args for (args,) in ops.gpu_run(True)]
    assert [args[0] for args in asked] == ops.GPU_CASES
    assert {args[1:4] for args in asked} == {("cuda", torch.bfloat16, LAST)}
    assert asked[0][4:] == (["eager", "triton"], 7)
    asked = [args for (args,) in memory.gpu_run(True)]
    assert [args[0] for args in asked] == [*memory.GPU_CASES, *memory.CASES]
    assert {args[1] for args in asked} == {
        memory.Setting("cuda", torch.bfloat16, LAST, None, ("triton",))
    }
    monkeypatch.setattr(gpu_kernels, "pairs", lambda form: [(form, None)])
    (((form, *rest),),) = gpu_kernels.run(True)
    assert form == ("cuda", torch.bfloat16, LAST) and rest == [None, ["triton"], "cuda", 9]


def test_a_gpu_is_timed_by_events_behind_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import measure

    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, last: Event) -> float:
            assert last is not self
            return 1500.0

    class Filler:
        def zero_(self) -> None:
            done.append("fill")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(measure, "_filler", Filler)
    assert measure._seconds(lambda: done.append("step"), "cuda") == 1.5
    fills = ["fill"] * measure.FILLS
    assert done == ["wait", *fills, "event", "step", "event", "wait"]


def test_the_ceilings_of_a_gpu_are_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    import measure

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: {device: dtype})
    assert measure.machine("cuda")["ceilings"] == {"cuda": torch.bfloat16}
    assert measure.machine("cpu")["ceilings"] == {"cpu": torch.float32}


def test_tables_of_a_gpu() -> None:
    import report

    def figures(**times: float | str) -> dict[str, Any]:
        return {
            name.replace("_", "-"): {"why_not": ms} if isinstance(ms, str) else {"ms": ms, **TIMES}
            for name, ms in times.items()
        }

    kernels = [
        {"case": "conv", "flops": 5e8, "bytes": 2e5, "providers": figures(
            torch=4.0, torch_ndhwc=2.0, ours=2.5, ours_native="no kernel: conv", ours_triton=1.0)},
        {"case": "norm", "flops": 0.0, "bytes": 8e5, "providers": figures(
            torch="OutOfMemoryError: x", torch_ndhwc="OutOfMemoryError: x", ours="wrong: y",
            ours_native="wrong: relative error 0.2", ours_triton="RuntimeError: z")},
    ]  # fmt: skip
    result: dict[str, Any] = {"suite": "kernels", "machine": ABOUT, "cases": kernels}
    lines = report.table(result).splitlines()
    assert lines[0] == (
        "| kernel | best torch | ours | ours-native | ours-triton | floor |"
        " best torch / best of ours | best of ours / floor |"
    )
    assert lines[2] == "| conv | 2.000 | 2.500 | no kernel | 1.000 | 0.500 | 2.00 | 2.0 |"
    assert lines[3] == "| norm | cannot | wrong | wrong | cannot | 0.800 |  |  |"
    assert lines[-1] == "a card, bfloat16, torch t, d; median of interleaved runs; ms."

    ops = figures(full=3.0, frozen=2.0, peft="cannot: no", peft_ndhwc=4.0, ours=1.0,
                  ours_triton="no kernel: conv (triton: why)", floor=2.0)  # fmt: skip
    result = {"suite": "ops", "machine": ABOUT, "cases": [
        {"case": "conv", "unit_bytes": 32, "providers": ops}]}  # fmt: skip
    found = {row[1]: row[2:6] for row in report.rows(result)}
    assert found["ours"] == ("1.000", "1.000-2.000", "0.50", "0.25")
    assert found["ours-triton"][0] == "no kernel: conv (triton: why)"
    row = (
        "| conv | 3.000 (2.00) | 2.000 (2.00) | cannot | 4.000 (2.00) | 1.000 (2.00) | no kernel |"
    )
    assert row in report.markdown(result)
    result["cases"][0]["providers"]["floor"] = {"why_not": "no frozen step ran"}
    assert "no frozen step ran" in report.table(result)


def test_the_readmes_tables_are_of_suites_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import report

    bench = tmp_path / "bench"
    (bench / "results").mkdir(parents=True)
    marked = "<!-- bench:kernels-cuda -->\n{}<!-- /bench:kernels-cuda -->\n"
    for folder in (tmp_path, bench):
        (folder / "README.md").write_text(marked.format("Not measured.\n"))
    (bench / "results" / "gpu-check.json").write_text('{"about": {}, "parts": {}}')
    result = {"suite": "kernels", "machine": ABOUT, "cases": []}
    (bench / "results" / "kernels-cuda.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "HERE", bench)
    monkeypatch.setattr("sys.argv", ["report.py"])
    assert report.main() == 0
    wanted = marked.format(report.markdown(result) + "\n")
    assert (bench / "README.md").read_text() == (tmp_path / "README.md").read_text() == wanted
