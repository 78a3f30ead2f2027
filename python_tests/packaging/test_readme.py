"""README keeps its word: the quick start runs, the commands and their options exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def _run(code: str, folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_quick_start_runs(tmp_path: Path) -> None:
    out = _run(EXAMPLES[0], tmp_path)
    assert "trainable params" in out and "bytes kept" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_any_network_runs(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    assert len(EXAMPLES) == 2
    _run(EXAMPLES[1], tmp_path)
    assert (tmp_path / "adapters/siemens/adapter_model.safetensors").is_file()


COMMANDS = sorted({line for line in README.splitlines() if line.startswith("petite-fast ")})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options_exist(line: str, tmp_path: Path) -> None:
    words = line.split("#")[0].split()
    run = subprocess.run(
        [sys.executable, "-m", "petite_fast.cli", words[1], "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,  # the installed package, not the source tree
        env={"COLUMNS": "200", "PATH": "", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert run.returncode == 0, run.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in run.stdout, f"{words[1]} has no {option}"


@pytest.mark.parametrize("target", ["demo", "test", "bench", "gpu-check", "lint"])
def test_make_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
