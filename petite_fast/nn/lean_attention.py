"""MONAI's window attention without its matrix of weights: the product is torch's fused one.

The module makes softmax(q k^T + bias + mask) and keeps several tensors of that size, [windows,
heads, n, n]. The fused product keeps q, k, v, the output and one number per query.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn.lean import has_hooks
from petite_fast.nn.twin import Twin


class LeanWindowAttentionTwin(Twin):
    """MONAI's WindowAttention: proj(softmax(scale q k^T + bias + mask) v), on windows of tokens.

    A trained bias table needs the matrix, and so does dropout on it: then it is the module's own.
    Shifted windows have few different masks. Those with the same one are computed together, so that
    a mask [heads, n, n] serves them all.
    """

    num_heads: int
    scale: float
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    attn_drop: Any
    softmax: nn.Module

    @staticmethod
    def fits(block: Any) -> bool:
        """Always."""
        return True

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B nw, n, C], mask [nw, n, n] -> [B nw, n, C]."""
        if not self._can_be_fused(x):
            return super().forward(x, mask)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        bias = self._bias(n)
        if mask is None:
            y = self._product(qkv, bias)
        else:
            groups = _groups(mask)
            order = torch.tensor([w for group in groups for w in group], device=x.device)
            windows = qkv.unflatten(0, (-1, len(mask))).index_select(1, order)
            parts = [
                self._product(part.flatten(0, 1), bias + mask[group[0]]).unflatten(
                    0, (-1, len(group))
                )
                for part, group in zip(
                    windows.split([len(group) for group in groups], 1), groups, strict=True
                )
            ]
            y = torch.cat(parts, 1).index_select(1, order.argsort()).flatten(0, 1)
        return self.proj_drop(self.proj(y))

    def _can_be_fused(self, x: Tensor) -> bool:
        """Whether nobody asks for the matrix; masks are looked at, which a graph cannot."""
        return not (
            torch.compiler.is_compiling()
            or (x.is_cuda and torch.cuda.is_current_stream_capturing())
            or (self.relative_position_bias_table.requires_grad and torch.is_grad_enabled())
            or (self.attn_drop.training and self.attn_drop.p > 0)
            or has_hooks(self.attn_drop)
            or has_hooks(self.softmax)
        )

    def _bias(self, n: int) -> Tensor:
        """[heads, n, n] of the table."""
        index = self.relative_position_index[:n, :n].reshape(-1)
        bias = self.relative_position_bias_table.detach()[index]
        return bias.view(n, n, -1).permute(2, 0, 1).contiguous()

    def _product(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """[b, n, 3, heads, d] and [heads, n, n] -> [b, n, heads d]."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.to(q.dtype).unsqueeze(0), scale=self.scale
        )
        return y.transpose(1, 2).flatten(2)


def _groups(mask: Tensor) -> list[list[int]]:
    """Indices of the windows, those with equal masks together."""
    groups: list[list[int]] = []
    for window, own in enumerate(mask):
        for group in groups:
            if (own == mask[group[0]]).all():  # not torch.equal: no memory estimate has that
                group.append(window)
                break
        else:
            groups.append([window])
    return groups
