"""The CUDA convolution that reads its input once: emulated against float64, and compiled."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conv_cases import assert_twice_torch
from torch._subclasses.fake_tensor import FakeTensorMode

from petite_fast.backends import cuda_conv, eager, native, triton
from petite_fast.ops import dispatch

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

Triple = tuple[int, int, int]
ONE, ZERO = (1, 1, 1), (0, 0, 0)
DTYPES = [torch.bfloat16, torch.float16]
CSRC = Path(__file__).resolve().parents[2] / "csrc"


class Case(NamedTuple):
    """One convolution of kernel 3."""

    channels: int
    outputs: int
    size: Triple
    padding: Triple = ONE
    batch: int = 1
    bias: bool = True


# Every number of columns (16, 32, 48, 64; 80 is 48 + 32 of 48) and of channels (16 and 32 at a
# time), tiles that are whole, cut and missing, more than one tile along each axis.
CASES = [
    Case(16, 16, (5, 9, 17)),
    Case(16, 16, (4, 8, 8), batch=2, bias=False),
    Case(32, 48, (2, 3, 9)),
    Case(48, 32, (3, 7, 5), (0, 1, 0), batch=2),
    Case(64, 64, (2, 4, 3)),
    Case(16, 80, (1, 2, 9), (2, 1, 0)),
    Case(32, 16, (3, 3, 3), ZERO),
    Case(80, 16, (1, 1, 1), batch=2),
    Case(16, 32, (1, 2, 3), (2, 2, 2), bias=False),
    Case(96, 144, (2, 2, 2)),
]


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """x, weight, bias, grad_y; the volumes channels_last_3d."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        volume = drawn.dim() == 5
        return drawn.contiguous(memory_format=torch.channels_last_3d) if volume else drawn

    size = [n + 2 * p - 2 for n, p in zip(case.size, case.padding, strict=True)]
    return [
        normal(case.batch, case.channels, *case.size),
        normal(case.outputs, case.channels, 3, 3, 3) * case.channels**-0.5,
        normal(case.outputs),
        normal(case.batch, case.outputs, *size),
    ]


def torch_conv(case: Case, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """y and grad_x by torch in the dtype of the tensors."""
    x, weight, bias, grad_y = tensors
    x = x.detach().requires_grad_()
    y = F.conv3d(x, weight, bias if case.bias else None, padding=case.padding)
    return y.detach(), torch.autograd.grad(y, x, grad_y)[0]


def emulate(arguments: cuda_conv.Arguments) -> tuple[int, int, int]:
    """Runs the kernel; clocks of shared memory, those lost to conflicts, matrix instructions."""
    module, _ = native._load()
    return module.testing.emulate_conv_halo(*cuda_conv.operands(arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case: Case, dtype: torch.dtype) -> None:
    tensors = draw(case, dtype)
    x, weight, bias, grad_y = tensors
    y, forward = cuda_conv.forward_arguments(x, weight, bias if case.bias else None, case.padding)
    grad_x, backward = cuda_conv.grad_input_arguments(grad_y, weight, case.padding)
    wanted, exact = torch_conv(case, tensors), torch_conv(case, [t.double() for t in tensors])
    for ours, arguments, theirs, right, factor in zip(
        (y, grad_x), (forward, backward), wanted, exact, (2, 3), strict=True
    ):
        ours.fill_(math.nan)
        _, conflicts, _ = emulate(arguments)
        assert conflicts == 0
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last_3d)
        assert_twice_torch(ours, theirs, right, factor)


def test_emulated_takes_weights_in_channels_last() -> None:
    case = CASES[2]
    x, weight, bias, _ = draw(case, torch.bfloat16)
    results = []
    for each in (weight, weight.contiguous()):
        y, arguments = cuda_conv.forward_arguments(x, each, bias, case.padding)
        emulate(arguments)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("channels", "outputs", "columns"), [(16, 16, 16), (32, 32, 32), (48, 96, 48), (64, 64, 64)]
)
def test_emulated_does_what_was_counted(channels: int, outputs: int, columns: int) -> None:
    # The clock model of bench/README.md, for two tiles.
    case = Case(channels, outputs, (4, 8, 9), batch=1)
    x, weight, bias, _ = draw(case, torch.bfloat16)
    _, arguments = cuda_conv.forward_arguments(x, weight, bias, case.padding)
    clocks, conflicts, products = emulate(arguments)
    blocks, steps = 2 * outputs // columns, 27 * channels // 16
    assert products == blocks * steps * 256 // 16 * columns // 8
    result = 256 * columns * 2 // 128
    assert clocks == blocks * (steps * (32 + columns) + result) and conflicts == 0


def test_wrong_arguments_are_refused() -> None:
    case = CASES[0]
    x, weight, bias, _ = draw(case, torch.bfloat16)
    _, (geometry, *tensors) = cuda_conv.forward_arguments(x, weight, bias, case.padding)
    sizes, size, padding = geometry
    for wrong, text in [
        (((1, 8, 16), size, padding), "multiples of 16"),
        (((1, 16, 32), size, padding), "weight: must have 13824 elements"),
        ((sizes, (5, 9, 16), padding), "x: must have 11520 elements"),
        ((sizes, size, (1, 1, 3)), "padding must be 0 to 2, got 3"),
        ((sizes, size, (0, 1, 1)), "y: must have"),
        ((sizes, (1, 9, 85), (0, 1, 1)), "the kernel must fit"),
    ]:
        with pytest.raises(ValueError, match=text):
            emulate((wrong, *tensors))
    with pytest.raises(ValueError, match="weight: must have the dtype of x"):
        emulate((geometry, x, tensors[1].half(), *tensors[2:]))
    with pytest.raises(ValueError, match="x: must be bfloat16 or float16"):
        emulate((geometry, x.float(), *tensors[1:]))
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    with pytest.raises(ValueError, match="x: its address must be a multiple of 16"):
        emulate((geometry, odd, *tensors[1:]))


@pytest.mark.usefixtures("free_choice")
def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_available", lambda device: (True, ""))
    numbers = {
        "stride": ONE, "padding": ONE, "dilation": ONE, "transposed": False,
        "output_padding": ZERO, "groups": 1,
    }  # fmt: skip

    def ask(x: torch.Tensor, weight: torch.Tensor, **given: Any) -> str:
        geometry = {**numbers, **given}
        possible, reason = cuda_conv.can_run_conv(x, weight, None, *geometry.values())
        size = [n + 2 * p - 2 for n, p in zip(x.shape[2:], geometry["padding"], strict=True)]
        assert possible == (reason == "")
        back = cuda_conv.can_run_conv_grad_input(
            x, weight.transpose(0, 1), [len(x), len(weight), *size], *geometry.values()
        )
        assert back == (possible, reason)
        return reason

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        plain = torch.empty(*size, dtype=dtype, device="cuda")
        return plain.to(memory_format=torch.channels_last_3d)

    on_cpu = torch.ones(1, 16, 3, 3, 3)
    assert ask(on_cpu, on_cpu) == "no kernel for device 'cpu'"
    monkeypatch.setattr(triton, "available", lambda device: (False, "not asked here"))
    with FakeTensorMode():
        weight = torch.empty(16, 16, 3, 3, 3, dtype=torch.bfloat16, device="cuda")
        plain = torch.empty(1, 16, 5, 6, 7, dtype=torch.bfloat16, device="cuda")
        x = empty(*plain.shape)
        assert ask(x, weight).startswith("not measured yet against cuDNN")
        arguments = (x, weight, None, *numbers.values())
        assert dispatch.choose("conv", *arguments) is eager.conv
        monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
        assert dispatch.choose("conv", *arguments) is cuda_conv.conv
        assert dispatch.choose("conv_grad_input", x, weight, x.shape, *numbers.values()) is (
            cuda_conv.conv_grad_input
        )
        assert ask(x, weight) == ""
        for given in (
            {"stride": (1, 1, 2)}, {"dilation": (2, 1, 1)}, {"groups": 2}, {"transposed": True},
        ):  # fmt: skip
            assert ask(x, weight, **given) == "only for one group, stride 1 and dilation 1"
        assert ask(x, empty(16, 16, 1, 3, 3)) == "only for kernel 3 and padding up to 2"
        assert ask(x, weight, padding=(1, 1, 3)) == "only for kernel 3 and padding up to 2"
        assert ask(empty(1, 24, 5, 6, 7), empty(16, 24, 3, 3, 3)).startswith("only for channels in")
        assert ask(x.float(), weight.float()).startswith("no kernel for torch.float32")
        assert ask(x.half(), weight).startswith("no kernel for torch.float16 with a weight of")
        assert ask(plain, weight) == "the kernel wants channels_last_3d"
        memory = torch.empty(x.numel() + 4, dtype=x.dtype, device="cuda")
        shifted = memory.as_strided(x.shape, x.stride(), 4)
        assert ask(shifted, weight) == "the kernel wants an address that is a multiple of 16"
        assert ask(empty(1, 16, 2, 6, 7), weight, padding=ZERO) == "a tensor is empty"
        for size in ((1, 16, 2**31, 1, 1), (2**31 - 99, 16, 1, 1, 9), (1, 16, 1, 2**12, 2**13)):
            assert ask(empty(*size), weight) == "a tensor is too large"
        bias = torch.empty(16, dtype=torch.float32, device="cuda")
        assert cuda_conv.can_run_conv(x, weight, bias, *numbers.values()) == (
            False, "the kernel wants a contiguous bias of torch.bfloat16",
        )  # fmt: skip


def cuobjdump() -> Path:
    """NVIDIA's tool, which the Triton package brings along."""
    return Path(pytest.importorskip("triton.backends.nvidia").__file__).parent / "bin" / "cuobjdump"


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled(arch: int, tmp_path: Path) -> None:
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None or f"compute_{arch}\n" not in run(nvcc, "--list-gpu-arch") + "\n":
        pytest.skip(f"no nvcc for sm_{arch}")
    tool, cubin = cuobjdump(), tmp_path / "conv_halo.cubin"
    run(
        nvcc, "-std=c++17", "-O3", "-I", CSRC, f"-arch=sm_{arch}", "-cubin",
        CSRC / "cuda" / "conv_halo.cu", "-o", cubin,
    )  # fmt: skip
    usage = run(tool, "-res-usage", cubin)
    kernels = re.findall(r"ELi(\d+)ELi\d+E.*:\n\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert len(kernels) == 16, usage  # 4 numbers of columns, 2 of channels, 2 dtypes
    for columns, registers, stack, local in kernels:
        # So many blocks of 128 threads share the 65536 registers of a multiprocessor.
        resident = {"16": 4, "32": 3, "48": 2, "64": 2}[columns]
        assert int(registers) * 128 * resident <= 65536 and stack == local == "0", usage

    code = run(tool, "-sass", cubin).split("Function : ")[1:]
    assert len(code) == 16
    for kernel in code:
        name, _ = kernel.split("\n", 1)
        columns, channels = map(int, re.findall(r"ELi(\d+)ELi(\d+)E", name)[0])
        dtype = r"\.BF16" if "BFloat16" in name else ""
        # Three taps: what comes from shared memory comes once, 16 bytes a lane; so does the result.
        steps = channels // 16
        products = len(re.findall(rf"HMMA\.16816\.F32{dtype} ", kernel))
        assert products == steps * 3 * 4 * columns // 8
        assert len(re.findall(r"LDSM\.16\.M88\.4 ", kernel)) == steps * 6
        assert len(re.findall(r"LDS\.128 ", kernel)) == steps * 3 * columns // 16 + 1
        assert re.search(r"STG\.E\.128 ", kernel) and not re.search(r"STG\.E ", kernel)
        copies = re.findall(r"LDGSTS\S*", kernel)
        assert len(copies) == 3 and all("128" in copy and "BYPASS" in copy for copy in copies)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, Case(64, 128, (33, 34, 35), batch=2)], ids=str)
def test_cuda(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
    tensors = draw(case, dtype, "cuda")
    x, weight, bias, grad_y = tensors
    geometry = (ONE, case.padding, ONE, False, ZERO, 1)
    forward = (x, weight, bias if case.bias else None, *geometry)
    backward = (grad_y, weight, x.shape, *geometry)
    wanted, exact = torch_conv(case, tensors), torch_conv(case, [t.double() for t in tensors])
    if cuda_conv.can_run_conv(*forward)[0]:
        assert_twice_torch(cuda_conv.conv(*forward), wanted[0], exact[0])
    if cuda_conv.can_run_conv_grad_input(*backward)[0]:
        assert_twice_torch(cuda_conv.conv_grad_input(*backward), wanted[1], exact[1], 3)
