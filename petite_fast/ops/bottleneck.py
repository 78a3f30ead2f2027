"""The bottleneck adapter as one op that keeps its input only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

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
) -> torch.Tensor:
    """y = x + act(x Wd^T + bd) Wu^T + bu on tokens.

    Keeps x; the hidden layer (C / reduction per token) is computed again in backward.

    Args:
        x: [..., C].
        down_weight: [H, C].
        down_bias: [H].
        up_weight: [C, H].
        up_bias: [C].
        activation: "gelu" (exact) or "relu".

    Raises:
        ValueError: unknown activation, or shapes that do not fit.
        TypeError: x and the weights of different dtypes without autocast.

    Source: Houlsby et al. 2019, sequential form of PETITE (facts 3.1).
    """
    tensors = (x, down_weight, down_bias, up_weight, up_bias)
    if has_torch_function(tensors):
        return handle_torch_function(bottleneck, tensors, *tensors, activation=activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {ACTIVATIONS}")
    hidden, channels = down_weight.shape
    for name, tensor, wanted in (
        ("down_bias", down_bias, (hidden,)),
        ("up_weight", up_weight, (channels, hidden)),
        ("up_bias", up_bias, (channels,)),
    ):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
    if x.shape[-1] != channels:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {channels}]")
    dtype = compute_dtype(x, down_weight)
    return _Bottleneck.apply(*tensors, activation, dtype)


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
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.activation, ctx.dtype = activation, dtype
        ctx.save_for_backward(x, down_weight, down_bias, up_weight, up_bias)
        return below_autocast(_forward)(
            x, down_weight, down_bias, up_weight, up_bias, activation, dtype
        )

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        return below_autocast(_gradients)(grad_y, ctx)


def _forward(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    hidden = F.linear(x.to(dtype), down_weight.to(dtype), down_bias.to(dtype))
    hidden = F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
    return x + F.linear(hidden, up_weight.to(dtype), up_bias.to(dtype))


def _gradients(grad_y: torch.Tensor, ctx: Any) -> tuple[torch.Tensor | None, ...]:
    x, down_weight, down_bias, up_weight, up_bias = ctx.saved_tensors
    dtype = ctx.dtype
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    grad = grad_y.reshape(-1, x.shape[-1]).to(dtype)
    inner = F.linear(tokens, down_weight.to(dtype), down_bias.to(dtype))
    grad_hidden = grad @ up_weight.to(dtype)
    if ctx.activation == "gelu":
        hidden = F.gelu(inner)
        grad_inner = torch.ops.aten.gelu_backward(grad_hidden, inner)
    else:
        hidden = F.relu(inner)
        grad_inner = grad_hidden * (inner > 0)
    grad_x = grad_y + (grad_inner @ down_weight.to(dtype)).view(x.shape)
    return (
        grad_x.to(x.dtype),
        (grad_inner.t() @ tokens).to(down_weight.dtype),
        grad_inner.sum(0).to(down_bias.dtype),
        (grad.t() @ hidden).to(up_weight.dtype),
        grad.sum(0).to(up_bias.dtype),
        None,
        None,
    )
