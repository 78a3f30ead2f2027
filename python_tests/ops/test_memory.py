"""The product's claim as a unit test: what autograd keeps, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from petite_fast.ops import (
    adapted_conv,
    adapted_linear,
    bottleneck,
    frozen_batch_norm,
    saved_bytes,
    scale_shift,
)

C, OUT_C, R = 8, 12, 2
SIZE = (5, 6, 7)
UNIT = 2 * C * 5 * 6 * 7 * 4  # bytes of one float32 input
OUT = 2 * OUT_C * 5 * 6 * 7 * 4


def _parameter(*shape: int, trains: bool) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=trains)


def _conv_bytes(trains: str, transposed: bool = False, **geometry: Any) -> int:
    """Saved bytes of one convolution in which the parameters named in `trains` require grad."""
    k = (3, 3, 3)
    names = trains.split()
    shapes = {
        "weight": (C, OUT_C, *k) if transposed else (OUT_C, C, *k),
        "bias": (OUT_C,),
        "lora_A": (R, C, 1, 1, 1) if transposed else (R, C, *k),
        "lora_B": (R, OUT_C, *k) if transposed else (OUT_C, R),
        "gamma": (OUT_C,),
        "beta": (OUT_C,),
    }
    used = {"weight", "bias"} | {n for n in names if n in shapes}
    if used & {"lora_A", "lora_B"}:
        used |= {"lora_A", "lora_B"}
    tensors = {n: _parameter(*shapes[n], trains=n in names) for n in used}
    if "gamma" in tensors:
        nn.init.ones_(tensors["gamma"])
    x = torch.randn(2, C, *SIZE, requires_grad="x" in names)
    return saved_bytes(
        lambda: adapted_conv(x, **tensors, transposed=transposed, padding=1, **geometry)
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    ("trains", "kept"),
    [
        ("x", 0),
        ("x bias", 0),
        ("x beta", 0),
        ("x bias beta", 0),
        ("x lora_A lora_B", UNIT),
        ("lora_A lora_B", UNIT),
        ("x lora_A", UNIT),
        ("x lora_A lora_B bias", UNIT),
        ("x lora_B", UNIT * R // C),
        ("x lora_B bias", UNIT * R // C),
        ("x gamma beta", OUT),
        ("x gamma lora_A lora_B", UNIT),
        ("x weight", UNIT),
    ],
)
def test_conv_table(trains: str, kept: int, transposed: bool) -> None:
    assert _conv_bytes(trains, transposed) == kept


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_explicit_padding_keeps_x_not_its_padded_copy(mode: str) -> None:
    assert _conv_bytes("x lora_A lora_B", padding_mode=mode) == UNIT
    assert _conv_bytes("x bias", padding_mode=mode) == 0


def test_depthwise_lora_fa_keeps_the_smaller_of_t_and_x() -> None:
    x = torch.randn(1, C, *SIZE, requires_grad=True)
    weight = _parameter(C, 1, 3, 3, 3, trains=False)
    a, b = _parameter(R, 1, 3, 3, 3, trains=False), _parameter(C, R, trains=True)
    arguments = {"lora_A": a, "lora_B": b, "groups": C, "padding": 1}
    unit = x.numel() * 4
    # t has r channels per group, twice x at stride 1, a quarter of x at stride 2.
    assert saved_bytes(lambda: adapted_conv(x, weight, **arguments)) == unit
    strided = saved_bytes(lambda: adapted_conv(x, weight, stride=2, **arguments))
    assert strided == R * C * 3 * 3 * 4 * 4 < unit


def test_autocast_keeps_half() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert _conv_bytes("x lora_A lora_B") == UNIT // 2
        assert _conv_bytes("x bias") == 0


def test_no_grad_keeps_nothing() -> None:
    with torch.no_grad():
        assert _conv_bytes("x lora_A lora_B") == 0


def test_linear_table() -> None:
    x = torch.randn(5, 7, C, requires_grad=True)
    weight, bias = _parameter(OUT_C, C, trains=False), _parameter(OUT_C, trains=True)
    a, b = _parameter(R, C, trains=True), _parameter(OUT_C, R, trains=True)
    unit = x.numel() * 4
    assert saved_bytes(lambda: adapted_linear(x, weight, bias)) == 0
    assert saved_bytes(lambda: adapted_linear(x, weight, lora_A=a, lora_B=b)) == unit
    a.requires_grad_(False)
    assert saved_bytes(lambda: adapted_linear(x, weight, lora_A=a, lora_B=b)) == unit * R // C


def test_small_ops() -> None:
    x = torch.randn(2, C, *SIZE, requires_grad=True)
    gamma, beta = _parameter(C, trains=True), _parameter(C, trains=True)
    mean, var = torch.zeros(C), torch.ones(C)
    frozen = _parameter(C, trains=False)
    assert saved_bytes(lambda: scale_shift(x, gamma, beta)) == UNIT
    assert saved_bytes(lambda: scale_shift(x, frozen, beta)) == 0
    # The variance, a buffer of C floats, is all that a frozen BatchNorm needs.
    assert saved_bytes(lambda: frozen_batch_norm(x, mean, var, frozen, beta)) == 4 * C
    assert saved_bytes(lambda: frozen_batch_norm(x, mean, var, gamma, beta)) == UNIT + 2 * 4 * C
    tokens = torch.randn(3, 5, C, requires_grad=True)
    weights = [_parameter(*s, trains=True) for s in ((2, C), (2,), (C, 2), (C,))]
    assert saved_bytes(lambda: bottleneck(tokens, *weights)) == tokens.numel() * 4


def test_counts_a_storage_once_and_a_view_whole() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 400
    assert saved_bytes(lambda: x.relu() * x) == 800
    assert saved_bytes(lambda: x[:2].exp()) == 80
    assert saved_bytes(lambda: (x[:2] * x[:2]).sum()) == 400


def test_counts_what_a_function_hides_in_its_context() -> None:
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.secret = [x * 2]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.secret[0]

    x = torch.randn(25, requires_grad=True)
    assert saved_bytes(lambda: Hides.apply(x)) == 100


def test_torch_keeps_what_we_do_not() -> None:
    """The floor this library exists for: torch keeps the input of a frozen convolution."""
    x = torch.randn(2, C, *SIZE, requires_grad=True)
    conv = nn.Conv3d(C, OUT_C, 3, padding=1).requires_grad_(False)
    assert saved_bytes(lambda: conv(x)) == UNIT
    assert saved_bytes(lambda: adapted_conv(x, conv.weight, conv.bias, padding=1)) == 0


def test_backward_builds_no_dense_stand_in() -> None:
    """Peak allocation of a frozen convolution's backward: grad_x and the weight, nothing like x."""
    x = torch.randn(1, 16, 24, 24, 24, requires_grad=True)
    conv = nn.Conv3d(16, 16, 3, padding=1).requires_grad_(False)
    y = adapted_conv(x, conv.weight, conv.bias, padding=1)
    grad_y = torch.ones_like(y)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        torch.autograd.grad(y, x, grad_y)
    allocated = sum(e.self_cpu_memory_usage for e in trace.events() if e.self_cpu_memory_usage > 0)
    assert allocated < 1.5 * x.numel() * 4
