"""How Triton kernels are run and looked at without a GPU."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
compiler = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        """As a GPU does it; the interpreter multiplies the bits of bfloat16 as integers."""
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                TensorHandle((side.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
                for side in (a, b)
            )
        return original_dot(self, a, b, *args)

    InterpreterBuilder.create_dot = create_dot


def run_python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, away from the checkout: it sees the package that is installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )


def run_interpreted_tests(file: str, folder: Path) -> None:
    """The tests of `file` with "interpreted" in their names, by Triton's interpreter."""
    run = run_python(
        folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error::RuntimeWarning",
        "-k", "interpreted", file, TRITON_INTERPRET="1",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    options: dict[str, Any],
    capability: int,
) -> Any:
    """A kernel for a GPU that is not there; pointers and `aligned` are multiples of 16."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = [
        (place,)
        for place, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in aligned
    ]
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in places},
    )
    return compile_source(source, target=GPUTarget("cuda", capability, 32), options=options)


def registers(kernel: Any, folder: Path, spills_allowed: bool = False) -> int:
    """Registers per thread of a compiled kernel, which spills none."""
    import triton.backends.nvidia

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert spills_allowed or re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    return int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]


MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program can have


def is_old() -> bool:
    """Triton 3.6, the oldest that is supported (`make test-triton`)."""
    return importlib.metadata.version("triton").startswith("3.6.")


def check_compiled(kernel: Any, capability: int, precision: str, folder: Path) -> None:
    """Matrix instructions unless in full float32, nothing spilled, shared memory that exists.

    Triton 3.6 takes an older matrix instruction here and there, and spills for sm_100.
    """
    ptx, old = kernel.asm["ptx"], is_old()
    assert f".target sm_{capability}" in ptx
    assert old or (MATRIX[capability] in ptx) == (precision != "full")
    assert any(name in ptx for name in MATRIX.values()) == (precision != "full")
    assert kernel.metadata.shared <= SHARED[capability]
    assert capability < 100 or kernel.metadata.tmem_size <= 512  # columns of tensor memory
    assert registers(kernel, folder, old and capability == 100) <= 255
