"""MONAI's window attention without its matrix of weights: the product is torch's fused one.

The module makes softmax(q k^T + bias + mask) and keeps several tensors of that size, [windows,
heads, n, n]. The fused product keeps q, k, v, the output and one number per query.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn.lean import has_hooks
from petite_fast.nn.twin import Twin


class Grouping(NamedTuple):
    """Windows with equal masks, together: where each group's mask is, and the order and back."""

    firsts: list[int]
    sizes: list[int]
    order: Tensor
    back: Tensor


# By what MONAI makes a mask from, and the device: looking at a mask is a wait for a GPU, which a
# step need not repeat and a graph that is being captured cannot do.
_groupings: dict[Any, Grouping] = {}


class LeanSwinBlockTwin(Twin):
    """MONAI's SwinTransformerBlock, which tells its attention what the mask was made from."""

    attn: Any
    window_size: Any
    shift_size: Any

    @staticmethod
    def fits(block: Any) -> bool:
        """Always."""
        return True

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """[B, D, H, W, C] or [B, H, W, C]; called by forward, and again where it checkpoints."""
        if torch.compiler.is_compiling() or not isinstance(self.attn, LeanWindowAttentionTwin):
            return super().forward_part1(x, mask_matrix)  # type: ignore[misc]
        size, window, shift = (tuple(t) for t in (x.shape[1:-1], self.window_size, self.shift_size))
        self.attn.mask_key = (size, window, shift, x.device)
        try:
            return super().forward_part1(x, mask_matrix)  # type: ignore[misc]
        finally:
            self.attn.mask_key = None


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
    mask_key: Any = None
    """Equal for equal masks; None: not known."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Always."""
        return True

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B nw, n, C], mask [nw, n, n] -> [B nw, n, C]."""
        if not self._can_be_fused(x, mask):
            return super().forward(x, mask)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        bias = self._bias(n)
        if mask is None:
            y = self._product(qkv, bias)
        else:
            firsts, sizes, order, back = self._grouping(mask)
            windows = qkv.unflatten(0, (-1, len(mask))).index_select(1, order)
            parts = [
                self._product(part.flatten(0, 1), bias + mask[first]).unflatten(0, (-1, size))
                for part, first, size in zip(windows.split(sizes, 1), firsts, sizes, strict=True)
            ]
            y = torch.cat(parts, 1).index_select(1, back).flatten(0, 1)
        return self.proj_drop(self.proj(y))

    def _can_be_fused(self, x: Tensor, mask: Tensor | None) -> bool:
        """Whether nobody asks for the matrix; a new mask is looked at, which a graph cannot."""
        is_new = mask is not None and self._known(mask) is None
        return not (
            torch.compiler.is_compiling()
            or (is_new and x.is_cuda and torch.cuda.is_current_stream_capturing())
            or (self.relative_position_bias_table.requires_grad and torch.is_grad_enabled())
            or (self.attn_drop.training and self.attn_drop.p > 0)
            or has_hooks(self.attn_drop)
            or has_hooks(self.softmax)
        )

    def _known(self, mask: Tensor) -> Grouping | None:
        # A tensor without memory goes with none that has some.
        return _groupings.get(self.mask_key) if type(mask) is Tensor and not mask.is_meta else None

    def _grouping(self, mask: Tensor) -> Grouping:
        """The windows by their masks, looked at once for each key."""
        known = self._known(mask)
        if known is not None:
            return known
        groups = _groups(mask)
        firsts, sizes = [group[0] for group in groups], [len(group) for group in groups]
        with torch.inference_mode(False):  # a later backward may need what is kept here
            order = torch.tensor([w for group in groups for w in group], device=mask.device)
            found = Grouping(firsts, sizes, order, order.argsort())
        # Tensors without memory have no values: what was seen in them is no mask's.
        if self.mask_key is not None and type(mask) is Tensor and not mask.is_meta:
            _groupings[self.mask_key] = found
        return found

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
