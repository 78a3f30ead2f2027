"""A batch in which every sample has low-rank adapters of its own, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petite_fast.ops.adapted import compute_dtype
from petite_fast.ops.adapted_conv import adapted_conv
from petite_fast.ops.adapted_linear import adapted_linear
from petite_fast.ops.library import below_autocast


def grouped_conv(
    x: Tensor, weights: Tensor, bias: Tensor | None, groups: int, **geometry: Any
) -> Tensor:
    """Sample i through convolution i, all in one grouped convolution of [1, N*C, D, H, W].

    Args:
        x: [N, C, D, H, W].
        weights: the N weights, one after the other on the first axis.
        bias: of each of them, or None.
        groups: of each of them.
        geometry: of each of them, as in `ops.adapted_conv`; padding comes before all else.

    Returns:
        y [N, O, D', H', W'].
    """
    n = len(x)
    y = adapted_conv(
        x.reshape(1, -1, *x.shape[2:]),
        weights,
        None if bias is None else bias.repeat(n),
        groups=n * groups,
        **geometry,
    )
    return y.reshape(n, -1, *y.shape[2:])


def effective_weights(
    x: Tensor,
    weight: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    transposed: bool,
) -> Tensor:
    """W + scaling * B_i.A_i for every pair, on the first axis, in the dtype that x is computed in.

    Built in float32 (float64 for float64) and rounded once, as in `ops.effective_weight`, but
    differentiable.
    """
    a, b = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    rows = below_autocast(_rows)(weight, a, b, scaling, transposed)
    return rows.to(compute_dtype(x, weight)).view(-1, *weight.shape[1:])


def _rows(weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = a.to(wide).flatten(2), b.to(wide).flatten(2)
    left, right = (a.mT, b) if transposed else (b, a)
    return torch.baddbmm(weight.to(wide).flatten(1), left, right, alpha=scaling)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
) -> Tensor:
    """y_i = x_i W^T + b + scaling * (x_i A_i^T) B_i^T, the last term as two batched products.

    Args:
        x: [N, ..., C].
        weight: [O, C].
        bias: [O] or None.
        pairs: N times A [r, C] and B [O, r].
        scaling: of every pair.
    """
    dtype = compute_dtype(x, weight)
    a, b = (torch.stack(factors).to(dtype) for factors in zip(*pairs, strict=True))
    tokens = x.to(dtype).reshape(len(x), -1, x.shape[-1])
    branch = torch.bmm(torch.bmm(tokens, a.mT), b.mT * scaling)
    y = adapted_linear(x, weight, bias)
    return y + branch.view(y.shape)
