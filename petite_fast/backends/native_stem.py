"""Convolutions of few channels to many on the native CPU kernel of csrc/cpu/stem.cpp.

Measured on one thread of an EPYC (Zen 4), k3, against oneDNN, milliseconds:

    1 -> 16 at 64^3    forward 2.7 (4.4)   grad_weight 3.6 (7.1)
    2 -> 32 at 48^3    forward 4.0 (5.5)   grad_weight 4.7 (7.8)
    4 -> 32 at 48^3    forward 7.7 (9.2)   grad_weight 8.7 (20.4)
    1 -> 32 at 24^3    forward 0.38 (0.37) grad_weight 0.38 (0.45)
    1 -> 64 at 48^3/2  forward 0.82 (0.80) grad_weight 0.87 (1.06)
    1 -> 32 at 48^3    grad_x 5.1 (38)     at 24^3 0.93 (3.8), at 8^3 0.08 (0.18)

oneDNN wins by up to a quarter where rows end in the middle of a vector, for the forward of strided
convolutions, and for larger kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from petite_fast.backends import native
from petite_fast.backends.eager import conv_layout
from petite_fast.backends.geometry import ConvGeometry
from petite_fast.backends.native_shuffle import columns

MOST_INPUTS = 4
FEWEST_OUTPUTS = 8
PIECE_ELEMENTS = 1 << 17  # of the product per thread: half of a 1 MB L2
LANES = 16  # a row of outputs is padded to a multiple of that


def can_run_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    if max(g.stride) > 1:
        return False, "oneDNN is as fast on strided convolutions"
    possible, reason = _can_run((x, weight, bias), weight.shape, g)
    return _can_fill(x, weight, weight.shape[2:], g, 0.9) if possible else (False, reason)


def can_run_conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_input` takes these arguments, and why not."""
    possible, reason = _can_run((grad_y, weight), weight.shape, ConvGeometry.of_op(*numbers))
    if possible and math.prod(weight.shape[1:]) > native._load()[0].STEM_MAX_TAPS:
        return False, "the kernel is too large"
    return possible, reason


def can_run_conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_weight` takes these arguments, and why not."""
    g = ConvGeometry.of_weight_op(*numbers)
    if max(g.stride) > 1 and weight_size[0] < 2 * LANES:
        return False, "oneDNN is as fast on strided convolutions to few channels"
    possible, reason = _can_run((x, grad_y), weight_size, g)
    return _can_fill(x, grad_y, weight_size[2:], g, 0.75) if possible else (False, reason)


def _can_run(
    tensors: Sequence[torch.Tensor | None], weight_size: Sequence[int], g: ConvGeometry
) -> tuple[bool, str]:
    outputs, inputs, *kernel = weight_size
    if g.transposed:
        return False, "the convolution is transposed"
    if g.groups > 1 or inputs > MOST_INPUTS or outputs < FEWEST_OUTPUTS:
        return False, f"only for at most {MOST_INPUTS} to at least {FEWEST_OUTPUTS} channels"
    if math.prod(kernel) == 1:
        return False, "pointwise: a product"
    return native.takes((torch.float32,), *tensors)


def _can_fill(
    x: torch.Tensor,
    other: torch.Tensor,
    kernel: Sequence[int],
    g: ConvGeometry,
    least: float,
) -> tuple[bool, str]:
    """Whether x fits the kernel of csrc/cpu/stem.cpp, of whose lanes `least` are used."""
    if conv_layout(x, other) == torch.channels_last_3d:
        return False, "no kernel for channels-last volumes"
    if math.prod(kernel) > 27:
        return False, "oneDNN is as fast for this kernel"
    size = g.output_size(x.shape[2:], kernel)
    if min(size) < 1:
        return False, "the kernel does not fit the volume"
    if size[2] < least * math.ceil(size[2] / LANES) * LANES:
        return False, "rows of outputs do not fill the vectors"
    return True, ""


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> torch.Tensor:
    """y = conv(x, weight, bias); only for what `can_run_conv` accepts."""
    g = ConvGeometry.of_op(*numbers)
    y = x.new_empty(len(x), len(weight), *g.output_size(x.shape[2:], weight.shape[2:]))
    bias = None if bias is None else bias.contiguous()
    _call(x, weight.contiguous(), bias, None, weight.shape, g, y)
    return y


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_x of `conv`: W' grad_y, some rows at a time, and each tap's part added in its place."""
    module, _ = native._load()
    threads, layout = torch.get_num_threads(), conv_layout(grad_y, weight)
    grad_y = grad_y.contiguous(memory_format=conv_layout(grad_y, grad_y))
    grad_x = grad_y.new_zeros(tuple(input_size))
    product = weight.flatten(1).t()
    taps, (depth, height, width) = len(product), grad_y.shape[2:]
    g = ConvGeometry.of_op(*numbers)
    geometry = _geometry((1, *grad_x.shape[1:]), weight.shape, g)
    piece = max(1, PIECE_ELEMENTS * threads // (taps * width))
    memory = grad_y.new_empty(taps * min(piece, depth * height) * width)
    for sample, target in zip(grad_y, grad_x, strict=True):
        for first in range(0, depth * height, piece):
            rows = min(piece, depth * height - first)
            matrix = memory[: taps * rows * width].view(taps, -1)
            voxels = columns(sample)[:, first * width : (first + rows) * width]
            torch.mm(product, voxels, out=matrix)
            operands = native._operand(matrix), native._operand(target)
            module.shift_add(geometry, first, rows, *operands, threads)
    return grad_x.contiguous(memory_format=layout)


def conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_weight of `conv`; only for what `can_run_conv_grad_weight` accepts."""
    grad = x.new_empty(tuple(weight_size))
    g = ConvGeometry.of_weight_op(*numbers)
    _call(x, None, None, grad_y.contiguous(), weight_size, g, grad)
    return grad


def _call(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grad_y: torch.Tensor | None,
    weight_size: Sequence[int],
    g: ConvGeometry,
    out: torch.Tensor,
) -> None:
    module, _ = native._load()
    x, threads = x.contiguous(), torch.get_num_threads()
    geometry = _geometry(x.shape, weight_size, g)
    workspace = x.new_empty(module.stem_workspace(geometry, grad_y is not None, threads))
    module.stem(geometry, *map(native._operand, (x, weight, bias, grad_y, out, workspace)), threads)


def _geometry(
    size: Sequence[int], weight_size: Sequence[int], g: ConvGeometry
) -> tuple[tuple[int, ...], ...]:
    """As bindings_stem.cpp takes it."""
    outputs, inputs, *kernel = weight_size
    return (
        (size[0], inputs, outputs), tuple(size[2:]), tuple(kernel), g.stride, g.padding, g.dilation,
    )  # fmt: skip
