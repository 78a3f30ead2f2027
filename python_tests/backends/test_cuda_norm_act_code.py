"""What nvcc makes of the norm_act kernels: registers, shared memory, 16-byte accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHS = ("80", "90", "100")
REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # kNormThreads

pytestmark = pytest.mark.slow


class Kernel(NamedTuple):
    stack: int
    spilled: int
    registers: int
    shared: int
    accesses: Counter[str] | None  # SASS memory instructions; None: nothing reads the machine code


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cuobjdump(nvcc: str) -> str | None:
    """The toolkit's, or the one that Triton brings."""
    beside = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(Path(nvcc).parent))
    triton = importlib.util.find_spec("triton")
    if beside or triton is None or triton.origin is None:
        return beside
    brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(brought) if brought.exists() else None


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Every kernel of norm_act.cu for one architecture, by its mangled name."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip("no nvcc")
    if f"compute_{request.param}\n" not in run(nvcc, "--list-gpu-arch") + "\n":
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    cubin = tmp_path_factory.mktemp("code") / "norm_act.cubin"
    text = run(
        nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{request.param}", "-Xptxas=-v", "-I", CSRC,
        CSRC / "cuda" / "norm_act.cu", "-o", cubin,
    )  # fmt: skip
    tool = cuobjdump(nvcc)
    code = {}
    if tool is not None:
        for part in run(tool, "-sass", cubin).split("Function : ")[1:]:
            code[part.split()[0]] = Counter(re.findall(r"\b(?:LD|ST)[GL][.\w]*", part))
    found = {}
    for entry in text.split("Compiling entry function '")[1:]:
        name = entry.split("'")[0]
        stack, spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill st", entry).groups()
        registers = re.search(r"Used (\d+) registers", entry).group(1)
        shared = re.search(r"(\d+) bytes smem", entry)
        found[name] = Kernel(
            int(stack), int(spilled), int(registers), int(shared.group(1)) if shared else 0,
            code.get(name),
        )  # fmt: skip
    return found


def named(kernels: dict[str, Kernel], part: str) -> dict[str, Kernel]:
    chosen = {name: kernel for name, kernel in kernels.items() if part in name}
    assert chosen, (part, list(kernels))
    return chosen


def test_nothing_lives_in_local_memory(kernels):
    # moments and apply: 3 types, whole octets or not; backward: sums, gradients, both.
    assert len(named(kernels, "_kernel")) == 3 * 2 * (1 + 1 + 3) + 2 + 3 * 2 + 2
    for name, kernel in kernels.items():
        assert kernel.stack == 0 and kernel.spilled == 0, (name, kernel)


def test_two_blocks_fit_a_multiprocessor(kernels):
    for name, kernel in kernels.items():
        if re.search(r"(moments|apply|backward)_kernelI(f|NS_8BFloat16E|NS_7Float16E)Lb1E", name):
            assert kernel.registers * THREADS * 2 <= REGISTERS, (name, kernel)
        assert kernel.shared <= 48 * 1024, (name, kernel)


@pytest.mark.parametrize("element", ["f", "NS_8BFloat16E", "NS_7Float16E"])
def test_whole_octets_are_read_and_written_16_bytes_at_a_time(kernels, element):
    per_octet = 2 if element == "f" else 1
    rows = 1 if element == "f" else 2

    def accesses(name: str, flags: str) -> Counter[str]:
        (kernel,) = named(kernels, f"{name}I{element}{flags}E").values()
        if kernel.accesses is None:
            pytest.skip("no cuobjdump")
        return kernel.accesses

    # x once for the shift and of four rows
    assert accesses("moments_kernel", "Lb1E")["LDG.E.128"] >= 5 * per_octet
    apply = accesses("apply_kernel", "Lb1E")  # x and the residual; y and xhat
    assert apply["LDG.E.128"] >= 2 * rows * per_octet
    assert apply["STG.E.128"] >= 2 * rows * per_octet
    sums = accesses("backward_kernel", "Lb1ELb1ELb0E")  # grad_y, y or xhat, the residual
    assert sums["LDG.E.128"] >= 3 * rows * per_octet
    writes = accesses("backward_kernel", "Lb1ELb0ELb1E")  # grad_x and the residual's gradient
    assert writes["LDG.E.128"] >= 3 * rows * per_octet
    assert writes["STG.E.128"] >= 2 * rows * per_octet
    # Only the xhat of a few kept channels is stored element by element.
    assert apply["STG.E"] == (8 if element == "f" else 0), apply
    assert writes["STG.E"] == 0, writes
