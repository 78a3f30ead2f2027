"""UNETR (Hatamizadeh et al., WACV 2022) as published with PETITE: MONAI's own network.

Its modules, parameter names and sums are MONAI's. What is added: inputs of any grid, attention
through `scaled_dot_product_attention`, and what `petite_fast.peft` wants to know of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from petite_fast.errors import InputError
from petite_fast.nn.prompt import Grid

try:
    import einops  # noqa: F401  (MONAI makes a broken module where it is missing)
    from monai.networks import nets
    from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
    from monai.networks.blocks.selfattention import SABlock
except ImportError as error:
    raise ImportError(
        f'UNETR needs MONAI and einops ({error}): pip install "petite_fast[app]"'
    ) from error

PATCH = 16
"""Side of a token in voxels."""


class PatchEmbedding(PatchEmbeddingBlock):
    """Patch projection plus position embeddings, which are brought to the grid of the input.

    Attributes:
        grid: the token grid that `position_embeddings` (1, N, C) was made for.
    """

    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        """[B, C0, X, Y, Z] -> tokens [B, N, C], N = X Y Z / 16^3."""
        tokens = self.patch_embeddings(x)
        if self.proj_type == "conv":
            tokens = tokens.flatten(2).transpose(1, 2)
        return self.dropout(tokens + at_grid(self.position_embeddings, self.grid, token_grid(x)))


class SelfAttention(SABlock):
    """MONAI's attention through `scaled_dot_product_attention`, without dropout in eval mode."""

    @property
    def dropout_rate(self) -> float:  # type: ignore[override]
        """The rate that MONAI's forward hands to the kernel; MONAI's own ignores the mode."""
        return self.drop_weights.p if self.training else 0.0


class UNETR(nets.UNETR):
    """Short scan in, standard scan out: a vision transformer with a convolutional decoder.

    With the defaults 101,670,049 parameters, in the published names, and 18,432 that MONAI makes
    and never uses (`norm_cross_attn`). Unlike CVT-GAN it adds no correction: its output is the
    reconstruction itself.

    The network takes every grid of whole 16^3 patches. Where the input's grid is not that of
    `img_size`, the position embeddings are interpolated to it (trilinear) in each forward; the
    parameter stays as it is, so one base serves 64 x 64 x 64 and 64 x 64 x 32.

    For a Mix, the transformer is the encoder and everything convolutional is the decoder. That
    includes MONAI's encoder1 to encoder4: they are not in the transformer's path but bring its
    hidden states (encoder1: the input) to the resolutions of decoder5 to decoder2, and the methods
    of the decoder, which are those of convolutions, are the ones that fit them.

    Args:
        img_size: sides in voxels that the position embeddings are made for, multiples of 16; one
            number for a cube.
        in_channels, out_channels: channels of input and output.
        feature_size: channels at full resolution.
        hidden_size: C, width of the transformer.
        mlp_dim: hidden width of its MLPs.
        num_heads: its attention heads.
        proj_type: "perceptron" or "conv", how patches become tokens.
        norm_name: norm of the convolution blocks, as MONAI names it; with arguments, a pair.
        conv_block, res_block: blocks of convolutions behind each up-sampling, and residual ones.
        dropout_rate: of the transformer.
        qkv_bias: whether query, key and value have a bias.

    Raises:
        ValueError: a side is not a multiple of 16, or MONAI refuses a size.

    Source: PETITE (arXiv 2407.07517); MONAI.
    """

    network: Literal["unetr"] = "unetr"
    """Name in saved files and in recipes."""

    peft_encoder = r"vit(\.|$)"
    peft_decoder = r"(encoder|decoder)\d|out(\.|$)"
    peft_unused = r"vit\.blocks\.\d+\.(norm_)?cross_attn\."
    peft_ssf = (
        r"vit\.(patch_embedding\.patch_embeddings\.1|norm"
        r"|blocks\.\d+\.(norm[12]|attn\.(qkv|out_proj)|mlp\.linear[12]))"
    )

    def __init__(
        self,
        img_size: Sequence[int] | int = (64, 64, 64),
        *,
        in_channels: int = 1,
        out_channels: int = 1,
        feature_size: int = 32,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        proj_type: str = "perceptron",
        norm_name: str | Sequence[Any] = "instance",
        conv_block: bool = True,
        res_block: bool = True,
        dropout_rate: float = 0.0,
        qkv_bias: bool = False,
    ) -> None:
        sides = sides_of(img_size)
        settings: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "feature_size": feature_size,
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
            "proj_type": proj_type,
            "norm_name": norm_name if isinstance(norm_name, str) else tuple(norm_name),
            "conv_block": conv_block,
            "res_block": res_block,
            "dropout_rate": dropout_rate,
            "qkv_bias": qkv_bias,
        }
        super().__init__(img_size=sides, **settings)
        self._config = {"img_size": sides, **settings}
        self.in_channels = in_channels
        vit: Any = self.vit
        vit.patch_embedding.__class__ = PatchEmbedding
        vit.patch_embedding.grid = self.feat_size
        for block in vit.blocks:
            block.attn.__class__ = SelfAttention
            block.attn.use_flash_attention = True

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this network again; a fresh JSON-able dict."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._config.items()}

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, X, Y, Z] -> [B, out_channels, X, Y, Z].

        Raises:
            ValueError: x has another shape, or a side is not a multiple of 16 (pad it).
        """
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"UNETR input must be [B, {self.in_channels}, X, Y, Z], got {list(x.shape)}"
            )
        if any(side < PATCH or side % PATCH for side in x.shape[2:]):
            raise ValueError(f"UNETR input sides must be multiples of 16, got {list(x.shape[2:])}")
        grid = token_grid(x)
        tokens, hidden = self.vit(x)
        enc1 = self.encoder1(x)
        enc2 = self.encoder2(self._volume(hidden[3], grid))
        enc3 = self.encoder3(self._volume(hidden[6], grid))
        enc4 = self.encoder4(self._volume(hidden[9], grid))
        dec4 = self.decoder5(self._volume(tokens, grid), enc4)
        dec3 = self.decoder4(dec4, enc3)
        dec2 = self.decoder3(dec3, enc2)
        return self.out(self.decoder2(dec2, enc1))

    def _volume(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] -> [B, C, *grid]; MONAI's own `proj_feat` knows one grid only."""
        return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def token_grid(x: Tensor) -> Grid:
    """The grid of tokens of [B, C0, X, Y, Z]."""
    return x.shape[2] // PATCH, x.shape[3] // PATCH, x.shape[4] // PATCH


def at_grid(embeddings: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position embeddings (1, N, C) of token grid `old`, interpolated (trilinear) to grid `new`."""
    if new == old:
        return embeddings
    volume = embeddings.transpose(1, 2).unflatten(2, old)
    volume = F.interpolate(volume, size=new, mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2)


def sides_of(img_size: Sequence[int] | int) -> Grid:
    """`img_size` as three sides.

    Raises:
        InputError: not one or three positive multiples of 16.
    """
    sides = (img_size,) * 3 if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 3 or any(side < PATCH or side % PATCH for side in sides):
        raise InputError(f"img_size must be one or three multiples of 16, got {img_size!r}")
    return sides[0], sides[1], sides[2]
