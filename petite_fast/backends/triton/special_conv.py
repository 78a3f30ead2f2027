"""Which convolutions have a Triton kernel of their own: few channels, and kernel = stride.

Triton is imported when a kernel is needed. A convolution here gathers (a plain one, or grad_x of a
transposed one) or scatters (a transposed one, or grad_x of a plain one); the weight is [channels of
what a gather writes, of what it reads, kD, kH, kW] in all four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from petite_fast.backends import eager, triton
from petite_fast.backends.geometry import ConvGeometry

FEW = 16  # channels on one side: what a matrix instruction sums over


def _can_run(
    tensor: torch.Tensor, weight: torch.Tensor, size: Sequence[int], g: ConvGeometry
) -> tuple[bool, str]:
    """`tensor` is x or grad_y; the result has `size`."""
    possible, reason = triton._can_run_unmeasured(tensor)
    if not possible:
        return False, reason
    if g.groups != 1:
        return False, f"no kernel for {g.groups} groups"
    if tensor.dtype not in triton.CONV_DTYPES or weight.dtype != tensor.dtype:
        return False, f"no kernel for {tensor.dtype} with a weight of {weight.dtype}"
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last_3d)):
        return False, "the kernel wants a volume that is contiguous or channels_last_3d"
    return triton._can_index(tensor.shape, size)


def _has_few(weight: torch.Tensor) -> tuple[bool, str]:
    least = min(weight.shape[:2])
    if least <= FEW:
        return True, ""
    return False, f"{least} channels or more on both sides, few are up to {FEW}"


def can_run_few_channels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[bool, str]:
    """Whether `few_channels` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    possible, reason = _can_run(x, weight, triton._conv_size(x, weight, g), g)
    return _has_few(weight) if possible else (False, reason)


def few_channels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> torch.Tensor:
    """y = conv(x, weight, bias); only for what `can_run_few_channels` accepts."""
    g = ConvGeometry.of_op(*numbers)
    return _few_channels(x, weight, bias, triton._conv_size(x, weight, g), g, g.transposed)


def can_run_few_channels_grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, input_size: Sequence[int], *numbers: Any
) -> tuple[bool, str]:
    """Whether `few_channels_grad_input` takes these arguments, and why not."""
    possible, reason = _can_run(grad_y, weight, input_size, ConvGeometry.of_op(*numbers))
    return _has_few(weight) if possible else (False, reason)


def few_channels_grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, input_size: Sequence[int], *numbers: Any
) -> torch.Tensor:
    """grad_x; only for what `can_run_few_channels_grad_input` accepts."""
    g = ConvGeometry.of_op(*numbers)
    return _few_channels(grad_y, weight, None, input_size, g, not g.transposed)


def _few_channels(
    tensor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Sequence[int],
    g: ConvGeometry,
    scatters: bool,
) -> torch.Tensor:
    from petite_fast.backends.triton import few_channels

    layout = eager.conv_layout(tensor, weight)
    geometry = (g.stride, g.padding, g.dilation)
    with torch.cuda.device(tensor.device):
        return few_channels.few_channels(tensor, weight, bias, size, geometry, scatters, layout)


def _is_shuffle(weight: torch.Tensor, g: ConvGeometry, scatters: bool) -> tuple[bool, str]:
    kernel = tuple(weight.shape[2:])
    if not scatters:
        return False, "blocks are read by the kernels for any geometry"
    if kernel != g.stride or max(g.padding) > 0 or math.prod(kernel) == 1:
        return False, "blocks that do not overlap need kernel = stride, above 1, and padding 0"
    if any(k > 1 and d > 1 for k, d in zip(kernel, g.dilation, strict=True)):
        return False, "the kernel is dilated"
    if max(g.output_padding) > 0:
        return False, "output_padding is not 0"
    return True, ""


def can_run_shuffle(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[bool, str]:
    """Whether `shuffle` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    possible, reason = _can_run(x, weight, triton._conv_size(x, weight, g), g)
    return _is_shuffle(weight, g, g.transposed) if possible else (False, reason)


def shuffle(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> torch.Tensor:
    """y = conv_transpose(x, weight, bias); only for what `can_run_shuffle` accepts."""
    size = triton._conv_size(x, weight, ConvGeometry.of_op(*numbers))
    return _shuffle(x, weight, bias, size)


def can_run_shuffle_grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, input_size: Sequence[int], *numbers: Any
) -> tuple[bool, str]:
    """Whether `shuffle_grad_input` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    possible, reason = _can_run(grad_y, weight, input_size, g)
    return _is_shuffle(weight, g, not g.transposed) if possible else (False, reason)


def shuffle_grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, input_size: Sequence[int], *numbers: Any
) -> torch.Tensor:
    """grad_x of a plain convolution; only for what `can_run_shuffle_grad_input` accepts."""
    return _shuffle(grad_y, weight, None, input_size)


def _shuffle(
    tensor: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Sequence[int]
) -> torch.Tensor:
    from petite_fast.backends.triton import shuffle

    layout = eager.conv_layout(tensor, weight)
    with torch.cuda.device(tensor.device):
        return shuffle.shuffle(tensor, weight, bias, size, layout)
