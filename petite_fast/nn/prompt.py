"""Channel prompts: a learned volume that steers the blocks of a vision-transformer stage."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid: TypeAlias = tuple[int, int, int]


class PromptTerms(NamedTuple):
    """What one block adds: `query` [1, N, C], `key` and `value` [1, M, C], `hidden` [1, N, 4C]."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor


class ChannelPrompt(nn.Module):
    """A learned volume P of `num_prompts` channels behind fixed random cross terms.

    `embedding` (1, t, s0, s1, s2), the only parameter, starts at zero. P is the embedding brought
    to the token grid of the input (`at`), one row of t numbers per token: P [1, N, t]. The keys and
    values live on a grid half as fine, so they read R [1, M, t], P averaged onto that grid. In
    block j of the stage, with its feature tokens x [B, N, C],

        q      = proj_q(x)      + P cross_q[j]^T      cross_q   (depth, C, t)
        k      = proj_k(x)      + R cross_k[j]^T      cross_k   (depth, C, t)
        v      = proj_v(x)      + R cross_v[j]^T      cross_v   (depth, C, t)
        hidden = fc1(norm2(x))  + P cross_mlp[j]^T    cross_mlp (depth, 4C, t)

    The terms do not depend on the input and are broadcast over the batch: they cost t / C of the
    projections they are added to, and keep nothing per sample for the backward pass.

    How this differs from the published form (VPT as channel prompts; Jia et al., ECCV 2022, and
    PETITE, MICCAI 2024). There the prompt is concatenated in front of the features and every block
    runs on C + t channels, with about a million new weights that are random and frozen. That
    changes the pretrained function even for a zero prompt: normalisation statistics, attention
    scale and the borders between heads are those of C + t channels. Here statistics, scale, heads
    and every pretrained weight are those of the C feature channels, so P = 0 is the base network,
    bit for bit. What is kept is how prompts act: through random, frozen blocks from prompt to
    feature channels. Those of the published projections belong to square matrices of C + t, those
    of its first MLP layer to a (4C + 4t, C + t) one, both Xavier-uniform, and the cross terms are
    drawn from the same two bounds, sqrt(6 / (2C + 2t)) and sqrt(6 / (5C + 5t)). The published
    prompts fit one patch size; these fit any.

    Shallow prompts are one volume per stage, read by each of its blocks. Deep ones (VPT-deep) are
    one volume per block: `embedding` is (depth, t, s0, s1, s2), and P and R of block j are made
    from its row j. All rows are used; the published deep prompts have `depth` rows on top of the
    shallow one, and the last of them never enters the network.

    The cross terms are buffers, drawn on the CPU from `seed` alone, and saved in the state dict: an
    adapter file reproduces its outputs on any machine and with any later version of the generator.

    Args:
        num_prompts: t, number of prompt channels.
        width: C, channels of the stage; the hidden layer of its MLPs has 4C.
        depth: number of blocks of the stage.
        grid: (s0, s1, s2), sides of the embedding: the stage's token grid for a 64-voxel patch.
        seed: seed of the cross terms.
        deep: one volume per block instead of one per stage.

    Raises:
        ValueError: `num_prompts` is less than 1.
    """

    cross_q: Tensor
    cross_k: Tensor
    cross_v: Tensor
    cross_mlp: Tensor

    def __init__(
        self,
        num_prompts: int,
        width: int,
        depth: int,
        grid: Grid,
        *,
        seed: int = 0,
        deep: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        self.num_prompts, self.deep = num_prompts, deep
        rows = depth if deep else 1
        self.embedding = nn.Parameter(
            torch.zeros(rows, num_prompts, *grid, device=device, dtype=dtype)
        )
        generator = torch.Generator().manual_seed(seed)
        square = (6 / (2 * (width + num_prompts))) ** 0.5
        first_layer = (6 / (5 * (width + num_prompts))) ** 0.5
        for name, rows, bound in (
            ("cross_q", width, square),
            ("cross_k", width, square),
            ("cross_v", width, square),
            ("cross_mlp", 4 * width, first_layer),
        ):
            cross = torch.empty(depth, rows, num_prompts, device="cpu", dtype=torch.float32)
            cross.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, cross.to(device=device, dtype=dtype))

    def at(self, grid: Grid) -> Tensor:
        """The prompt on a token grid: (1, t, *grid), or (depth, t, *grid) for deep prompts.

        Trilinear where the grid is finer than the embedding. Where it is coarser, cells are
        averaged: sampling would pass over some of them, and those would never learn.
        """
        prompt: Tensor = self.embedding
        s0, s1, s2 = prompt.shape[2:]
        coarse = (min(s0, grid[0]), min(s1, grid[1]), min(s2, grid[2]))
        if coarse != (s0, s1, s2):
            prompt = F.adaptive_avg_pool3d(prompt, coarse)
        if coarse != grid:
            prompt = F.interpolate(prompt, size=grid, mode="trilinear", align_corners=False)
        return prompt

    def forward(self, grid: Grid, key_grid: Grid) -> list[PromptTerms]:
        """The additive terms of every block, for tokens on `grid` and keys on `key_grid`."""
        prompt = self.at(grid)
        fine = prompt.flatten(2).transpose(1, 2)  # [1 or depth, N, t]
        coarse = F.adaptive_avg_pool3d(prompt, key_grid).flatten(2).transpose(1, 2)
        terms = []
        for j in range(len(self.cross_q)):
            row = slice(j, j + 1) if self.deep else slice(0, 1)
            tokens, reduced = fine[row], coarse[row]
            terms.append(
                PromptTerms(
                    F.linear(tokens, self.cross_q[j]),
                    F.linear(reduced, self.cross_k[j]),
                    F.linear(reduced, self.cross_v[j]),
                    F.linear(tokens, self.cross_mlp[j]),
                )
            )
        return terms

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        depth, width, _ = self.cross_q.shape
        grid = tuple(self.embedding.shape[2:])
        text = f"{self.num_prompts} prompts, width={width}, depth={depth}, grid={grid}"
        return text + ", deep=True" if self.deep else text
