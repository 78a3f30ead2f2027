"""The ops as PyTorch sees them: schema, implementation, fake implementation.

Autograd stands outside (see `adapted.py`); these are opaque to torch.compile and below
autocast, which they switch off for what they call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from petite_fast.backends import eager, eager_norm_act
from petite_fast.backends.eager_random import BLOCK, block_count
from petite_fast.backends.geometry import make_geometry
from petite_fast.ops import dispatch

_library = torch.library.Library("petite_fast", "DEF")
_CONV = "int[] stride, int[] padding, int[] dilation"


# Asked once: a graph that is compiled by torch 2.11 cannot ask.
_KINDS = "cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "ipu", "privateuseone"
_AUTOCAST_KINDS = tuple(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def autocast_on(kind: str) -> bool:
    """Whether autocast is on for devices of this kind, which may have none ("meta")."""
    return kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind)


def below_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with autocast off; its first argument is a tensor that names the device."""

    @functools.wraps(function)
    def run(tensor: torch.Tensor, *args: Any) -> Any:
        kind = tensor.device.type
        if not autocast_on(kind):
            return function(tensor, *args)
        with torch.autocast(kind, enabled=False):
            return function(tensor, *args)

    return run


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that refuses create_graph=True instead of dropping terms silently."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "petite_fast ops are differentiable once: got a backward with create_graph=True,"
                " wanted create_graph=False (petite_fast.ops.reference has differentiable twins)"
            )
        return backward(ctx, *grads)

    return run


def _define(
    name: str, schema: str, fake: Callable[..., Any], returns: str = "Tensor"
) -> Callable[..., Any]:
    """Register one op; return its Python entry point."""

    def implementation(*args: Any) -> Any:
        return dispatch.choose(name, *args)(*args)

    _library.define(
        f"{name}({schema}) -> {returns}",
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


def _fake_quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = block_count(x.numel())
    codes = x.new_empty(blocks * BLOCK, dtype=torch.int8)
    return codes, x.new_empty(blocks, dtype=torch.float32)


def _fake_dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=codes.device)


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
# x is dense; the seed is a number on the CPU, a tensor only so that a compiled graph can draw it.
quantise = _define("quantise", "Tensor x, Tensor seed", _fake_quantise, "(Tensor, Tensor)")
dequantise = _define(
    "dequantise",
    "Tensor codes, Tensor scales, SymInt[] size, SymInt[] stride, ScalarType dtype",
    _fake_dequantise,
)
# As for quantise: x is dense, the seed is on the CPU.
dropout = _define(
    "dropout", "Tensor x, float p, Tensor seed", lambda x, p, seed: torch.empty_like(x)
)


def _fake_low_rank_input(
    x: torch.Tensor, lora_A: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    return _fake_conv(x, lora_A, None, stride, padding, (1, 1, 1), False, (0, 0, 0), 1)


def _fake_low_rank_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    want_A: bool,
    want_B: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    outputs = grad_y.shape[1]
    return (
        grad_y.new_empty(lora_A.shape if want_A else 0, dtype=wide),
        grad_y.new_empty((outputs, lora_A.shape[0]) if want_B else 0, dtype=wide),
        grad_y.new_empty(outputs if want_bias else 0, dtype=wide),
    )


# Convolutions without groups or dilation whose weight is low-rank: A, then B [O, r].
low_rank_input = _define(
    "low_rank_input",
    "Tensor x, Tensor lora_A, int[] stride, int[] padding",
    _fake_low_rank_input,
)
low_rank_gradient = _define(
    "low_rank_gradient",
    "Tensor grad_y, Tensor? x, Tensor? t, Tensor lora_A, Tensor? lora_B, int[] stride,"
    " int[] padding, bool want_A, bool want_B, bool want_bias",
    _fake_low_rank_gradient,
    "(Tensor, Tensor, Tensor)",
)


def _fake_norm_act(
    x: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    unsafe, norm, groups, _, _, _, _, keep_xhat, keep_sign, dtype = args[6:]
    wide = torch.promote_types(x.dtype, torch.float32)
    channels_last = eager_norm_act.is_channels_last(x, norm)
    statistics = eager_norm_act.statistics_count(x.shape, norm, groups)
    kept = x.new_empty(0, dtype=dtype)
    if keep_xhat:
        kept = torch.empty_like(x, dtype=dtype)
    elif unsafe is not None:
        size = list(x.shape)
        size[eager_norm_act.channel_axis(norm)] = unsafe.shape[0]
        kept = eager_norm_act.in_layout(x.new_empty(size, dtype=dtype), channels_last)
    signs = eager_norm_act.sign_size(x.shape, norm, channels_last) if keep_sign else (0,)
    return (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(statistics, dtype=wide),
        x.new_empty(statistics, dtype=wide),
        kept,
        x.new_empty(signs, dtype=torch.uint8),
    )


def _fake_norm_act_backward(
    grad_y: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    slope, norm, wants, dtype = args[8], args[10], args[17], args[18]
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    channels = grad_y.shape[eager_norm_act.channel_axis(norm)]
    sizes = [channels, channels, 0 if slope is None else slope.shape[0]]
    empty = grad_y.new_empty(0, dtype=wide)
    grads = [
        grad_y.new_empty(n, dtype=wide) if want else torch.empty_like(empty)
        for n, want in zip(sizes, wants[2:], strict=True)
    ]
    return (
        torch.empty_like(grad_y, dtype=dtype) if wants[0] else torch.empty_like(empty),
        torch.empty_like(grad_y) if wants[1] else torch.empty_like(empty),
        grads[0],
        grads[1],
        grads[2],
    )


_NORM = "str norm, int groups, float eps, str activation, float slope_value, bool act_first"
norm_act = _define(
    "norm_act",
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? slope,"
    f" Tensor? residual, Tensor? unsafe, {_NORM}, bool keep_xhat, bool keep_sign,"
    " ScalarType dtype",
    _fake_norm_act,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
norm_act_backward = _define(
    "norm_act_backward",
    "Tensor grad_y, Tensor? kept, Tensor? xhat, Tensor? sign, Tensor? residual, Tensor? mean,"
    f" Tensor? var, Tensor? weight, Tensor? bias, Tensor? slope, Tensor? unsafe, {_NORM},"
    " str source, bool[] wants, ScalarType dtype",
    _fake_norm_act_backward,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
pack_signs = _define(
    "pack_signs",
    "Tensor x",
    lambda x: x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8),
)
unpack_signs = _define(
    "unpack_signs",
    "Tensor bits, SymInt size",
    lambda bits, size: bits.new_empty((*bits.shape[:-1], size), dtype=torch.bool),
)


def _fake_bottleneck(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, args[-1]))


def _fake_bottleneck_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = (down_weight, down_bias, up_weight)
    down, down_bias, up = (w.new_empty(w.shape) for w in weights)
    grad_x = torch.empty_like(grad_y, dtype=x.dtype)
    return grad_x, down, down_bias, up, up_weight.new_empty(len(up_weight))


_BOTTLENECK = "str activation, bool volumes, ScalarType dtype"
bottleneck = _define(
    "bottleneck",
    "Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias,"
    f" {_BOTTLENECK}",
    _fake_bottleneck,
)
bottleneck_backward = _define(
    "bottleneck_backward",
    "Tensor grad_y, Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight,"
    f" {_BOTTLENECK}",
    _fake_bottleneck_backward,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
