"""The bottleneck adapter in ATen calls, for every dtype and device."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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


def _added(x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """x + change, which lies as x does."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, change.dtype))
    return torch.add(x, change.view(x.shape), out=y)


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = x + Wu act(Wd x + bd) + bu, products in `dtype`. x [..., C], or `volumes` [N, C, ...]."""
    hidden = _linear(_matrix(x, volumes, dtype), down_weight.to(dtype), down_bias.to(dtype))
    hidden = F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
    return _added(x, _linear(hidden, up_weight.to(dtype), up_bias.to(dtype)))


def bottleneck_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x and the gradients of Wd, bd, Wu and bu; the hidden layer is computed again."""
    values, grad = _matrix(x, volumes, dtype), _matrix(grad_y, volumes, dtype)
    inner = _linear(values, down_weight.to(dtype), down_bias.to(dtype))
    grad_hidden = _transposed(grad, up_weight.to(dtype))
    if activation == "gelu":
        hidden = F.gelu(inner)
        grad_inner = torch.ops.aten.gelu_backward(grad_hidden, inner)
    else:
        hidden = F.relu(inner)
        grad_inner = grad_hidden * (inner > 0)
    grad_x = _added(grad_y, _transposed(grad_inner, down_weight.to(dtype)))
    return (
        grad_x.to(x.dtype),
        _outer(grad_inner, values).to(down_weight.dtype),
        _total(grad_inner).to(down_bias.dtype),
        _outer(grad, hidden).to(up_weight.dtype),
        _total(grad).to(up_weight.dtype),
    )
