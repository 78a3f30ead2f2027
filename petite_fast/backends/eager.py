"""The eager backend: ATen calls, for every geometry, dtype and device. No autograd here.

On CPU, PyTorch sends batch-1 float32 convolutions of small volumes to a column-matrix path
(vol2col) that is 5-20 times slower than oneDNN, decided by N*C*D*H alone. The functions below
call oneDNN directly in those cases, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from petite_fast.backends import cudnn_check
from petite_fast.backends.eager_bottleneck import bottleneck as bottleneck
from petite_fast.backends.eager_bottleneck import bottleneck_backward as bottleneck_backward
from petite_fast.backends.eager_compress import dequantise as dequantise
from petite_fast.backends.eager_compress import quantise as quantise
from petite_fast.backends.eager_norm_act import norm_act as norm_act
from petite_fast.backends.eager_norm_act import norm_act_backward as norm_act_backward
from petite_fast.backends.eager_norm_act import pack_signs as pack_signs
from petite_fast.backends.eager_norm_act import unpack_signs as unpack_signs
from petite_fast.backends.eager_random import dropout as dropout

_POINTWISE = ((1, 1, 1), (0, 0, 0), (1, 1, 1))  # stride, padding, dilation
HEAVY_WEIGHT = 4  # times the elements of x
ONEDNN_ELEMENTS = 20480  # PyTorch asks N*C*D*H of the input to exceed this before it takes oneDNN


def effective_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scale: float,
    gamma: torch.Tensor | None,
    groups: int,
    transposed: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W_eff = gamma * (W + scale * B.A), in float32 (float64 for float64), rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.to(wide).flatten(1)
    if lora_A is not None and lora_B is not None:
        a, b = lora_A.to(wide).flatten(1), lora_B.to(wide).flatten(1)
        rows = torch.addmm(rows, a.t() if transposed else b, b if transposed else a, alpha=scale)
    if gamma is not None:
        rows = scale_outputs(rows.view(weight.shape), gamma.to(wide), groups, transposed)
    # An op's output must not share memory with its input; a copy of a fresh result would be waste.
    shared = lora_A is None and gamma is None
    return rows.reshape(weight.shape).to(dtype, copy=shared).contiguous()


def scale_outputs(
    weight: torch.Tensor, gamma: torch.Tensor, groups: int, transposed: bool
) -> torch.Tensor:
    """gamma[o] times every weight that feeds output channel o; same shape as `weight`."""
    if not transposed:
        return weight * gamma.view(-1, *[1] * (weight.dim() - 1))
    per_group = gamma.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.unflatten(0, (groups, -1)) * per_group).flatten(0, 1)


def conv(
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
    """y = conv(x, weight, bias), plain or transposed. x [N, C, D, H, W]."""
    layout = inner = conv_layout(x, weight)
    if weight.numel() > HEAVY_WEIGHT * x.numel() and weight.is_contiguous():
        # Deep layers: two copies of the volumes instead of one of the weight (measured: 1.9x faster
        # for 512 channels at 4^3; from about 8^3 on the two are equal).
        inner = torch.contiguous_format
    if not transposed and _is_product(x, weight, stride, padding, groups):
        matrix = weight.flatten(1).expand(len(x), -1, -1)
        if bias is None:
            y = torch.bmm(matrix, x.flatten(2))
        else:
            y = torch.baddbmm(bias.unsqueeze(1), matrix, x.flatten(2))
        return y.view(len(x), -1, *x.shape[2:]).contiguous(memory_format=layout)
    if not transposed and torch_takes_vol2col(x, weight, groups):
        y = torch.ops.aten.mkldnn_convolution(
            x.contiguous(memory_format=inner), weight.contiguous(memory_format=inner), bias,
            padding, stride, dilation, groups,
        )  # fmt: skip
    elif transposed and onednn_ready(x, weight):
        # at::convolution would also take oneDNN for large x, but through a slower front door
        # (measured: 1.8x slower on 32 channels at 48^3).
        y = torch.ops.mkldnn._convolution_transpose_pointwise(
            x.contiguous(memory_format=inner), weight, bias, list(padding), list(output_padding),
            list(stride), list(dilation), groups, "none", [], "",
        )  # fmt: skip
    else:
        with cudnn_check.guard(x):
            y = torch.convolution(
                x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
            )
    return y.contiguous(memory_format=layout)


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """grad_x of `conv` from grad_y and the weight alone: no input, and no dense stand-in for it.

    The adjoint of a convolution is the transposed convolution with the same weight and the other
    way round, so on CPU that is what is called. On other devices the library's own backward runs
    with an input that is one scalar expanded to the right shape.
    """
    if grad_y.device.type != "cpu":
        layout = conv_layout(grad_y, weight)
        # cuDNN takes channels_last from the weight: an expanded scalar has no layout of its own.
        weight = weight.contiguous(memory_format=layout)
        stand_in = grad_y.new_empty(1).expand(tuple(input_size))
        with cudnn_check.guard(grad_y):
            grad_x = torch.ops.aten.convolution_backward(
                grad_y, stand_in, weight, None, stride, padding, dilation, transposed,
                output_padding, groups, [True, False, False],
            )[0]  # fmt: skip
        return grad_x.contiguous(memory_format=layout)
    if transposed:
        return conv(grad_y, weight, None, stride, padding, dilation, False, [0, 0, 0], groups)
    if weight.shape[2:].numel() == 1 and max(stride) == 1 and max(padding) == 0:
        # Pointwise: a plain convolution with W' (measured: 3.6x faster on 64 channels at 24^3).
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return conv(grad_y, weight, None, stride, padding, dilation, False, [0, 0, 0], groups)
    smallest = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(
            grad_y.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    extra = [n - m for n, m in zip(input_size[2:], smallest, strict=True)]
    return conv(grad_y, weight, None, stride, padding, dilation, True, extra, groups)


def conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """grad_weight of the plain convolution x -> y with weight of `weight_size`.

    A transposed convolution's weight gradient is this with x and grad_y exchanged.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        # oneDNN's bfloat16 kernel reads memory that nobody wrote on small grids (torch 2.13: NaN
        # now and then, for a kernel of 3 on 2 x 2 x 1), and without AMX float32 is faster anyway.
        grad = conv_grad_weight(
            grad_y.float(), x.float(), weight_size, stride, padding, dilation, groups
        )
        return grad.to(torch.bfloat16)
    stand_in = x.new_empty(tuple(weight_size))  # only its shape is read
    if grad_y.is_contiguous() and _is_product(x, stand_in, stride, padding, groups):
        product = torch.bmm(grad_y.flatten(2), x.flatten(2).mT)
        return product.sum(0).view(stand_in.shape)
    if groups == 1 and onednn_ready(x, stand_in) and _is_larger(weight_size[2:], x.shape[2:]):
        # oneDNN reads past the end of x there (torch 2.13: segmentation faults for a kernel of 7
        # on 5 x 7 x 6, plain PyTorch's too). The same sums as a convolution over the batch.
        back = conv(
            x.transpose(0, 1), grad_y.transpose(0, 1), None, dilation, padding, stride, False,
            [0, 0, 0], 1,
        )  # fmt: skip
        d, h, w = weight_size[2:]
        return back[:, :, :d, :h, :w].transpose(0, 1).contiguous()
    if torch_takes_vol2col(x, stand_in, groups):
        # Opaque oneDNN tensors pass PyTorch's size test whatever their size.
        grad_y, x = grad_y.to_mkldnn(), x.to_mkldnn()
    with cudnn_check.guard(x):
        grad = torch.ops.aten.convolution_backward(
            grad_y, x, stand_in, None, stride, padding, dilation, False, [0, 0, 0], groups,
            [False, True, False],
        )[1]  # fmt: skip
    return (grad.to_dense() if grad.is_mkldnn else grad).contiguous()


def low_rank_input(
    x: torch.Tensor, lora_A: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    """t[q, v] = sum_{c, tap} A[q, c, tap] x[c, s v + tap - p]. -> [N, r, ...]."""
    return conv(x, lora_A, None, stride, padding, (1, 1, 1), False, (0, 0, 0), 1)


def low_rank_gradient(
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
    """Gradients of A, B and the bias, in float32 (float64 for float64); empty if not wanted.

    dA[q, c, tap] = sum_v G[q, v] x[c, s v + tap - p], G = B' grad_y; dB = sum_v grad_y[v] t[v]',
    with t of `low_rank_input` unless it is given; db = sum_v grad_y[v]. No lora_B: G = grad_y.
    """
    wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    grad_a = grad_b = grad_bias = grad_y.new_empty(0, dtype=wide)
    if want_A:
        assert x is not None
        low = grad_y
        if lora_B is not None:
            b = lora_B.t()[..., None, None, None].contiguous()
            low = conv(grad_y, b, None, *_POINTWISE, False, (0, 0, 0), 1)
        grad_a = conv_grad_weight(low, x, lora_A.shape, stride, padding, (1, 1, 1), 1).to(wide)
    if want_B:
        if t is None:
            assert x is not None
            t = low_rank_input(x, lora_A, stride, padding)
        size = (grad_y.shape[1], lora_A.shape[0], 1, 1, 1)
        grad_b = conv_grad_weight(grad_y, t, size, *_POINTWISE, 1).flatten(1).to(wide)
    if want_bias:
        grad_bias = grad_y.sum((0, 2, 3, 4), dtype=wide)
    return grad_a, grad_b, grad_bias


def _is_larger(kernel: Sequence[int], size: Sequence[int]) -> bool:
    return any(k > n for k, n in zip(kernel, size, strict=True))


def _is_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> bool:
    """Whether this is W x per sample, as x lies in memory; oneDNN reorders it there and back.

    Measured: 3.8 to 20 times faster on 16 to 64 channels, never slower.
    """
    return (
        groups == 1
        and weight.shape[2:].numel() == 1
        and max(stride) == 1
        and max(padding) == 0
        and x.is_contiguous()
        and onednn_ready(x, weight)
    )


def conv_layout(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Memory format of the output: channels_last_3d if x or the weight has it, as in PyTorch."""
    if has_last_strides(x) or has_last_strides(weight):
        return torch.channels_last_3d
    return torch.contiguous_format


def has_last_strides(t: torch.Tensor) -> bool:
    """Whether the strides of t [N, C, D, H, W] are like channels_last_3d's, by PyTorch's rule.

    They decide for one channel, where both formats have the same elements in the same places, and
    for parts of the channels. Source: is_channels_last_strides_3d of c10.
    """
    if t.stride(1) == 0 or t.numel() == 0:
        return False
    least = 0
    for axis in (1, 4, 3, 2, 0):
        if t.stride(axis) < least or (axis == 0 and least == t.stride(1)):
            return False
        least = t.stride(axis) * t.shape[axis]
    return True


def onednn_ready(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN can take this float32 CPU convolution."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def torch_takes_vol2col(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether PyTorch would send this convolution to vol2col although oneDNN can take it."""
    if not onednn_ready(x, weight):
        return False
    large_kernel = weight.shape[-1] > 3 and weight.shape[-2] > 3
    large_input = math.prod(x.shape[:4]) > ONEDNN_ELEMENTS
    return not (groups > 1 or large_kernel or x.shape[0] > 1 or large_input)
