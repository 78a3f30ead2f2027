"""ReLU and LeakyReLU alone: a bit per value is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.ops.bits import pack_signs, unpack_signs
from petite_fast.ops.library import below_autocast, first_order


def masked_activation(x: torch.Tensor, slope: float) -> torch.Tensor:
    """y = x where x > 0, else slope * x; the forward is torch's own.

    Keeps the sign of x, a bit per value (1/32 of x in float32), whatever the slope. Torch keeps x,
    or y in place.

    Args:
        x: any shape, floating-point.
        slope: 0 for ReLU.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    if has_torch_function((x,)):
        return handle_torch_function(masked_activation, (x,), x, slope)
    return _MaskedActivation.apply(x, slope)


class _MaskedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: float) -> torch.Tensor:
        ctx.slope = slope
        ctx.channels_last = _is_channels_last(x)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(pack_signs(_in_memory_order(x, ctx.channels_last).reshape(-1)))
        return F.relu(x) if slope == 0 else F.leaky_relu(x, slope)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        return below_autocast(_gradient)(grad_y, ctx), None


def _gradient(grad_y: torch.Tensor, ctx: Any) -> torch.Tensor:
    (bits,) = ctx.saved_tensors
    rows = _in_memory_order(grad_y, ctx.channels_last)
    positive = unpack_signs(bits, rows.numel()).view(rows.shape)
    grad = torch.where(positive, rows, rows * ctx.slope if ctx.slope else 0)
    return grad.permute(0, 4, 1, 2, 3) if ctx.channels_last else grad


def _is_channels_last(x: torch.Tensor) -> bool:
    return (
        x.dim() == 5
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _in_memory_order(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A view of x, where possible, whose elements follow one another as they lie in memory."""
    return x.permute(0, 2, 3, 4, 1) if channels_last else x
