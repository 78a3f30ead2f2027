"""The bottleneck adapter as one op that keeps its input only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.ops import compress
from petite_fast.ops.adapted import compute_dtype
from petite_fast.ops.library import below_autocast, first_order

ACTIVATIONS = ("gelu", "relu")


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str = "gelu",
    channel_dim: int = -1,
) -> torch.Tensor:
    """y = x + Wu act(Wd x + bd) + bu on the channel axis.

    Keeps x; the hidden layer (H channels) is computed again in backward. With x kept in 8 bits
    (`storage`) grad_x is approximate too, as act' is taken at the rounded x. A contiguous volume
    is multiplied as it lies, N matrices [C, voxels]; one in channels-last memory is tokens.

    Args:
        x: [..., C], or [N, C, ...] with ``channel_dim=1``.
        down_weight: [H, C].
        down_bias: [H].
        up_weight: [C, H].
        up_bias: [C].
        activation: "gelu" (exact) or "relu".
        channel_dim: -1 for tokens, 1 for volumes.

    Returns:
        y, of the shape and memory format of x.

    Raises:
        ValueError: unknown activation or channel axis, or shapes that do not fit.
        TypeError: x and the weights of different dtypes without autocast.

    Source: Houlsby et al. 2019, sequential form of PETITE (facts 3.1).
    """
    tensors = (x, down_weight, down_bias, up_weight, up_bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            bottleneck, tensors, *tensors, activation=activation, channel_dim=channel_dim
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {ACTIVATIONS}")
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim: got {channel_dim!r}, wanted 1 or -1")
    hidden, channels = down_weight.shape
    for name, tensor, wanted in (
        ("down_bias", down_bias, (hidden,)),
        ("up_weight", up_weight, (channels, hidden)),
        ("up_bias", up_bias, (channels,)),
    ):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
    if x.dim() < max(1, channel_dim + 1) or x.shape[channel_dim] != channels:
        layout = f"[..., {channels}]" if channel_dim == -1 else f"[N, {channels}, ...]"
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted {layout}")
    dtype = compute_dtype(x, down_weight)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    if channel_dim == 1 and (x.dim() == 2 or channels_last):
        y = _Bottleneck.apply(x.movedim(1, -1), *tensors[1:], activation, False, dtype, trains)
        return y.movedim(-1, 1)
    return _Bottleneck.apply(*tensors, activation, channel_dim == 1, dtype, trains)


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor,
        activation: str,
        volumes: bool,
        dtype: torch.dtype,
        trains: bool,
    ) -> torch.Tensor:
        ctx.activation, ctx.volumes, ctx.dtype = activation, volumes, dtype
        if trains:
            kept, ctx.packing = compress.keep(x)
            ctx.save_for_backward(*kept, down_weight, down_bias, up_weight, up_bias)
        return below_autocast(_forward)(
            x, down_weight, down_bias, up_weight, up_bias, activation, volumes, dtype
        )

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        return below_autocast(_gradients)(grad_y, ctx)


def _matrix(x: torch.Tensor, volumes: bool, dtype: torch.dtype) -> torch.Tensor:
    """x as tokens [T, C], or as volumes [N, C, S]."""
    x = x.to(dtype)
    return x.flatten(2) if volumes else x.reshape(-1, x.shape[-1])


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """weight x + bias per token: [T, C] -> [T, H], or [N, C, S] -> [N, H, S]."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    # matmul would fold the batch into the rows, which copies the volume to channels-last.
    return torch.baddbmm(bias.unsqueeze(1), weight.expand(len(x), -1, -1), x)


def _transposed(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight^T grad per token: the gradient of `_linear` with respect to x."""
    if grad.dim() == 2:
        return grad @ weight
    return torch.bmm(weight.t().expand(len(grad), -1, -1), grad)


def _outer(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sum of grad x^T over all tokens: the gradient of `_linear` with respect to the weight."""
    if grad.dim() == 2:
        return grad.t() @ x
    wide = torch.promote_types(grad.dtype, torch.float32)
    return torch.bmm(grad, x.mT).sum(0, dtype=wide)


def _total(grad: torch.Tensor) -> torch.Tensor:
    """Sum over all tokens."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0 if grad.dim() == 2 else (0, 2), dtype=wide)


def _forward(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    hidden = _linear(_matrix(x, volumes, dtype), down_weight.to(dtype), down_bias.to(dtype))
    hidden = F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
    return x + _linear(hidden, up_weight.to(dtype), up_bias.to(dtype)).view(x.shape)


def _gradients(grad_y: torch.Tensor, ctx: Any) -> tuple[torch.Tensor | None, ...]:
    first, second, down_weight, down_bias, up_weight, up_bias = ctx.saved_tensors
    x = compress.restore((first, second), ctx.packing)
    volumes, dtype = ctx.volumes, ctx.dtype
    values, grad = _matrix(x, volumes, dtype), _matrix(grad_y, volumes, dtype)
    inner = _linear(values, down_weight.to(dtype), down_bias.to(dtype))
    grad_hidden = _transposed(grad, up_weight.to(dtype))
    if ctx.activation == "gelu":
        hidden = F.gelu(inner)
        grad_inner = torch.ops.aten.gelu_backward(grad_hidden, inner)
    else:
        hidden = F.relu(inner)
        grad_inner = grad_hidden * (inner > 0)
    grad_x = grad_y + _transposed(grad_inner, down_weight.to(dtype)).view(x.shape)
    return (
        grad_x.to(x.dtype),
        _outer(grad_inner, values).to(down_weight.dtype),
        _total(grad_inner).to(down_bias.dtype),
        _outer(grad, hidden).to(up_weight.dtype),
        _total(grad).to(up_bias.dtype),
        None,
        None,
        None,
        None,
    )
