"""quantise and dequantise of the native backend: bit by bit those of the eager one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petite_fast.backends import eager_compress, native, native_compress

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [0, 1, 2**33 + 5, 2**63 - 1]


def draw(count: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Random values with one block of a special kind."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10
    block = slice(0, 256)
    if kind == "zero":
        x[block] = 0
    elif kind == "tiny":
        x *= 2.0**-100
    elif kind == "denormal":
        x[block] *= 2.0**-142
    elif kind != "plain":
        x[count // 2] = float(kind)
    return x.to(dtype)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal as bits, save that one NaN is as good as another."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(ours.isnan(), theirs.isnan())
    whole = torch.int32 if ours.dtype == torch.float32 else torch.int16
    known = ~ours.isnan()
    assert torch.equal(ours.view(whole)[known], theirs.view(whole)[known])


def compare(count: int, dtype: torch.dtype, kind: str, seed: int) -> None:
    x, where = draw(count, dtype, kind), torch.tensor(seed)
    assert native_compress.can_run_quantise(x, where) == (True, "")
    codes, scales = native_compress.quantise(x, where)
    wanted_codes, wanted_scales = eager_compress.quantise(x, where)
    assert torch.equal(codes, wanted_codes)
    assert_same_bits(scales, wanted_scales)
    arguments = (codes, scales, x.shape, x.stride(), dtype)
    assert native_compress.can_run_dequantise(*arguments) == (True, "")
    assert_same_bits(native_compress.dequantise(*arguments), eager_compress.dequantise(*arguments))


KINDS = ["plain", "zero", "tiny", "denormal", "nan", "inf", "-inf"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_eager(dtype: torch.dtype, kind: str) -> None:
    for count, seed in itertools.product((1, 255, 256, 257, 4099), SEEDS):
        compare(count, dtype, kind, seed)


def test_eager_goes_on_over_its_pieces() -> None:
    count = (eager_compress.PIECE + 3) * 256 - 100
    compare(count, torch.float32, "plain", 7)


def test_every_float16_and_bfloat16() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        codes, scales = native_compress.quantise(x, torch.tensor(3))
        wanted = eager_compress.quantise(x, torch.tensor(3))
        assert torch.equal(codes, wanted[0])
        assert_same_bits(scales, wanted[1])
        assert scales.isnan().any() and not scales.isnan().all()


def test_other_memory_formats() -> None:
    x = draw(2 * 6 * 5 * 4 * 9, torch.float32, "plain").view(2, 6, 5, 4, 9)
    for y in (x.to(memory_format=torch.channels_last_3d), x.permute(4, 2, 0, 1, 3), x[1:]):
        codes, scales = native_compress.quantise(y, torch.tensor(1))
        assert torch.equal(codes, eager_compress.quantise(y, torch.tensor(1))[0])
        restored = native_compress.dequantise(codes, scales, y.shape, y.stride(), y.dtype)
        assert restored.stride() == y.stride()
        assert (restored - y).abs().max() <= y.abs().max() / 127


def test_threads_do_not_change_the_result() -> None:
    x = draw(256 * 700 + 11, torch.bfloat16, "plain")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes, scales = native_compress.quantise(x, torch.tensor(11))
            out = native_compress.dequantise(codes, scales, x.shape, x.stride(), x.dtype)
            results.append((codes, scales, out))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_is_written_around_the_outputs() -> None:
    count, blocks = 300, 2
    module, _ = native._load()
    codes = torch.full((blocks * 256 + 128,), 7, dtype=torch.int8)
    scales, out = torch.full((blocks + 16,), 7.0), torch.full((count + 64,), 7.0)
    inner = codes[64:-64], scales[8:-8], out[32:-32]
    places = (inner[0].data_ptr(), 512, inner[1].data_ptr(), 2)
    x = draw(count, torch.float32, "plain")
    module.quantise(native._operand(x), *places, (1, 2), 1)
    module.dequantise(*places, native._operand(inner[2]), 1)
    for whole, inside, edge in ((codes, inner[0], 64), (scales, inner[1], 8), (out, inner[2], 32)):
        assert (whole[:edge] == 7).all() and (whole[-edge:] == 7).all()
        assert not (inside == 7).all()
    assert not inner[0][count:].any()
    assert (inner[2] - x).abs().max() <= x.abs().max() / 127


def test_a_wrong_length_is_an_error_and_not_a_write_past_the_end() -> None:
    module, _ = native._load()
    x, codes, scales = torch.ones(300), torch.empty(512, dtype=torch.int8), torch.empty(2)
    address = native._operand(x)
    for given, message in (
        ((codes.data_ptr(), 511, scales.data_ptr(), 2), "codes: must have 512 bytes, got 511"),
        ((codes.data_ptr(), 512, scales.data_ptr(), 1), "scales: must have 2 elements, got 1"),
        ((0, 512, scales.data_ptr(), 2), "must not be null"),
    ):
        with pytest.raises(ValueError, match=message):
            module.quantise(address, *given, (1, 2), 1)
        with pytest.raises(ValueError, match=message):
            module.dequantise(*given, address, 1)
    places = (codes.data_ptr(), 512, scales.data_ptr(), 2)
    with pytest.raises(ValueError, match="float64 has no 8-bit form"):
        module.quantise(native._operand(x.double()), *places, (1, 2), 1)
    with pytest.raises(ValueError, match="threads must be positive"):
        module.quantise(address, *places, (1, 2), 0)


def test_refusals_have_reasons() -> None:
    seed = torch.tensor(0)
    possible, reason = native_compress.can_run_quantise(torch.empty(300, device="meta"), seed)
    assert not possible and reason == "no kernel for device 'meta'"
    assert native_compress.can_run_quantise(torch.empty(0), seed) == (False, "the tensor is empty")


def run_tests(folder: Path, selection: str, **variables: str) -> str:
    """These tests in a fresh interpreter, away from the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, __file__],
        env={**environment, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name: str, tmp_path: Path) -> None:
    if name not in native.build_info()["isas_usable"]:
        pytest.skip(f"this CPU or build has no {name}")
    output = run_tests(
        tmp_path, "same_bits or every_float or around or expected",
        PETITE_FAST_CPU_ISA=name, PETITE_FAST_EXPECT_ISA=name,
    )  # fmt: skip
    assert " passed" in output and "skipped" not in output, output


def test_expected_instruction_set() -> None:
    isa = native.build_info()["isa"]
    assert isa == os.environ.get("PETITE_FAST_EXPECT_ISA", isa)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_backend_can_be_forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        return torch.empty(256, dtype=torch.int8), torch.empty(1)

    from petite_fast.backends import eager
    from petite_fast.ops import dispatch

    monkeypatch.setenv("PETITE_FAST_BACKEND", backend)
    if backend == "eager":
        monkeypatch.setattr(eager, "quantise", spy)
    else:
        row = ("native", native_compress.can_run_quantise, spy)
        monkeypatch.setitem(dispatch._TABLE, "quantise", [row])
    torch.ops.petite_fast.quantise(torch.ones(3), torch.tensor(0))
    assert len(calls) == 1
