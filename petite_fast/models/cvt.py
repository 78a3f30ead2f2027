"""The 3-D convolutional vision-transformer stage that CVT-GAN's two networks are made of.

Module and parameter names are those of the published checkpoints. Submodules are always called,
never read, so that an adapted layer can stand in for any of them.

Tokens [B, N, C] and the channels-last grid [B, C, D, H, W] are the same memory: going from one to
the other is a change of view, in both directions, and no permutation copies anything.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn.prompt import ChannelPrompt, Grid, PromptTerms

LEAKY_SLOPE = 0.2
"""Negative slope of every LeakyReLU in CVT-GAN."""


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, D, H, W] -> [B, D H W, C], a view.

    Not through [B, C, N]: for a batch of one that gives a gradient whose first stride is C, which
    the backward of torch's batch norm reads in the wrong order on a CPU (torch 2.13).
    """
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def to_grid(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, D H W, C] -> [B, C, D, H, W], a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class ConvProjection(nn.Module):
    """Depthwise 3x3x3 convolution and BatchNorm in front of a query, key or value projection."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.bn = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] -> tokens [B, N, C] of the (strided) grid."""
        return to_tokens(self.bn(self.conv(x)))


class Attention(nn.Module):
    """Attention with convolutional projections.

        y = proj(softmax(q k^T C^-0.5) v)        q = proj_q(conv_proj_q(x)), k and v likewise

    Softmax and products are per head; the scale is that of the full width C, not of one head.
    Keys and values are projected with stride 2: N queries meet ceil(D/2) ceil(H/2) ceil(W/2) keys.
    """

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5
        self.conv_proj_q = ConvProjection(width, stride=1)
        self.conv_proj_k = ConvProjection(width, stride=2)
        self.conv_proj_v = ConvProjection(width, stride=2)
        self.proj_q = nn.Linear(width, width, bias=False)
        self.proj_k = nn.Linear(width, width, bias=False)
        self.proj_v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid, terms: PromptTerms | None = None) -> Tensor:
        """Tokens [B, N, C] on `grid` -> [B, N, C]."""
        volume = to_grid(x, grid)
        q = self.proj_q(self.conv_proj_q(volume))
        k = self.proj_k(self.conv_proj_k(volume))
        v = self.proj_v(self.conv_proj_v(volume))
        if terms is not None:
            q, k, v = q + terms.query, k + terms.key, v + terms.value
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # [B, heads, N, C / heads]
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))) with dropout after each layer; the GELU is the exact one."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, term: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; `term` [1, N, 4C] is added before the activation."""
        hidden = self.fc1(x)
        if term is not None:
            hidden = hidden + term
        return self.drop(self.fc2(self.drop(self.act(hidden))))


class Block(nn.Module):
    """Pre-norm transformer block: x = x + attn(norm1(x)); x = x + mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, drop)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, drop)

    def forward(self, x: Tensor, grid: Grid, terms: PromptTerms | None = None) -> Tensor:
        """Tokens [B, N, C] on `grid` -> [B, N, C]."""
        x = x + self.attn(self.norm1(x), grid, terms)
        return x + self.mlp(self.norm2(x), None if terms is None else terms.hidden)


class PatchEmbed(nn.Module):
    """Halve the grid (3x3x3 convolution, stride 2) or double it (2x2x2 transposed), LayerNorm."""

    def __init__(self, in_channels: int, width: int, up: bool) -> None:
        super().__init__()
        self.proj: nn.Module
        if up:
            self.proj = nn.ConvTranspose3d(in_channels, width, 2, stride=2)
        else:
            self.proj = nn.Conv3d(in_channels, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """[B, Cin, D, H, W] -> tokens [B, N, C] and their grid."""
        x = self.proj(x)
        depth, height, width = x.shape[2:]
        return self.norm(to_tokens(x)), (depth, height, width)


class TransformerStage(nn.Module):
    """Patch embedding followed by `depth` blocks; a grid comes in, a grid goes out.

    Args:
        in_channels: channels of the input.
        width: C, channels of the tokens and of the output.
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        drop: dropout rate after the embedding, the attention and the MLP layers.
        up: double the grid instead of halving it.
        prompt_side: side of the token grid for a 64-voxel patch, the size of channel prompts.

    Attributes:
        prompt: None, or the channel prompts made by `make_prompt`.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    prompt: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        depth: int,
        heads: int,
        drop: float = 0.0,
        *,
        up: bool = False,
        prompt_side: int,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the stage's width, got {heads} heads for {width}")
        self.width = width
        self.prompt_side = prompt_side
        self.patch_embed = PatchEmbed(in_channels, width, up)
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(Block(width, heads, drop) for _ in range(depth))
        self.register_module("prompt", None)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def make_prompt(self, num_prompts: int, seed: int = 0, *, deep: bool = False) -> ChannelPrompt:
        """Channel prompts that fit this stage, on its device, in its dtype; see ChannelPrompt."""
        like = next(self.parameters())
        return ChannelPrompt(
            num_prompts,
            self.width,
            len(self.blocks),
            (self.prompt_side,) * 3,
            seed=seed,
            deep=deep,
            device=like.device,
            dtype=like.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, D, H, W] -> [B, C, ceil(D/2), ...], or [B, C, 2D, ...] for an up stage."""
        tokens, grid = self.patch_embed(x)
        tokens = self.pos_drop(tokens)
        if self.prompt is None:
            for block in self.blocks:
                tokens = block(tokens, grid)
        else:
            d, h, w = grid
            key_grid = ((d + 1) // 2, (h + 1) // 2, (w + 1) // 2)
            for block, terms in zip(self.blocks, self.prompt(grid, key_grid), strict=True):
                tokens = block(tokens, grid, terms)
        return to_grid(tokens, grid)
