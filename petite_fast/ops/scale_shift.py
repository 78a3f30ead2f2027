"""Per-channel scale and shift, alone (SSF) or as a BatchNorm with frozen statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.ops.library import below_autocast, first_order


def scale_shift(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, channel_dim: int = 1
) -> torch.Tensor:
    """y = gamma * x + beta per channel, in float32 inside, in the dtype of x outside.

    Keeps x if gamma requires grad, else no activation.

    Args:
        x: any shape with C channels on axis `channel_dim`.
        gamma: [C].
        beta: [C].
        channel_dim: 1 for [N, C, D, H, W], -1 for tokens.

    Raises:
        ValueError: gamma or beta is not [C].

    Source: SSF (Lian et al. 2022).
    """
    if has_torch_function((x, gamma, beta)):
        return handle_torch_function(
            scale_shift, (x, gamma, beta), x, gamma, beta, channel_dim=channel_dim
        )
    channels = x.shape[channel_dim]
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if tuple(vector.shape) != (channels,):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, wanted ({channels},)")
    return _ScaleShift.apply(x, gamma, beta, channel_dim % x.dim())


def _view(vector: torch.Tensor, like: torch.Tensor, channel_dim: int) -> torch.Tensor:
    shape = [1] * like.dim()
    shape[channel_dim] = -1
    return vector.view(shape)


def _sum(x: torch.Tensor, channel_dim: int, wide: torch.dtype) -> torch.Tensor:
    return x.sum([d for d in range(x.dim()) if d != channel_dim], dtype=wide)


class _ScaleShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, channel_dim: int
    ) -> torch.Tensor:
        ctx.channel_dim = channel_dim
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, gamma, beta)
        y = torch.addcmul(_view(beta, x, channel_dim), x, _view(gamma, x, channel_dim))
        # A .to() that does nothing loses the gradient in a graph compiled by torch 2.11.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        x, gamma, beta = ctx.saved_tensors
        dim = ctx.channel_dim
        wide = torch.promote_types(gamma.dtype, torch.float32)
        grad_x = grad_gamma = grad_beta = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y * _view(gamma, grad_y, dim)).to(grad_y.dtype)
        if ctx.needs_input_grad[1]:
            grad_gamma = _sum(grad_y * x, dim, wide).to(gamma.dtype)
        if ctx.needs_input_grad[2]:
            grad_beta = _sum(grad_y, dim, wide).to(beta.dtype)
        return grad_x, grad_gamma, grad_beta, None


def frozen_batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """BatchNorm with fixed statistics: y = weight * (x - mean) / sqrt(var + eps) + bias.

    The forward is torch's own (equal to the last bit). It is linear in x, so grad_x needs no x;
    keeps x only if weight requires grad.

    Args:
        x: [N, C, ...].
        mean: [C], not updated.
        var: [C], not updated.
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance.
    """
    tensors = (x, mean, var, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(frozen_batch_norm, tensors, x, mean, var, weight, bias, eps)
    return _FrozenBatchNorm.apply(x, mean, var, weight, bias, eps)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        ctx.eps = eps
        keeps_x = weight is not None and ctx.needs_input_grad[3]
        ctx.save_for_backward(x if keeps_x else None, mean if keeps_x else None, var, weight, bias)
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        return below_autocast(_batch_norm_gradients)(grad_y, ctx)


def _batch_norm_gradients(grad_y: torch.Tensor, ctx: Any) -> tuple[torch.Tensor | None, ...]:
    x, mean, var, weight, bias = ctx.saved_tensors
    wide = torch.promote_types(var.dtype, torch.float32)
    rstd = torch.rsqrt(var.to(wide) + ctx.eps)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        scale = rstd if weight is None else rstd * weight.to(wide)
        grad_x = (grad_y * _view(scale, grad_y, 1)).to(grad_y.dtype)
    if ctx.needs_input_grad[3]:
        centred = x.to(wide) - _view(mean.to(wide), x, 1)
        grad_weight = (_sum(grad_y * centred, 1, wide) * rstd).to(weight.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = _sum(grad_y, 1, wide).to(bias.dtype)
    return grad_x, None, None, grad_weight, grad_bias, None
