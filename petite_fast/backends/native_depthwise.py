"""Depthwise 3x3x3 convolutions of the native backend. No autograd here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petite_fast.backends import native
from petite_fast.backends.eager import conv_layout
from petite_fast.backends.geometry import ConvGeometry

_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16
_SMALL = 512  # voxels up to which the time of a call is not the kernel's
_FEWEST = {"conv": _LANES, "adjoint": 4, "grad_weight": 8}  # channels, channels-last


def can_run_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv` takes these arguments, and why not."""
    if bias is not None and bias.dtype != x.dtype:
        return False, f"bias is {bias.dtype}, x is {x.dtype}"
    g = ConvGeometry.of_op(*numbers)
    return _can_run("adjoint" if g.transposed else "conv", x, weight, weight.shape, g)


def can_run_conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_input` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    return _can_run("conv" if g.transposed else "adjoint", grad_y, weight, weight.shape, g)


def can_run_conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_weight` takes these arguments, and why not."""
    return _can_run("grad_weight", x, grad_y, weight_size, ConvGeometry.of_weight_op(*numbers))


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> torch.Tensor:
    """y = conv(x, weight, bias), plain or transposed, for what `can_run_conv` accepts."""
    g = ConvGeometry.of_op(*numbers)
    size = g.output_size(x.shape[2:], weight.shape[2:])
    return _run(x, weight, bias, size, g, adjoint=g.transposed)


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_x of `conv`, for what `can_run_conv_grad_input` accepts."""
    g = ConvGeometry.of_op(*numbers)
    return _run(grad_y, weight, None, input_size[2:], g, adjoint=not g.transposed)


def conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_weight of the plain convolution, for what `can_run_conv_grad_weight` accepts."""
    g, layout = ConvGeometry.of_weight_op(*numbers), conv_layout(x, grad_y)
    x = x.contiguous(memory_format=layout)
    grad_y = grad_y.contiguous(memory_format=layout)
    grad = torch.empty(tuple(weight_size), dtype=x.dtype, device="cpu")
    native._load()[0].depthwise_grad_weight(
        _shape(x.shape, grad_y.shape[2:], g, layout), native._operand(x),
        native._operand(grad_y), native._operand(grad), torch.get_num_threads(),
    )  # fmt: skip
    return grad


def _can_run(
    kind: str,
    x: torch.Tensor,
    other: torch.Tensor,
    weight_size: Sequence[int],
    g: ConvGeometry,
) -> tuple[bool, str]:
    channels, per_group, *kernel = weight_size
    if channels != g.groups or per_group != 1:
        return False, "the convolution is not depthwise"
    if kernel != [3, 3, 3] or max(g.dilation) > 1 or max(g.stride) > 2 or max(g.padding) > 1:
        return False, "no kernel for this geometry"
    possible, reason = native.takes(_DTYPES, x, other)
    if not possible:
        return False, reason
    if other.dtype != x.dtype:
        return False, f"no kernel for {x.dtype} and {other.dtype}"
    reason = _why_slower(kind, x, other)
    return not reason, reason


def _why_slower(kind: str, x: torch.Tensor, other: torch.Tensor) -> str:
    """Where torch was measured to be as fast or faster, and why; empty where it was not.

    Ratios are torch's time over ours, 1 and 2 threads, 1 to 256 channels at 8^3 to 48^3.
    """
    samples, channels = x.shape[:2]
    if x.shape[2:].numel() <= _SMALL:
        return ""  # 1.0 to 30
    if samples * channels == 1 and kind != "adjoint":
        return "one lane is in use"  # 0.5 with stride 2
    if conv_layout(x, other) != torch.channels_last_3d:
        return ""  # 1.0 (4 channels) to 40
    if channels < _FEWEST[kind]:
        return f"{channels} channels are too few in channels-last memory"  # 0.3 to 1.2
    if kind == "conv" and channels % _LANES:
        return "oneDNN is faster on channels in part of a vector"  # 0.5 to 1.0
    if kind == "conv" and x.dtype == torch.bfloat16:
        return "oneDNN is faster in bfloat16, channels-last"  # 0.6 to 0.9
    return ""


def _run(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Sequence[int],
    g: ConvGeometry,
    *,
    adjoint: bool,
) -> torch.Tensor:
    layout = conv_layout(source, weight)
    source = source.contiguous(memory_format=layout)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    target = torch.empty(
        (*source.shape[:2], *size), dtype=source.dtype, device="cpu", memory_format=layout
    )
    large, small = (target, source) if adjoint else (source, target)
    native._load()[0].depthwise(
        _shape(large.shape, small.shape[2:], g, layout), adjoint,
        native._operand(source), native._operand(weight), native._operand(bias),
        native._operand(target), torch.get_num_threads(),
    )  # fmt: skip
    return target


def _shape(
    large: Sequence[int],
    small: Sequence[int],
    g: ConvGeometry,
    layout: torch.memory_format,
) -> tuple[Any, ...]:
    axes = list(zip(large[2:], small, g.stride, g.padding, strict=True))
    return large[0], large[1], axes, layout == torch.channels_last_3d
