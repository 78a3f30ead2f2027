"""Functions: formula, what is kept for backward, which backend runs it."""

import torch

from petite_fast.ops.activation import masked_activation
from petite_fast.ops.adapted_conv import adapted_conv
from petite_fast.ops.adapted_linear import adapted_linear
from petite_fast.ops.bits import pack_signs, unpack_signs
from petite_fast.ops.bottleneck import bottleneck
from petite_fast.ops.compress import dequantise, quantise, storage
from petite_fast.ops.dropout import dropout
from petite_fast.ops.library import effective_weight as _effective_weight
from petite_fast.ops.memory import saved_bytes
from petite_fast.ops.norm_act import norm_act
from petite_fast.ops.remade import concatenate, recomputed
from petite_fast.ops.scale_shift import frozen_batch_norm, scale_shift

__all__ = [
    "adapted_conv",
    "adapted_linear",
    "bottleneck",
    "concatenate",
    "dequantise",
    "dropout",
    "effective_weight",
    "frozen_batch_norm",
    "masked_activation",
    "norm_act",
    "pack_signs",
    "recomputed",
    "quantise",
    "saved_bytes",
    "scale_shift",
    "storage",
    "unpack_signs",
]


def effective_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scale: float = 1.0,
    gamma: torch.Tensor | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """W_eff = gamma * (W + scale * B.A), built in float32 (float64 for float64), rounded once.

    Plain:      ``(B.A)[o, ...] = sum_q B[o, q] A[q, ...]``, gamma of row o.
    Transposed: ``(B.A)[c, o, ...] = sum_q A[q, c] B[q, o, ...]``, gamma of column o of c's group.

    Not differentiable: it is what `adapted_conv` computes with, and what `merge` returns.

    Args:
        weight: [O, C/groups, ...]; transposed [C, O/groups, ...].
        lora_A: [r, C/groups, ...]; transposed [r, C, 1, ...].
        lora_B: [O, r]; transposed [r, O/groups, ...].
        scale: lora_alpha / r.
        gamma: [O].
        groups: channel groups.
        transposed: which of the two forms.
        dtype: of the result; default: the weight's.

    Returns:
        A new tensor of the shape of `weight`, contiguous.
    """
    with torch.no_grad():
        return _effective_weight(
            weight, lora_A, lora_B, float(scale), gamma, groups, transposed, dtype or weight.dtype
        )
