"""The bottleneck adapter in Triton: against float64 in the interpreter, and compiled for GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import assert_twice_torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_kernels import (
    DTYPES,
    MATRIX,
    check_compiled,
    compile_kernel,
    compiler,
    interpreter,
    run_interpreted_tests,
)

from petite_fast.backends import eager
from petite_fast.backends import triton as backend
from petite_fast.ops import dispatch

triton = pytest.importorskip("triton")

NAMES = ("grad_x", "grad_down", "grad_down_bias", "grad_up", "grad_up_bias")
# Size of x, whether it is a volume, hidden channels, activation.
CASES: list[tuple[tuple[int, ...], bool, int, str]] = [
    ((1, 6), False, 1, "gelu"),
    ((3, 47, 16), False, 3, "gelu"),
    ((3, 35, 33), False, 17, "relu"),
    ((3, 17, 5, 3, 7), True, 5, "gelu"),
    ((1, 64, 1, 3, 11), True, 8, "relu"),
    ((1, 5, 100), False, 20, "gelu"),
]


def draw(
    size: tuple[int, ...], volume: bool, hidden: int, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """x, down, its bias, up, its bias, grad_y."""
    generator = torch.Generator().manual_seed(0)
    channels = size[1 if volume else -1]
    shapes = (size, (hidden, channels), (hidden,), (channels, hidden), (channels,), size)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for place, weight in ((1, drawn[1]), (3, drawn[3])):
        drawn[place] = weight / math.sqrt(weight.shape[1])
    return [each.to(device, dtype) for each in drawn]


def by_torch(tensors: list[torch.Tensor], activation: str, volume: bool) -> list[torch.Tensor]:
    """y and the gradients in the dtype of the tensors."""
    x, *weights, grad_y = tensors
    form = (activation, volume, x.dtype)
    y = eager.bottleneck(x, *weights, *form)
    return [y, *eager.bottleneck_backward(grad_y, x, *weights[:3], *form)]


def check(
    tensors: list[torch.Tensor], activation: str, volume: bool, forward: Any, backward: Any
) -> None:
    x, *weights, grad_y = tensors
    form = (activation, volume, x.dtype)
    ours = [forward(x, *weights, *form), *backward(grad_y, x, *weights[:3], *form)]
    exact = by_torch([tensor.double() for tensor in tensors], activation, volume)
    theirs = by_torch(tensors, activation, volume)
    for name, *three in zip(("y", *NAMES), ours, theirs, exact, strict=True):
        assert three[0].dtype == x.dtype and three[0].is_contiguous()
        assert_twice_torch(*three, factor=2 if name == "y" else 3, name=name)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("size", "volume", "hidden", "activation"), CASES, ids=str)
def test_interpreted_bottleneck(
    size: tuple[int, ...], volume: bool, hidden: int, activation: str, dtype: torch.dtype
) -> None:
    from petite_fast.backends.triton.bottleneck import bottleneck, bottleneck_backward

    tensors = draw(size, volume, hidden, dtype)
    check(tensors, activation, volume, bottleneck, bottleneck_backward)


@interpreter
def test_interpreted_below_autocast() -> None:
    """x in float32 with products in float16: rounded for the products only."""
    from petite_fast.backends.triton import bottleneck

    x, *weights, grad_y = draw((2, 19, 18), False, 4, torch.float32)
    form = ("gelu", False, torch.float16)
    ours = [bottleneck.bottleneck(x, *weights, *form)]
    ours += bottleneck.bottleneck_backward(grad_y, x, *weights[:3], *form)
    theirs = [eager.bottleneck(x, *weights, *form)]
    theirs += eager.bottleneck_backward(grad_y, x, *weights[:3], *form)
    exact = by_torch([tensor.double() for tensor in (x, *weights, grad_y)], "gelu", False)
    for name, *three in zip(("y", *NAMES), ours, theirs, exact, strict=True):
        assert three[0].dtype == torch.float32
        assert_twice_torch(*three, name=name)


@interpreter
def test_interpreted_programs_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from petite_fast.backends.triton import bottleneck

    monkeypatch.setattr(bottleneck, "PROGRAMS", 2)
    tensors = draw((3, 47, 16), False, 3, torch.float32)
    check(tensors, "gelu", False, bottleneck.bottleneck, bottleneck.bottleneck_backward)


@interpreter
def test_interpreted_nan_stays() -> None:
    from petite_fast.backends.triton import bottleneck

    x, *weights, _ = draw((4, 16), False, 3, torch.float32)
    x[1, 5] = math.nan
    for activation in ("gelu", "relu"):
        y = bottleneck.bottleneck(x, *weights, activation, False, x.dtype)
        assert y.isnan().any(1).tolist() == [False, True, False, False] and y[1].isnan().all()


@compiler
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted_tests(__file__, tmp_path)


@compiler
@pytest.mark.parametrize("capability", MATRIX)
@pytest.mark.parametrize(
    ("channels", "hidden", "last", "x_dtype", "dtype", "precision"),
    [
        (64, 64, True, "bf16", "bf16", "ieee"),
        (128, 16, False, "fp16", "fp16", "ieee"),
        (64, 64, False, "fp32", "bf16", "ieee"),
        (64, 64, True, "fp32", "fp32", "tf32"),
        (64, 32, False, "fp32", "fp32", "full"),
        (768, 96, True, "bf16", "bf16", "ieee"),
    ],
)
def test_compiled(
    channels: int, hidden: int, last: bool, x_dtype: str, dtype: str, precision: str,
    capability: int, tmp_path: Path,
) -> None:  # fmt: skip
    from petite_fast.backends.triton import bottleneck

    types = (DTYPES[x_dtype], DTYPES[dtype])
    exact = precision.replace("full", "ieee")
    wide, weights = f"*{x_dtype}", {"down": f"*{dtype}", "down_bias": f"*{x_dtype}"}
    forward = {"x": wide, **weights, "up": f"*{dtype}", "up_bias": wide, "y": wide}
    forward.update(dict.fromkeys(("rows", "SPACE"), "i32"))
    backward = {"grad_y": wide, "x": wide, **weights, "up": f"*{dtype}", "grad_x": wide}
    parts = ("part_down", "part_down_bias", "part_up", "part_up_bias")
    backward.update(dict.fromkeys(parts, "*fp32"))
    backward.update(dict.fromkeys(("rows", "shares", "SPACE"), "i32"))
    kernels = [(bottleneck.forward_kernel, forward, False)]
    if channels < 768:
        kernels.append((bottleneck.backward_kernel, backward, True))
    for kernel, signature, is_backward in kernels:
        constants, options = bottleneck.constants(
            channels, hidden, "gelu", last, *types, exact, is_backward
        )
        made = compile_kernel(kernel, signature, constants, {"SPACE"}, options, capability)
        check_compiled(made, capability, precision, tmp_path)


@pytest.mark.usefixtures("free_choice")
@compiler
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda device: (True, ""))

    def ask(x: torch.Tensor, hidden: int, dtype: torch.dtype | None = None) -> tuple[str, str]:
        """The reasons of both passes."""
        weights = [
            x.new_empty(size) for size in ((hidden, x.shape[-1]), hidden, (x.shape[-1], hidden))
        ]
        form = ("gelu", False, dtype or x.dtype)
        forward = (x, *weights, x.new_empty(x.shape[-1]), *form)
        backward = (x, x, *weights, *form)
        answers = (
            backend.can_run_bottleneck(*forward), backend.can_run_bottleneck_backward(*backward)
        )  # fmt: skip
        if x.is_cuda:
            wanted = backend.bottleneck_forward if answers[0][0] else eager.bottleneck
            assert dispatch.choose("bottleneck", *forward) is wanted
            wanted = backend.bottleneck_backward if answers[1][0] else eager.bottleneck_backward
            assert dispatch.choose("bottleneck_backward", *backward) is wanted
        return answers[0][1], answers[1][1]

    def both(reason: str) -> tuple[str, str]:
        return reason, reason

    assert ask(torch.ones(3, 16), 4) == both("no kernel for device 'cpu'")
    with FakeTensorMode():
        x = torch.empty(5, 64, device="cuda")
        assert ask(x, 8)[0].startswith("not measured yet;")
        monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
        assert ask(x, 8) == both("")
        assert ask(x.bfloat16(), 64) == both("")
        assert ask(x, 64, torch.bfloat16) == both("")
        assert ask(x, 33) == (
            "", "64 channels with 33 hidden: the sums do not stay in the registers"
        )  # fmt: skip
        more = torch.empty(5, 128, device="cuda", dtype=torch.bfloat16)
        assert ask(more, 16) == both("")
        assert ask(more.float(), 16, torch.bfloat16) == (
            "", "128 channels with 16 hidden: the sums do not stay in the registers"
        )  # fmt: skip
        wide = torch.empty(5, 768, device="cuda", dtype=torch.bfloat16)
        assert ask(wide, 96) == (
            "", "768 channels with 96 hidden: the sums do not stay in the registers"
        )  # fmt: skip
        assert ask(wide, 129)[0] == (
            "129 hidden channels do not stay in the registers, up to 128 do"
        )
        assert ask(x.double(), 8) == both(
            "no kernel for x of torch.float64 with products in torch.float64"
        )
        assert ask(x.bfloat16(), 8, torch.float32) == both(
            "no kernel for x of torch.bfloat16 with products in torch.float32"
        )
        strided = torch.empty_strided((5, 64), (128, 1), device="cuda")
        assert ask(strided, 8) == both("the kernel wants contiguous tensors")
        assert ask(torch.empty(0, 64, device="cuda"), 8) == both("the tensor is empty")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("size", "volume", "hidden", "activation"), CASES, ids=str)
def test_cuda(
    size: tuple[int, ...], volume: bool, hidden: int, activation: str, dtype: torch.dtype
) -> None:
    tensors = draw(size, volume, hidden, dtype, "cuda")
    check(tensors, activation, volume, backend.bottleneck_forward, backend.bottleneck_backward)
