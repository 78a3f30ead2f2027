"""Convolutions of kernel 3 and their grad_x on the native CUDA kernel of csrc/cuda/conv_halo.cu.

A block reads its input once, halo included (2.3 voxels for one of the result), instead of once for
each of the 27 taps. Nobody has run or measured it on a GPU: it is taken only where
PETITE_FAST_BACKEND=native asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from petite_fast import settings
from petite_fast.backends import native
from petite_fast.backends.eager import conv_layout
from petite_fast.backends.geometry import ConvGeometry

DTYPES = (torch.bfloat16, torch.float16)
CHANNELS = 16  # a matrix instruction has so many: C and O are multiples
TILE = (4, 8, 8)  # output voxels of a block
MOST = 2**31 - 2**5  # of a size, of blocks and of the elements of a halo's planes

Arguments = tuple[Any, ...]


def can_run_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    possible, reason = _can_run(x, weight, g)
    if not possible:
        return False, reason
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return False, f"the kernel wants a contiguous bias of {x.dtype}"
    return _can_index(x.shape, [len(x), len(weight), *g.output_size(x.shape[2:], (3, 3, 3))])


def can_run_conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_input` takes these arguments, and why not."""
    possible, reason = _can_run(grad_y, weight, ConvGeometry.of_op(*numbers))
    return _can_index(grad_y.shape, input_size) if possible else (False, reason)


def _can_run(tensor: torch.Tensor, weight: torch.Tensor, g: ConvGeometry) -> tuple[bool, str]:
    """`tensor` is x or grad_y."""
    if tensor.device.type != "cuda":
        return False, f"no kernel for device {tensor.device.type!r}"
    if settings.backend() != "native":
        return False, "not measured yet against cuDNN; PETITE_FAST_BACKEND=native takes it"
    possible, reason = native.cuda_available(tensor.device.index)
    if not possible:
        return False, reason
    if g.transposed or g.groups > 1 or max(g.stride) > 1 or max(g.dilation) > 1:
        return False, "only for one group, stride 1 and dilation 1"
    if tuple(weight.shape[2:]) != (3, 3, 3) or max(g.padding) > 2:
        return False, "only for kernel 3 and padding up to 2"
    if weight.shape[0] % CHANNELS or weight.shape[1] % CHANNELS:
        return False, f"only for channels in multiples of {CHANNELS}"
    if tensor.dtype not in DTYPES or weight.dtype != tensor.dtype:
        return False, f"no kernel for {tensor.dtype} with a weight of {weight.dtype}"
    if not tensor.is_contiguous(memory_format=torch.channels_last_3d) or (
        conv_layout(tensor, weight) != torch.channels_last_3d
    ):
        return False, "the kernel wants channels_last_3d"
    if tensor.storage_offset() * tensor.itemsize % 16:
        return False, "the kernel wants an address that is a multiple of 16"
    return True, ""


def _can_index(size: Sequence[int], result: Sequence[int]) -> tuple[bool, str]:
    """Whether a tensor of this size and the result are neither empty nor too large for int32."""
    if min(*size, *result) < 1:
        return False, "a tensor is empty"
    halo = 6 * (size[3] + 10) * (size[4] + 10) * size[1]  # indexed in 32 bits
    tiles = math.prod(math.ceil(n / t) for n, t in zip(result[2:], TILE, strict=True))
    blocks = result[0] * tiles * math.ceil(result[1] / CHANNELS)  # at most
    if max(*size, *result, halo, blocks) > MOST:
        return False, "a tensor is too large"
    return True, ""


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> torch.Tensor:
    """y = conv(x, weight, bias); only for what `can_run_conv` accepts."""
    y, arguments = forward_arguments(x, weight, bias, numbers[1])
    _launch(x.device, arguments)
    return y


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_x of `conv`; only for what `can_run_conv_grad_input` accepts."""
    grad_x, arguments = grad_input_arguments(grad_y, weight, numbers[1])
    _launch(grad_y.device, arguments)
    return grad_x


def forward_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: Sequence[int]
) -> tuple[torch.Tensor, Arguments]:
    """An empty y, and what the kernel needs to fill it (which keeps its memory)."""
    size = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    y = torch.empty(
        (len(x), len(weight), *size), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last_3d,
    )  # fmt: skip
    geometry = (len(x), x.shape[1], len(weight)), tuple(x.shape[2:]), tuple(padding)
    return y, (geometry, x, in_fragments(weight), bias, y)


def grad_input_arguments(
    grad_y: torch.Tensor, weight: torch.Tensor, padding: Sequence[int]
) -> tuple[torch.Tensor, Arguments]:
    """The same for grad_x: a convolution of grad_y with mirrored taps and exchanged channels."""
    mirrored = weight.transpose(0, 1).flip(2, 3, 4)
    return forward_arguments(grad_y, mirrored, None, [2 - p for p in padding])


def in_fragments(weight: torch.Tensor) -> torch.Tensor:
    """[O, C, 3, 3, 3] as a matrix instruction takes it: [3, 3, 3, C/16, O/16, 8, 4, 2, 2, 2].

    o = 16 o16 + 8 tile + g and c = 16 c16 + 8 half + 2 t + i lie at (tap, c16, o16, g, t, tile,
    half, i); lane 4 g + t of a warp has the last three side by side.
    """
    split = weight.unflatten(1, (-1, 2, 4, 2)).unflatten(0, (-1, 2, 8))
    return split.permute(7, 8, 9, 3, 0, 2, 5, 1, 4, 6).contiguous()


def operands(arguments: Arguments) -> Arguments:
    """As bindings_conv_halo.cpp takes them."""
    geometry, *tensors = arguments
    return (geometry, *map(native._operand, tensors))


def _launch(device: torch.device, arguments: Arguments) -> None:
    module, _ = native._load()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        module.conv_halo_cuda(*operands(arguments), device.index, stream)
