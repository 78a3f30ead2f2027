"""What the compilers make of csrc: code for every target, nothing that leaks between sets."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma".split()


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(p.name for p in (CSRC / "cuda").glob("*.cu")))
def test_cuda_compiles_for_every_architecture_without_spills(source, tmp_path):
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip("no nvcc")
    known = run(nvcc, "--list-gpu-arch")
    archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}\n" in known + "\n"]
    assert "80" in archs and "90" in archs
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    text = run(
        nvcc, "-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v", "-I", CSRC, *targets,
        "-c", CSRC / "cuda" / source, "-o", tmp_path / "object.o",
    )  # fmt: skip
    for arch in archs:
        assert f"'sm_{arch}'" in text
    stores = re.findall(r"(\d+) bytes spill stores", text)
    assert stores and set(stores) == {"0"}, text
    if source == "depthwise.cu":
        check_copies(tmp_path / "object.o", len(archs))


def check_copies(target: Path, archs: int) -> None:
    """The depthwise kernels copy to shared memory by 16 bytes, past the registers."""
    nvidia = pytest.importorskip("triton.backends.nvidia")
    code = run(Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-sass", target)
    kernels = dict.fromkeys(("conv_kernel", "adjoint_kernel", "grad_weight_kernel"), 0)
    for function in code.split("Function : ")[1:]:
        name = next((name for name in kernels if name in function.split("\n", 1)[0]), None)
        if name is None:
            continue
        kernels[name] += 1
        widths = re.findall(r"LDGSTS\S*?(\.\d+)? \[", function)
        assert widths and set(widths) == {".128"}, name
        assert not re.search(r"\b(LDL|STL)\b", function), name
    assert kernels == {
        "conv_kernel": 6 * archs, "adjoint_kernel": 3 * archs, "grad_weight_kernel": 6 * archs
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize(
    "source",
    sorted(p.name for p in (CSRC / "cpu").glob("*.cpp") if "PF_ISA" in p.read_text("utf-8")),
)
def test_wide_code_defines_no_weak_symbol(source, tmp_path):
    # The linker keeps one copy of a weak function; an AVX-512 copy would crash older CPUs.
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no compiler")
    target = tmp_path / "object.o"
    run(
        compiler, "-std=c++17", "-O3", "-fPIC", *AVX512, "-DPF_ISA=avx512", "-I", CSRC,
        "-c", CSRC / "cpu" / source, "-o", target,
    )  # fmt: skip
    symbols = run("nm", "--defined-only", target)
    weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
    assert symbols and not weak, weak
