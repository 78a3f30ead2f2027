"""The ops as PyTorch sees them: schema, implementation, fake implementation.

Autograd stands outside (see `adapted.py`); these are opaque to torch.compile and below
autocast, which they switch off for what they call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from petite_fast.backends import eager
from petite_fast.ops import dispatch
from petite_fast.ops.geometry import make_geometry

_library = torch.library.Library("petite_fast", "DEF")
_CONV = "int[] stride, int[] padding, int[] dilation"


def below_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with autocast off; its first argument is a tensor that names the device."""

    @functools.wraps(function)
    def run(tensor: torch.Tensor, *args: Any) -> Any:
        kind = tensor.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(tensor, *args)
        with torch.autocast(kind, enabled=False):
            return function(tensor, *args)

    return run


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that refuses create_graph=True instead of dropping terms silently."""

    @functools.wraps(backward)
    def run(ctx: Any, grad_y: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "petite_fast ops are differentiable once: got a backward with create_graph=True,"
                " wanted create_graph=False (petite_fast.ops.reference has differentiable twins)"
            )
        return backward(ctx, grad_y)

    return run


def _define(name: str, schema: str, fake: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Register one op; return its Python entry point."""

    def implementation(*args: Any) -> torch.Tensor:
        return dispatch.choose(name, *args)(*args)

    _library.define(
        f"{name}({schema}) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )
    _library.impl(name, below_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"petite_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.petite_fast, name)


def _fake_effective_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scale: float,
    gamma: torch.Tensor | None,
    groups: int,
    transposed: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _fake_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> torch.Tensor:
    geometry = make_geometry(
        weight.shape[2:], stride, padding, dilation, groups, transposed, output_padding
    )
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    size = (x.shape[0], channels, *geometry.output_size(x.shape[2:], weight.shape[2:]))
    return x.new_empty(size).contiguous(memory_format=eager.conv_layout(x, weight))


def _fake_conv_grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, input_size: Sequence[int], *_: Any
) -> torch.Tensor:
    layout = eager.conv_layout(grad_y, weight)
    return grad_y.new_empty(tuple(input_size)).contiguous(memory_format=layout)


def _fake_conv_grad_weight(
    grad_y: torch.Tensor, x: torch.Tensor, weight_size: Sequence[int], *_: Any
) -> torch.Tensor:
    return x.new_empty(tuple(weight_size))


effective_weight = _define(
    "effective_weight",
    "Tensor weight, Tensor? lora_A, Tensor? lora_B, float scale, Tensor? gamma, int groups,"
    " bool transposed, ScalarType dtype",
    _fake_effective_weight,
)
conv = _define(
    "conv",
    f"Tensor x, Tensor weight, Tensor? bias, {_CONV}, bool transposed, int[] output_padding,"
    " int groups",
    _fake_conv,
)
conv_grad_input = _define(
    "conv_grad_input",
    f"Tensor grad_y, Tensor weight, SymInt[] input_size, {_CONV}, bool transposed,"
    " int[] output_padding, int groups",
    _fake_conv_grad_input,
)
conv_grad_weight = _define(
    "conv_grad_weight",
    f"Tensor grad_y, Tensor x, SymInt[] weight_size, {_CONV}, int groups",
    _fake_conv_grad_weight,
)
