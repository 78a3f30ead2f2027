"""norm_act of the eager backend: ATen calls for every layout, dtype and device. No autograd here.

Also what the backends and the fakes agree on: memory layout, how many statistics there are, and
which axis the sign bits are packed along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def is_channels_last(x: torch.Tensor, norm: str) -> bool:
    """Whether [N, C, ...] lies in memory as [N, ..., C]; "layer" has its channels last as it is."""
    if norm == "layer" or x.dim() < 3 or x.is_contiguous():
        return False
    return x.movedim(1, -1).is_contiguous()


def in_layout(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x, copied only if its memory is not dense in the order asked for."""
    if not channels_last:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def channel_axis(norm: str) -> int:
    """1 for [N, C, ...], -1 for "layer"."""
    return -1 if norm == "layer" else 1


def statistics_count(size: Sequence[int], norm: str, groups: int) -> int:
    """How many means a tensor of this size has; "fixed" makes none."""
    counts = {"instance": size[0] * size[1], "group": size[0] * groups, "batch": size[1]}
    if norm == "layer":
        return math.prod(size[:-1])
    return counts.get(norm, 0)


def sign_size(size: Sequence[int], norm: str, channels_last: bool) -> tuple[int, ...]:
    """Size of the packed signs: every row of memory (a channel's voxels, or C) in whole bytes."""
    if norm == "layer":
        return (*size[:-1], _bytes(size[-1]))
    if channels_last:
        return (size[0], *size[2:], _bytes(size[1]))
    return (size[0], size[1], _bytes(math.prod(size[2:])))


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """Bit i of byte j of a row is x[..., 8 j + i] > 0. [..., K] -> uint8 [..., ceil(K / 8)]."""
    size = x.shape[-1]
    positive = F.pad(x > 0, (0, -size % 8)).unflatten(-1, (_bytes(size), 8))
    return (positive.to(torch.uint8) << _positions(x.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `pack_signs`: uint8 [..., ceil(size / 8)] -> bool [..., size]."""
    each = (bits.unsqueeze(-1) >> _positions(bits.device)) & 1
    return each.flatten(-2)[..., :size].bool().contiguous()


def norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    slope: torch.Tensor | None,
    residual: torch.Tensor | None,
    unsafe: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    slope_value: float,
    act_first: bool,
    keep_xhat: bool,
    keep_sign: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean, variance (biased), xhat and the packed signs; see `ops.norm_act`.

    xhat is whole with `keep_xhat`, of the channels `unsafe` where given, else empty. The signs are
    those of the activation's input; empty without `keep_sign`. Mean and variance are flat, and
    empty for "fixed", which uses the ones given.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels_last = is_channels_last(x, norm)
    axis = channel_axis(norm)

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(0, dtype=dtype, device=x.device)

    values = x.to(wide)
    if act_first:
        values = _activate(values, activation, _slope(slope, slope_value, x, axis, wide))
    if norm == "fixed":
        new_mean, new_var = empty(wide), empty(wide)
    else:
        new_var, new_mean = _moments(values, norm, groups)
        mean, var = new_mean, new_var
    if mean is None or var is None:
        raise ValueError("mean and var: got None, wanted the statistics that 'fixed' uses")
    rstd = torch.rsqrt(var.to(wide) + eps)
    xhat = (values - _spread(mean.to(wide), x, norm, groups)) * _spread(rstd, x, norm, groups)
    n = xhat
    if weight is not None:
        n = n * _channels(weight.to(wide), x, axis)
    if bias is not None:
        n = n + _channels(bias.to(wide), x, axis)
    if residual is not None:
        n = n + residual.to(wide)
    y = n
    if not act_first:
        y = _activate(n, activation, _slope(slope, slope_value, x, axis, wide))
    if keep_xhat:
        kept = xhat.to(dtype, copy=xhat is y)
    elif unsafe is not None:
        kept = in_layout(xhat.index_select(axis, unsafe).to(dtype), channels_last)
    else:
        kept = empty(dtype)
    if keep_sign:
        sign = pack_signs(_rows(x if act_first else n, norm, channels_last))
    else:
        sign = empty(torch.uint8)
    return y.to(dtype), new_mean, new_var, kept, sign


def norm_act_backward(
    grad_y: torch.Tensor,
    kept: torch.Tensor | None,
    xhat: torch.Tensor | None,
    sign: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    unsafe: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    slope_value: float,
    act_first: bool,
    source: str,
    wants: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (in `dtype`), residual, weight, bias and slope; empty where not in `wants`.

    `source` says what `kept` is: "y", "x", or nothing ("xhat": `xhat` is whole; "none": only the
    signs are there). Parameter gradients come in float32 (float64 for float64).
    """
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    axis = channel_axis(norm)
    wants_x, wants_residual, wants_weight, wants_bias, wants_slope = wants
    slopes = _slope(slope, slope_value, grad_y, axis, wide)
    w = None if weight is None else _channels(weight.to(wide), grad_y, axis)
    b = None if bias is None else _channels(bias.to(wide), grad_y, axis)
    grad = grad_y.to(wide)
    values = None if kept is None else kept.to(wide)
    rstd = None if var is None else _spread(torch.rsqrt(var.to(wide) + eps), grad_y, norm, groups)

    normal: torch.Tensor | None = None  # xhat
    pre: torch.Tensor | None = None  # the activation's input
    if source == "xhat" and xhat is not None:
        normal = xhat.to(wide)
    elif source == "x" and values is not None and mean is not None and rstd is not None:
        pre = values if act_first else None
        a = _activate(values, activation, slopes) if act_first else values
        normal = (a - _spread(mean.to(wide), grad_y, norm, groups)) * rstd
    elif source == "y" and values is not None:
        n = values
        if activation == "leaky_relu" and not act_first:
            n = pre = torch.where(values > 0, values, values / slopes)
        n = n if residual is None else n - residual.to(wide)
        n = n if b is None else n - b
        normal = n if w is None else n / w
        if xhat is not None and unsafe is not None:
            normal = normal.index_copy(axis, unsafe, xhat.to(wide))
    if pre is None and normal is not None and (activation == "gelu" or wants_slope):
        pre = normal if w is None else normal * w
        pre = pre if b is None else pre + b
        pre = pre if residual is None else pre + residual.to(wide)
    positive: torch.Tensor | None
    if sign is not None:
        positive = _from_rows(unpack_signs(sign, _row_length(grad_y, norm)), grad_y, norm)
    else:
        positive = None if pre is None else pre > 0

    def through_activation(grad: torch.Tensor) -> torch.Tensor:
        if activation == "gelu" and pre is not None:
            return torch.ops.aten.gelu_backward(grad, pre)
        if activation == "leaky_relu" and positive is not None:
            return torch.where(positive, grad, grad * slopes)
        return grad

    grad_n = grad if act_first else through_activation(grad)
    grad_x, grad_residual, grad_weight, grad_bias, grad_slope = [
        torch.empty(0, dtype=wide, device=grad.device) for _ in wants
    ]
    if wants_residual:
        grad_residual = grad_n.to(grad_y.dtype)
    if wants_bias:
        grad_bias = _sum_channels(grad_n, axis)
    if wants_weight and normal is not None:
        grad_weight = _sum_channels(grad_n * normal, axis)
    upstream = grad
    if rstd is not None and (wants_x or (wants_slope and act_first)):
        upstream = grad_n if w is None else grad_n * w
        if norm != "fixed" and normal is not None:
            first = _spread(_average(upstream, norm, groups), grad_y, norm, groups)
            second = _spread(_average(upstream * normal, norm, groups), grad_y, norm, groups)
            upstream = upstream - first - normal * second
        upstream = upstream * rstd
        grad_x = (through_activation(upstream) if act_first else upstream).to(dtype)
    if wants_slope and pre is not None and positive is not None and slope is not None:
        below = torch.where(positive, 0.0, (upstream if act_first else grad) * pre)
        grad_slope = _sum_channels(below, axis)
        grad_slope = grad_slope.sum().view(1) if slope.numel() == 1 else grad_slope
    return grad_x, grad_residual, grad_weight, grad_bias, grad_slope


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _positions(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _rows(x: torch.Tensor, norm: str, channels_last: bool) -> torch.Tensor:
    """x with the axis that the signs are packed along last; its memory is contiguous."""
    if norm == "layer":
        return x
    if channels_last:
        return x.movedim(1, -1)
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))


def _row_length(x: torch.Tensor, norm: str) -> int:
    if norm == "layer":
        return x.shape[-1]
    return x.shape[1] if is_channels_last(x, norm) else math.prod(x.shape[2:])


def _from_rows(rows: torch.Tensor, like: torch.Tensor, norm: str) -> torch.Tensor:
    """The inverse of `_rows` for a tensor of the size and layout of `like`."""
    return rows.movedim(-1, 1) if is_channels_last(like, norm) else rows.reshape(like.shape)


def _channels(vector: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """[C] (or [1]) as a tensor that broadcasts over `like`."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return vector.view(shape)


def _slope(
    slope: torch.Tensor | None, value: float, like: torch.Tensor, axis: int, wide: torch.dtype
) -> torch.Tensor | float:
    return value if slope is None else _channels(slope.to(wide), like, axis)


def _activate(x: torch.Tensor, activation: str, slope: torch.Tensor | float) -> torch.Tensor:
    if activation == "identity":
        return x
    return F.gelu(x) if activation == "gelu" else torch.where(x > 0, x, x * slope)


def _grouped(x: torch.Tensor, norm: str, groups: int) -> tuple[torch.Tensor, list[int]]:
    """x, and the axes that one statistic runs over."""
    if norm == "layer":
        return x, [-1]
    if norm == "batch":
        return x, [d for d in range(x.dim()) if d != 1]
    if norm == "group":
        x = x.unflatten(1, (groups, x.shape[1] // groups))
    return x, list(range(2, x.dim()))


def _moments(x: torch.Tensor, norm: str, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat biased variance and mean of every statistic."""
    if x.numel() == 0:  # torch warns
        zeros = torch.zeros(statistics_count(x.shape, norm, groups), dtype=x.dtype, device=x.device)
        return zeros, zeros.clone()
    grouped, axes = _grouped(x, norm, groups)
    var, mean = torch.var_mean(grouped, axes, correction=0)
    return var.flatten(), mean.flatten()


def _average(x: torch.Tensor, norm: str, groups: int) -> torch.Tensor:
    grouped, axes = _grouped(x, norm, groups)
    return grouped.mean(axes).flatten()


def _spread(statistic: torch.Tensor, like: torch.Tensor, norm: str, groups: int) -> torch.Tensor:
    """A flat statistic as a tensor that broadcasts over `like`."""
    if norm == "layer":
        return statistic.view(*like.shape[:-1], 1)
    if norm in ("batch", "fixed"):
        return _channels(statistic, like, 1)
    per_sample = groups if norm == "group" else like.shape[1]
    statistic = statistic.view(like.shape[0], per_sample)
    if norm == "group":
        statistic = statistic.repeat_interleave(like.shape[1] // groups, 1)
    return statistic.view(*like.shape[:2], *[1] * (like.dim() - 2))


def _sum_channels(x: torch.Tensor, axis: int) -> torch.Tensor:
    axis = axis % x.dim()
    others = [d for d in range(x.dim()) if d != axis]
    return x.sum(others) if others else x.clone()
