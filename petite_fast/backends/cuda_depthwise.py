"""Depthwise 3x3x3 convolutions on CUDA devices, channels-last. No autograd here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petite_fast import settings
from petite_fast.backends import native
from petite_fast.backends.geometry import ConvGeometry
from petite_fast.backends.native_depthwise import _shape

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAST = torch.channels_last_3d
_MOST_PLANE_ELEMENTS = 2**31 - 1  # the kernels' offsets in a plane are 32-bit


def can_run_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    size = g.output_size(x.shape[2:], weight.shape[2:])
    return _can_run((x,), (weight, bias), weight.shape, size, g)


def can_run_conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_input` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    return _can_run((grad_y,), (weight,), weight.shape, input_size[2:], g)


def can_run_conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_weight` takes these arguments, and why not."""
    g = ConvGeometry.of_weight_op(*numbers)
    return _can_run((x, grad_y), (), weight_size, grad_y.shape[2:], g)


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
    """grad_weight of the plain convolution, for what `can_run_conv_grad_weight` accepts.

    The sums are float32 and deterministic. Allocates, for a while, up to 512 of them per weight.
    """
    g = ConvGeometry.of_weight_op(*numbers)
    shape = _shape(x.shape, grad_y.shape[2:], g, _LAST)
    operands = (native._operand(x), native._operand(grad_y))
    grad = x.new_empty(tuple(weight_size))
    floats = native._load()[0].depthwise_workspace(shape, operands[0])
    partial = x.new_empty(floats, dtype=torch.float32)
    arguments = (shape, *operands, native._operand(partial), native._operand(grad))
    _launch("depthwise_grad_weight", arguments, x.device)
    return grad


def _can_run(
    volumes: Sequence[torch.Tensor],
    small: Sequence[torch.Tensor | None],
    weight_size: Sequence[int],
    size: Sequence[int],
    g: ConvGeometry,
) -> tuple[bool, str]:
    """Of volumes that are read, the weight and bias, and the size of the other volume."""
    x = volumes[0]
    if x.device.type != "cuda":
        return False, f"no CUDA kernel for device {x.device.type!r}"
    if settings.backend() != "native":
        return False, "not measured yet against torch; PETITE_FAST_BACKEND=native takes it"
    channels, per_group, *kernel = weight_size
    if channels != g.groups or per_group != 1:
        return False, "the convolution is not depthwise"
    if kernel != [3, 3, 3] or max(g.dilation) > 1 or g.stride not in ((1, 1, 1), (2, 2, 2)):
        return False, "no kernel for this geometry"
    for tensor in (*volumes, *small):
        if tensor is None:
            continue
        if tensor.device != x.device or tensor.dtype != x.dtype or x.dtype not in _DTYPES:
            return False, f"no kernel for {x.dtype} and {tensor.dtype} on {tensor.device}"
    if any(volume.numel() == 0 for volume in volumes) or min(size) < 1:
        return False, "a tensor is empty"
    if not all(volume.is_contiguous(memory_format=_LAST) for volume in volumes):
        return False, "the kernel wants channels_last_3d"
    rows, cols = (max(pair) for pair in zip(x.shape[3:], size[1:], strict=True))
    if rows * cols * channels > _MOST_PLANE_ELEMENTS:
        return False, f"a plane has more than {_MOST_PLANE_ELEMENTS} elements"
    return native.cuda_available(x.device.index)


def _run(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Sequence[int],
    g: ConvGeometry,
    *,
    adjoint: bool,
) -> torch.Tensor:
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    shape = (*source.shape[:2], *size)
    target = torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=_LAST)
    large, small = (target, source) if adjoint else (source, target)
    arguments = (
        _shape(large.shape, small.shape[2:], g, _LAST), adjoint, native._operand(source),
        native._operand(weight), native._operand(bias), native._operand(target),
    )  # fmt: skip
    _launch("depthwise", arguments, source.device)
    return target


def _launch(op: str, arguments: tuple[Any, ...], device: torch.device) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(native._load()[0], f"{op}_cuda")(*arguments, device.index, stream)
