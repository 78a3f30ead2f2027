"""The bottleneck adapter as one op that keeps its input only."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.ops import compress, library
from petite_fast.ops.adapted import compute_dtype
from petite_fast.ops.library import first_order

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
        ctx.form = (activation, volumes, dtype)
        if trains:
            kept, ctx.packing = compress.keep(x)
            ctx.save_for_backward(*kept, down_weight, down_bias, up_weight)
        return library.bottleneck(x, down_weight, down_bias, up_weight, up_bias, *ctx.form)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        first, second, *weights = ctx.saved_tensors
        x = compress.restore((first, second), ctx.packing)
        return *library.bottleneck_backward(grad_y, x, *weights, *ctx.form), None, None, None, None
