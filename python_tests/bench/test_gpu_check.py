"""`make gpu-check` without a GPU: what it would run, how it goes on, and how it says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ABOUT = {"date": "2026-11-24", "commit": "abc", "sources": "1", "device": "a card",
         "versions": {"torch": "2.11.0", "triton": "3.6.0"}}  # fmt: skip


class Runner:
    """Ends commands as told (default: passed), and remembers them."""

    def __init__(self, **codes: int | None) -> None:
        self.codes, self.asked = codes, []

    def __call__(self, command: list[str], seconds: float) -> Any:
        from gpu_check import Ran

        self.asked.append(command[-1])
        return Ran(self.codes.get(command[-1], 0), f"began\nran {command[-1]}\n\n")


def parts(*names: str, **keywords: Any) -> list[Any]:
    from gpu_check import Part

    return [Part(name, ["do", name], 100.0, **keywords) for name in names]


def check(names: str, record: Path, run: Runner, about: Any = None, **keywords: Any) -> Any:
    import gpu_check

    keywords = {"seconds": 500.0, "say": lambda line: None, **keywords}
    return gpu_check.check(parts(*names), about or ABOUT, record, run, **keywords)


def test_plan(repository: Path, tmp_path: Path) -> None:
    import gpu_check

    found = {part.name: part for part in gpu_check.plan(repository, tmp_path)}
    assert list(found) == [
        "build", "tests", "bench-kernels", "memcheck", "racecheck", "tune", "bench-ops",
        "bench-memory",
    ]  # fmt: skip
    files = [word for word in found["tests"].command if word.endswith(".py")]
    assert all((repository / file).is_file() for file in files)
    stems = {Path(file).stem for file in files}
    assert {"test_native", "test_triton_conv", "test_triton_tune", "test_cuda_graph"} <= stems
    for tool in ("memcheck", "racecheck"):
        command = found[tool].command
        assert command[2:5] == ["compute-sanitizer", "--tool", tool]
        sanitized = [word for word in command if word.endswith(".py")]
        assert sanitized and all("test_native" in file for file in sanitized)
    assert str(tmp_path) in found["bench-ops"].command


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    record = tmp_path / "results" / "gpu-check.json"
    first = Runner(b=1, c=None)
    outcomes = check("abcd", record, first)
    assert first.asked == list("abcd")
    assert [outcomes[name]["status"] for name in "abcd"] == [
        "passed",
        "failed",
        "stopped",
        "passed",
    ]
    assert outcomes["b"]["output"] == ["began", "ran b"] and outcomes["b"]["reason"] == "ran b"
    assert "output" not in outcomes["a"] and "run it again" in outcomes["c"]["reason"]
    assert json.loads(record.read_text()) == {"about": ABOUT, "parts": outcomes}

    second = Runner(c=2)
    outcomes = check("abcd", record, second, {**ABOUT, "date": "2026-11-25", "commit": "abc-dirty"})
    assert second.asked == list("bc") and outcomes["b"]["status"] == "passed"
    assert outcomes["c"]["status"] == "failed"
    for change in ({"sources": "2"}, {"device": "another"}, {"versions": {"torch": "2.13.0"}}):
        everything = Runner()
        check("ab", tmp_path / "gpu-check.json", Runner())
        check("ab", tmp_path / "gpu-check.json", everything, {**ABOUT, **change})
        assert everything.asked == list("ab")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"about": {}}', '{"about": 1, "parts": 2}'])
def test_a_damaged_record_is_no_record(text: str, tmp_path: Path) -> None:
    record, run = tmp_path / "gpu-check.json", Runner()
    record.write_text(text)
    check("ab", record, run)
    assert run.asked == list("ab")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-check.json"]


def test_ends_in_time(tmp_path: Path) -> None:
    now, allowed = [0.0], []

    def run(command: list[str], seconds: float) -> Any:
        from gpu_check import Ran

        allowed.append(seconds)
        now[0] += 60
        return Ran(0, "")

    lines: list[str] = []
    outcomes = check(
        "abcd", tmp_path / "r.json", run, seconds=135.0, clock=lambda: now[0], say=lines.append
    )
    assert allowed == [100.0, 75.0]
    statuses = [outcome["status"] for outcome in outcomes.values()]
    assert statuses == ["passed", "passed", "not run", "not run"]
    assert len(lines) == 4 and "no time left" in lines[2] and "60.0 s" in lines[0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    import gpu_check

    run = Runner()
    needy = parts("a", modules=("torch", "no_such_module"), tools=("no-such-tool",))
    outcomes = gpu_check.check(needy, ABOUT, tmp_path / "r.json", run, 100.0, say=print)
    assert run.asked == [] and outcomes["a"]["status"] == "left out"
    assert outcomes["a"]["reason"] == "not installed: no_such_module, no-such-tool"


def test_the_sources_are_what_counts(tmp_path: Path) -> None:
    import gpu_check

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return gpu_check.source_hash(tmp_path)

    first = write("csrc/cuda/a.cu", "1")
    assert write("bench/results/a.json", "1") == first == write("petite_fast/a.so", "1")
    assert write("csrc/cuda/a.cu", "2") != first
    assert write("csrc/cuda/a.cu", "1") == first != write("setup.py", "1")


def test_no_gpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = Runner()
    assert gpu_check.main(["--out", str(tmp_path)], run) == 2
    said = capsys.readouterr()
    assert said.err == "gpu-check: PyTorch finds no CUDA device here, wanted one\n"
    assert said.out == "" and run.asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_make_target(repository: Path) -> None:
    run = subprocess.run(
        ["make", "gpu-check", f"PYTHON={sys.executable}"],
        cwd=repository, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode != 0 and "gpu-check: PyTorch finds no CUDA device here" in run.stderr


def test_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import gpu_check

    monkeypatch.setenv("PATH", os.environ["PATH"])
    cache = tmp_path / "cache" / "petite_fast"
    cache.mkdir(parents=True)
    (cache / "tune-1.json").write_text('{"about": {"device": "a card"}}')
    (cache / "tune-2.json").write_text('{"about": {"device": "another"}}')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "describe", lambda root: ABOUT)
    monkeypatch.setattr(gpu_check, "plan", lambda root, out: parts(*"ab"))
    out = tmp_path / "out"
    assert gpu_check.main(["--out", str(out)], Runner(b=1)) == 1
    said = capsys.readouterr().out
    assert "a card, torch 2.11.0, triton 3.6.0" in said and "\nb:\n  began\n  ran b\n" in said
    assert gpu_check.main(["--out", str(out)], Runner()) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "gpu-check.json", "gpu-check.txt", "tune-cuda.json",
    ]  # fmt: skip
    summary = (out / "gpu-check.txt").read_text().splitlines()
    assert summary[0] == "2026-11-24, commit abc" and summary[3].split()[:2] == ["b", "passed"]
    assert json.loads((out / "tune-cuda.json").read_text())["about"]["device"] == "a card"


def test_a_command_is_stopped_with_its_children(tmp_path: Path) -> None:
    import gpu_check

    code = "import os, sys; print(os.environ['PYTHONPATH'].split(os.pathsep)[0]); sys.exit(3)"
    ran = gpu_check.run_command([sys.executable, "-c", code], 60)
    assert ran == gpu_check.Ran(3, f"{gpu_check.ROOT}\n")
    late = tmp_path / "late"
    start = time.monotonic()
    ran = gpu_check.run_command(["sh", "-c", f"echo began; (sleep 2; touch {late}) & wait"], 0.5)
    assert ran == gpu_check.Ran(None, "began\n") and time.monotonic() - start < 2
    time.sleep(max(0.0, start + 2.5 - time.monotonic()))
    assert not late.exists()
