"""Dropout that keeps a seed: the mask is a hash, made again wherever it is wanted."""

from __future__ import annotations

from typing import Any

import torch

from petite_fast.ops import compress, library, remade
from petite_fast.ops.library import first_order


def dropout(x: torch.Tensor, p: float = 0.5, seed: torch.Tensor | None = None) -> torch.Tensor:
    """x / (1 - p) with probability 1 - p, else 0, independently for every element.

    Keeps the seed. An op of this library that keeps the result keeps x in its place. The mask is a
    hash of the seed and of the element's place in memory: the same on every backend and with any
    number of threads, another for another memory format. A replayed CUDA graph repeats the mask of
    its capture.

    Args:
        x: floating-point, of any shape.
        p: in [0, 1); rounded to 2^-23.
        seed: int64 scalar on the CPU; default: drawn from torch's CPU generator.

    Returns:
        A new tensor of the shape and memory format of x.

    Raises:
        TypeError: x is not floating-point.
        ValueError: p outside [0, 1).

    Source: Srivastava et al. 2014.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, wanted a floating-point dtype")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: got {p!r}, wanted a number in [0, 1)")
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")

    def make(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Dropout.apply(x, p, seed)
        return y

    return remade.remember(make(x), [x], make)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
        ctx.p = p
        x = compress.dense(x)
        ctx.stride = x.stride()
        ctx.save_for_backward(seed)
        return library.dropout(x, p, seed)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        # The mask belongs to places in the memory of y.
        if grad_y.stride() != ctx.stride:
            grad_y = grad_y.new_empty_strided(grad_y.shape, ctx.stride).copy_(grad_y)
        return library.dropout(grad_y, ctx.p, *ctx.saved_tensors), None, None
