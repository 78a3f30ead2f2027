"""What importing the package does, and does not do, in a fresh process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from petite_fast.backends import native

HEAVY = {
    "matplotlib", "monai", "lightning", "lightning_fabric", "nibabel", "nilearn", "pandas", "peft",
    "pydicom", "ray", "rich", "scipy", "sklearn", "tensorboard", "transformers", "typer",
}  # fmt: skip


def run_python(code: str, folder: Path, **variables: str) -> str:
    """What `code` prints, run away from the checkout: it sees the package that is installed."""
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:petite_fast", "-c", code],
        env={**os.environ, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def test_import_prints_nothing(tmp_path):
    assert run_python("from petite_fast import LoRAConv3d", tmp_path) == ""


def test_import_loads_neither_the_applications_nor_the_native_module(tmp_path):
    code = "import json, sys, petite_fast; print(json.dumps(list(sys.modules)))"
    loaded = {name.split(".")[0] for name in json.loads(run_python(code, tmp_path))}
    assert "torch" in loaded
    # torch itself may import an installed package; only what we add counts.
    torch_only = json.loads(
        run_python(
            "import json, sys, torch, safetensors.torch; print(json.dumps(list(sys.modules)))",
            tmp_path,
        )
    )
    added = loaded - {name.split(".")[0] for name in torch_only}
    assert not added & HEAVY
    code = "import sys, petite_fast; print('petite_fast._native' in sys.modules)"
    assert run_python(code, tmp_path).strip() == "False"


def test_import_survives_a_wrong_setting(tmp_path):
    code = "import petite_fast"
    assert run_python(code, tmp_path, PETITE_FAST_CPU_ISA="z80", PETITE_FAST_BACKEND="magic") == ""


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
def test_the_native_module_brings_no_openmp_runtime_of_its_own(tmp_path):
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
try:
    importlib.util.module_from_spec(spec)
except ImportError as error:
    print(error)
"""
    from petite_fast import _native

    run = [sys.executable, "-c", code, _native.__file__]
    text = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout
    # Without torch nothing provides OpenMP; that is an ImportError, which `available` reports.
    assert re.search(r"undefined symbol: (GOMP_|omp_|__kmpc)", text), text


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_in_the_process(tmp_path):
    code = """
import torch
from petite_fast.backends import native
torch.set_num_threads(2)
w = torch.randn(512, 128, 3, 3, 3)
torch.nn.functional.conv3d(torch.randn(2, 128, 8, 8, 8), w)
a, b = torch.randn(8, 128, 3, 3, 3), torch.randn(512, 8)
native.effective_weight(w, a, b, 1.0, None, 1, False, torch.float32)
maps = open("/proc/self/maps").read().split()
runtimes = {word for word in maps if "libgomp" in word or "libomp" in word or "libiomp" in word}
print(len(runtimes), *runtimes)
"""
    count, *where = run_python(code, tmp_path).split()
    assert count == "1", where
