"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_kernels import (
    DTYPES,
    compile_kernel,
    compiler,
    interpreter,
    registers,
    run_interpreted_tests,
    run_python,
)

from petite_fast.backends import eager_compress, eager_random
from petite_fast.backends import triton as backend

triton = pytest.importorskip("triton")

KINDS = ["plain", "zero", "tiny", "denormal", "nan", "inf"]


@compiler
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted_tests(__file__, tmp_path)


def draw(count: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Random values with one block of a special kind."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10
    if kind == "zero":
        x[:256] = 0
    elif kind == "tiny":
        x *= 2.0**-100
    elif kind == "denormal":
        x[:256] *= 2.0**-142
    elif kind != "plain":
        x[count // 2] = float(kind)
    return x.to(dtype)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_same_bits_as_eager(dtype: torch.dtype, kind: str) -> None:
    from petite_fast.backends.triton import compress

    for count in (1, 255, 257, 256 * 9 + 40):
        x = draw(count, dtype, kind)
        for seed in (0, 2**33 + 5, 2**63 - 1):
            codes, scales = compress.quantise(x, torch.tensor(seed))
            wanted_codes, wanted_scales = eager_compress.quantise(x, torch.tensor(seed))
            assert torch.equal(codes, wanted_codes)
            assert torch.equal(scales.view(torch.int32), wanted_scales.view(torch.int32))
        ours = compress.dequantise(codes, scales, x.shape, x.stride(), dtype)
        theirs = eager_compress.dequantise(codes, scales, x.shape, x.stride(), dtype)
        if dtype == torch.bfloat16:
            # The interpreter cuts bits off where a GPU rounds (test_compiled looks for that).
            theirs = eager_compress.dequantise(codes, scales, x.shape, x.stride(), torch.float32)
            theirs = ((theirs.view(torch.int32) >> 16) << 16).view(torch.float32).to(dtype)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(0), theirs.nan_to_num(0))


@interpreter
def test_interpreted_other_memory_formats() -> None:
    from petite_fast.backends.triton import compress

    x = draw(2 * 6 * 5 * 4 * 9, torch.float32, "plain").view(2, 6, 5, 4, 9)
    for y in (x.to(memory_format=torch.channels_last_3d), x[1:]):
        codes, scales = compress.quantise(y, torch.tensor(1))
        assert torch.equal(codes, eager_compress.quantise(y, torch.tensor(1))[0])
        restored = compress.dequantise(codes, scales, y.shape, y.stride(), y.dtype)
        assert restored.stride() == y.stride()
        assert (restored - y).abs().max() <= y.abs().max() / 127


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_dropout_is_eager_bit_by_bit(dtype: torch.dtype) -> None:
    from petite_fast.backends.triton import random

    for count in (1, 255, 257, 256 * 9 + 40):
        x = draw(count, dtype, "plain")
        for seed in (0, 2**33 + 5, 2**63 - 1):
            arguments = (x, 0.3, torch.tensor(seed))
            assert torch.equal(random.dropout(*arguments), eager_random.dropout(*arguments))


def compiled(name: str, dtype: str, capability: int) -> Any:
    """A kernel for a GPU that is not there, with the hints that a launch on 16 n elements gives."""
    from petite_fast.backends.triton import compress, random

    signature = {
        "quantise": {
            "x": f"*{dtype}", "codes": "*i8", "scales": "*fp32", "key0": "i32", "key1": "i32",
            "count": "i32",
        },
        "dropout": {
            "x": f"*{dtype}", "out": f"*{dtype}", "key0": "i32", "key1": "i32", "threshold": "i32",
            "scale": "fp32", "count": "i32",
        },
        "dequantise": {"codes": "*i8", "scales": "*fp32", "out": f"*{dtype}", "count": "i32"},
    }[name]  # fmt: skip
    return compile_kernel(
        getattr(random if name == "dropout" else compress, f"{name}_kernel"), signature,
        {"ROWS": compress.ROWS}, {"count"}, compress.OPTIONS, capability,
    )  # fmt: skip


@compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["quantise", "dequantise", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(name: str, dtype: str, capability: int, tmp_path: Path) -> None:
    kernel = compiled(name, dtype, capability)
    ptx = kernel.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    # Bit by bit the others' arithmetic: true division, no flush to zero, nothing fused.
    assert "ftz" not in ptx and "fma" not in ptx and "div.full" not in ptx
    assert ("div.rn.f32" in ptx) == (name == "quantise")
    if name != "quantise" and dtype != "fp32":
        assert re.search(rf"cvt\.rn\.{dtype.replace('fp', 'f')}", ptx)
    # Sixteen bytes at a time, but for the scales.
    accesses = set(re.findall(r"(?:ld|st)\.global\S*", ptx))
    scales = {"quantise": {"st.global.b32"}, "dequantise": {"ld.global.b32"}}.get(name, set())
    assert accesses == {"ld.global.v4.b32", "st.global.v4.b32"} | scales
    assert registers(kernel, tmp_path) <= 64


@compiler
def test_triton_is_not_loaded_before_it_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import petite_fast\n"
        "from petite_fast.ops import dequantise, quantise\n"
        "codes, scales = quantise(torch.ones(300), 1)\n"
        "assert (dequantise(codes, scales, (300,)) == 1).all()\n"
        "print('triton' in set(sys.modules) - before)\n"
    )
    run = run_python(tmp_path, "-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "False"


@compiler
def test_forced_on_a_cpu_tensor_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from petite_fast.ops import quantise

    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
    reason = "quantise: backend 'triton' was forced and cannot run: no kernel for device 'cpu'"
    with pytest.raises(RuntimeError, match=reason):
        quantise(torch.ones(300), 1)


def test_taken_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has measured these kernels on a GPU."""
    monkeypatch.delenv("PETITE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_can_run", lambda device, count: (True, ""))
    with FakeTensorMode():
        x, seed = torch.empty(300, device="cuda"), torch.empty((), dtype=torch.int64)
        codes = torch.empty(512, dtype=torch.int8, device="cuda")
        scales = torch.empty(2, device="cuda")
    asked = (
        lambda: backend.can_run_quantise(x, seed),
        lambda: backend.can_run_dequantise(codes, scales, (300,), (1,), torch.float32),
        lambda: backend.can_run_dropout(x, 0.1, seed),
    )
    for ask in asked:
        assert ask() == (False, "not measured yet; PETITE_FAST_BACKEND=triton takes it")
    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
    assert [ask() for ask in asked] == [(True, "")] * 3


@compiler
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.available(0) == (False, "compute capability 7.5, the kernels need 8.0 or more")
    backend.available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.available(0) == (True, "")
    backend.available.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    possible, reason = backend.available(0)
    assert not possible and reason.startswith("triton does not load: ")
    backend.available.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_same_bits_as_eager(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
    for count in (1, 255, 257, 4096 * 300 + 7):
        x, seed = draw(count, dtype, kind), torch.tensor(2**40 + 3)
        moved = x.cuda()
        possible, reason = backend.can_run_quantise(moved, seed)
        if not possible:
            pytest.skip(reason)
        codes, scales = backend.quantise(moved, seed)
        wanted_codes, wanted_scales = eager_compress.quantise(x, seed)
        assert torch.equal(codes.cpu(), wanted_codes)
        assert torch.equal(scales.cpu().nan_to_num(-1), wanted_scales.nan_to_num(-1))
        ours = backend.dequantise(codes, scales, x.shape, x.stride(), dtype)
        theirs = eager_compress.dequantise(wanted_codes, wanted_scales, x.shape, x.stride(), dtype)
        assert torch.equal(ours.cpu().isnan(), theirs.isnan())
        assert torch.equal(ours.cpu().nan_to_num(0), theirs.nan_to_num(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_cuda_dropout_same_bits_as_eager(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
    for count in (1, 255, 257, 4096 * 300 + 7):
        x, seed = draw(count, dtype, "plain"), torch.tensor(2**40 + 3)
        assert backend.can_run_dropout(x.cuda(), 0.3, seed) == (True, "")
        ours = backend.dropout(x.cuda(), 0.3, seed).cpu()
        assert torch.equal(ours, eager_random.dropout(x, 0.3, seed))
