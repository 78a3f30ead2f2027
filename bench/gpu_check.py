"""Everything that needs a GPU, on the GPU at hand: build, tests, sanitizers, tuning, measurements.

    python bench/gpu_check.py [--out DIR] [--seconds N]

A run ends in time (default: under ten minutes); the next one goes on where it stopped. What passed
is not run again for the same sources, device and versions: that is kept in DIR/gpu-check.json
(default: bench/results/), with the outcome of every part; a summary is printed and in
DIR/gpu-check.txt.

The interpreter that runs this runs everything, on the checkout, which is built in place. It needs
torch, Triton, pytest with pytest-timeout and pytest-xdist, pybind11, cmake and ninja; a part that
misses something is left out and says what.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570.0
LEAST = 20.0  # seconds without which no part is begun
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".txt", ".toml"}
SOURCES = ("petite_fast", "csrc", "python_tests", "bench", "setup.py", "pyproject.toml",
           "CMakeLists.txt")  # fmt: skip


class Part(NamedTuple):
    """One step: it is stopped after `seconds`, and left out where a module or tool is missing."""

    name: str
    command: list[str]
    seconds: float
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()


class Ran(NamedTuple):
    """How a command ended; no code if it was stopped."""

    code: int | None
    output: str


Runner = Callable[[list[str], float], Ran]


def gpu_tests(root: Path) -> list[str]:
    """Test files with a test that is marked `gpu`."""
    files = sorted((root / "python_tests").rglob("test_*.py"))
    marked = [f for f in files if "pytest.mark.gpu" in f.read_text(encoding="utf-8")]
    return [str(f.relative_to(root)) for f in marked]


def plan(root: Path, out: Path) -> list[Part]:
    """The parts, in order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    tests = gpu_tests(root)
    ours = [f for f in tests if "/test_native" in f]  # the kernels that nvcc compiles
    info = [python, "-m", "petite_fast.cli", "info", "--tune", "cvtgan", "--batch", "1"]
    bench = [python, "bench/run.py", "--device", "cuda", "--quick", "--out", str(out), "--suite"]
    network = ("nibabel", "safetensors", "einops", "typer", "rich", "lightning_fabric")

    def sanitizer(tool: str) -> Part:
        # Without torch's cache every tensor has an allocation of its own, whose end is seen.
        check = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool]
        check += ["--error-exitcode", "9"]
        return Part(tool, [*check, *pytest, *ours], 150, ("pytest",), ("compute-sanitizer",))

    return [
        Part("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 300,
             ("setuptools", "pybind11"), ("nvcc", "cmake", "ninja")),
        # Compiling Triton's kernels is most of it, so on several cores.
        Part("tests", [*pytest, "-n", "4", *tests], 240, ("pytest_timeout", "xdist", "triton")),
        Part("bench-kernels", [*bench, "kernels"], 150, ("matplotlib",)),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Part("tune", info, 150, ("triton", *network)),
        Part("bench-ops", [*bench, "ops"], 150, ("matplotlib", "peft")),
        Part("bench-memory", [*bench, "memory"], 240, ("matplotlib", "peft", "monai", "einops")),
    ]  # fmt: skip


def why_left_out(part: Part) -> str:
    """What a part misses here, in words."""
    missing = [name for name in part.modules if importlib.util.find_spec(name) is None]
    missing += [name for name in part.tools if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def check(
    parts: Iterable[Part], about: dict[str, Any], record: Path, run: Runner, seconds: float,
    clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run what has not passed yet, each part's outcome written to `record` when it is there.

    A failed part does not stop the others. What was recorded for other sources, devices or versions
    counts for nothing. `seconds` are for all parts, those of `run` for its command.

    Returns:
        {part: {"status": passed | failed | stopped | left out | not run, "seconds", "reason"}}.
    """
    start, known, outcomes = clock(), recorded(record, about), {}
    for part in parts:
        left = seconds - (clock() - start)
        began = clock()
        if known.get(part.name, {}).get("status") == "passed":
            outcome = known[part.name]
        elif reason := why_left_out(part):
            outcome = {"status": "left out", "seconds": 0.0, "reason": reason}
        elif left < LEAST:
            outcome = {"status": "not run", "seconds": 0.0, "reason": "no time left: run it again"}
        else:
            allowed = min(part.seconds, left)
            code, output = run(part.command, allowed)
            status = "stopped" if code is None else "passed" if code == 0 else "failed"
            lines = [line for line in output.splitlines() if line.strip()]
            reason = lines[-1].strip("= ") if lines else ""
            if code is None:
                reason = f"after {allowed:.0f} s: run it again"
            outcome = {"status": status, "seconds": round(clock() - began, 1), "reason": reason}
            if code != 0:
                outcome["output"] = lines[-40:]
        outcomes[part.name] = outcome
        write(record, json.dumps({"about": about, "parts": {**known, **outcomes}}, indent=1))
        say(line_of(part.name, outcome))
    return outcomes


def line_of(name: str, outcome: dict[str, Any]) -> str:
    """A part's outcome on a line."""
    return f"{name:<13} {outcome['status']:<9} {outcome['seconds']:6.1f} s  {outcome['reason']}"


def recorded(record: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The outcomes in `record`, if they are for the same sources, device and versions."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        same = all(found["about"][key] == about[key] for key in ("sources", "device", "versions"))
        return dict(found["parts"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def source_hash(root: Path) -> str:
    """Of everything that the outcome depends on; the checkout may be without git."""
    total = hashlib.sha256()
    for name in SOURCES:
        files = [root / name] if (root / name).is_file() else sorted((root / name).rglob("*"))
        for file in files:
            if file.is_file() and file.suffix in SUFFIXES and "results" not in file.parts:
                total.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def describe(root: Path) -> dict[str, Any]:
    """Sources, device and versions."""
    import torch

    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "date": date.today().isoformat(),
        "commit": (commit.stdout.strip() if commit else "") or "unknown",
        "sources": source_hash(root),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton,
        },
    }


def run_command(command: list[str], seconds: float) -> Ran:
    """Run it on the checkout, with whatever it starts, for at most so many seconds."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Ran(None, output)
    return Ran(process.returncode, output)


def copy_tuning(out: Path, device: str) -> None:
    """What tuning measured on this device, newest file, beside the other results."""
    sys.path.insert(0, str(ROOT))
    from petite_fast import settings

    files = sorted(settings.cache_folder().glob("tune-*.json"), key=lambda f: f.stat().st_mtime)
    for file in reversed(files):
        text = file.read_text(encoding="utf-8")
        if json.dumps(device) in text:
            write(out / "tune-cuda.json", text.rstrip())
            return


def main(arguments: list[str] | None = None, run: Runner = run_command) -> int:
    """0: what could be run passed; 1: something did not, or is still to be run; 2: no GPU."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="for results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which it ends")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no CUDA device here, wanted one", file=sys.stderr)
        return 2
    # What pip installed beside this interpreter (cmake, ninja) is found without an activation.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    out, about = options.out.resolve(), describe(ROOT)
    head = f"{about['device']}, {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"
    print(head, flush=True)
    outcomes = check(
        plan(ROOT, out), about, out / "gpu-check.json", run, options.seconds,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    copy_tuning(out, about["device"])
    lines = [line_of(name, outcome) for name, outcome in outcomes.items()]
    title = f"{about['date']}, commit {about['commit']}"
    write(out / "gpu-check.txt", "\n".join([title, head, *lines]))
    for name, outcome in outcomes.items():
        if outcome["status"] == "failed":
            print(f"\n{name}:", *outcome["output"], sep="\n  ")
    return int(any(o["status"] not in ("passed", "left out") for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
