"""What PyTorch's convolutions on a CPU allocate besides their results, from shapes alone.

Measured on torch 2.13 with oneDNN. Three kinds of kernel take float32 volumes:

    blocks         copies of input, weight and output, channels in blocks of a vector's length
    channels last  copies in that layout: grouped convolutions, and transposed ones with a stride
    columns        kD kH kW values per value of the input: small batch-1 volumes, and float64
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from petite_fast.backends.eager import torch_takes_vol2col


def transient_bytes(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Bytes allocated at the worst moment of `func`, its results included; 0 where not known."""
    rule = RULES.get(func)
    return 0 if rule is None or args[0].device.type != "cpu" else rule(args, out)


def _convolution(args: tuple[Any, ...], y: Tensor) -> int:
    x, weight, transposed, groups = args[0], args[1], args[6], args[8]
    if _takes_columns(x, weight, groups):
        return y.nbytes + _columns(x, y, weight, transposed, groups)
    return _forward(args, y)


def _convolution_backward(args: tuple[Any, ...], grads: Any) -> int:
    grad_y, x, weight, _, stride, _, _, transposed, _, groups, (wants_x, wants_weight, _) = args
    if _takes_columns(x, weight, groups):
        results = sum(t.nbytes for t in grads if isinstance(t, Tensor))
        return results + _columns(x, grad_y, weight, transposed, groups)
    first = then = 0
    if wants_x:
        first = _pass(grad_y, weight, x, stride, not transposed, groups)
        then = x.nbytes
    if wants_weight:
        fine, coarse = (grad_y, x) if transposed else (x, grad_y)
        then += _weight_pass(coarse, fine, weight, groups)
    return max(first, then)


def _forward(args: tuple[Any, ...], y: Tensor) -> int:
    x, weight, _, stride, _, _, transposed, _, groups = args
    return _pass(x, weight, y, stride, transposed, groups)


def _grad_input(args: tuple[Any, ...], grad_x: Tensor) -> int:
    grad_y, weight, _, stride, _, _, transposed, _, groups = args
    return _pass(grad_y, weight, grad_x, stride, not transposed, groups)


def _grad_weight(args: tuple[Any, ...], grad: Tensor) -> int:
    grad_y, x, *_, groups = args
    taken = _weight_pass(grad_y, x, grad, groups)
    if torch_takes_vol2col(x, grad, groups):  # past that by way of opaque copies
        taken += grad_y.nbytes + x.nbytes
    return taken


def _low_rank_input(args: tuple[Any, ...], t: Tensor) -> int:
    x, lora_A, stride, _ = args
    return _pass(x, lora_A, t, stride, False, 1)


def _low_rank_gradient(args: tuple[Any, ...], _: Any) -> int:
    """By PyTorch's calls: G and A's gradient, then t and B's."""
    grad_y, x, t, lora_A, _, stride, _, want_A, want_B, _ = args
    low = grad_y.new_empty(len(grad_y), len(lora_A), *grad_y.shape[2:])
    moments = [low.nbytes]
    if want_A:
        moments.append(low.nbytes + _grad_weight((low, x, 1), lora_A))
    if want_B:
        if t is None:
            moments.append(_low_rank_input((x, lora_A, stride, None), low))
        column = grad_y.new_empty(grad_y.shape[1], len(lora_A), 1, 1, 1)
        moments.append(low.nbytes + _grad_weight((grad_y, low, 1), column))
    return max(moments)


RULES: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.petite_fast.conv.default: _forward,
    torch.ops.petite_fast.conv_grad_input.default: _grad_input,
    torch.ops.petite_fast.conv_grad_weight.default: _grad_weight,
    torch.ops.petite_fast.low_rank_input.default: _low_rank_input,
    torch.ops.petite_fast.low_rank_gradient.default: _low_rank_gradient,
}
"""The ops whose worst moment is known."""


def _pass(
    x: Tensor, weight: Tensor, y: Tensor, stride: list[int], transposed: bool, groups: int
) -> int:
    """y = conv(x): copies of x, weight and y, then y itself beside its copy."""
    spread = transposed and max(stride) > 1 and groups == 1
    # Values are gathered in a buffer per thread.
    buffers = x.nbytes // max(x.shape[0], 1) * torch.get_num_threads() if spread else 0
    if not x.is_contiguous():
        return buffers + weight.nbytes + y.nbytes
    if spread or groups > 1:
        copy = 0 if transposed and groups > 1 else x.nbytes
        copies_of_y = 2 if y.shape[1] == 1 or not copy else 3
        return max(buffers + copy + weight.nbytes + y.nbytes, copies_of_y * y.nbytes)
    copy = 0 if not transposed and _is_read_as_it_lies(x, weight) else _blocks(x)
    return _blocks(y) + max(copy + weight.nbytes, y.nbytes)


def _weight_pass(grad_y: Tensor, x: Tensor, weight: Tensor, groups: int) -> int:
    """grad_weight, from copies of grad_y and x."""
    if groups > 1 or not x.is_contiguous():
        return weight.nbytes
    if not _is_read_as_it_lies(x, weight):
        return _blocks(grad_y) + _blocks(x) + weight.nbytes
    return weight.nbytes + (2 * x.nbytes if x.shape[1] > 3 else _blocks(grad_y))


def _blocks(tensor: Tensor) -> int:
    channels = max(tensor.shape[1], 1)
    return tensor.nbytes // channels * math.ceil(channels / _lanes()) * _lanes()


def _is_read_as_it_lies(x: Tensor, weight: Tensor) -> bool:
    """The input of a convolution with fewer channels than a block has, unless it is pointwise."""
    return x.shape[1] < _lanes() and math.prod(weight.shape[2:]) > 1


def _lanes() -> int:
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def _takes_columns(x: Tensor, weight: Tensor, groups: int) -> bool:
    return x.dtype == torch.float64 or torch_takes_vol2col(x, weight, groups)


def _columns(x: Tensor, y: Tensor, weight: Tensor, transposed: bool, groups: int) -> int:
    taps = math.prod(weight.shape[2:])
    if transposed:  # one sample at a time, of the output's channels at the input's size
        return y.shape[1] // groups * taps * math.prod(x.shape[2:]) * y.itemsize
    if taps == 1:
        return 0
    return x.shape[1] // groups * taps * y.shape[0] * math.prod(y.shape[2:]) * x.itemsize
