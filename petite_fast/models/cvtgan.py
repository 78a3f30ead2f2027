"""3D CVT-GAN (Zeng et al., MICCAI 2022), as published with PETITE (arXiv 2407.07517, MICCAI 2024).

Parameter and buffer names, sizes and defaults are those of the published checkpoints, which load
strictly. Every convolution unit is convolution -> LeakyReLU(0.2) -> BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from petite_fast.models.cvt import LEAKY_SLOPE, TransformerStage
from petite_fast.ops import concatenate


def _conv_unit(in_channels: int, out_channels: int, *, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1),
        nn.LeakyReLU(LEAKY_SLOPE),
        nn.BatchNorm3d(out_channels),
    ]


def _numbers(name: str, values: Sequence[Any], count: int) -> list[Any]:
    values = list(values)
    if len(values) != count:
        raise ValueError(f"{name} must have {count} entries, got {values}")
    return values


class _Shortcut(nn.Module):
    """1x1x1 convolution beside a decoder layer.

    `transconv` is in the published checkpoints and was never in the graph: kept for strict loading.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)
        self.transconv = nn.ConvTranspose3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CVTGANGenerator(nn.Module):
    """Short scan in, standard scan out: a U-shaped network that adds a correction to its input.

        en0 = encoder_layer0_down(x)      en{i} = encoder_layer{i}_down(en{i-1})        i = 1, 2, 3
        de0 = decoder_layer1_up(decoder_layer1(en3) + resup1(en3))
        de1 = decoder_layer2_up(decoder_layer2(c) + resup2(c))              c = [en2, de0]
        de2 = decoder_layer3_up(decoder_layer3(c) + resup3(c))              c = [en1, de1]
        y   = x + decoder_layer4([en0, de2])

    With the defaults: 28,715,681 parameters, of which 426,880 (resup*.transconv) are never used.
    In training mode BatchNorm needs more than one value per channel at the coarsest keys, so a
    batch of one needs patches of at least 64 x 64 x 32.

    Args:
        widths: channels of the four resolutions.
        encoder_depths: blocks in the three encoder stages.
        encoder_heads: attention heads of the three encoder stages.
        encoder_drop: dropout rates of the three encoder stages.
        decoder_depths: blocks in the two decoder stages.
        decoder_heads: attention heads of the two decoder stages.
        decoder_drop: dropout rates of the two decoder stages.
        channel_drop: rate of the channel dropout in decoder_layer2.

    Raises:
        ValueError: a sequence has the wrong length, or heads do not divide a width.
    """

    network: Literal["cvtgan"] = "cvtgan"
    """Name in saved files and in recipes."""

    peft_encoder = r"encoder_layer\d"
    peft_decoder = r"(decoder_layer|resup)\d"
    peft_unused = r"resup\d\.transconv\."
    # As published: both norms, the projections and the MLP of every block, and the embeddings of
    # the encoder; one pair for query, key and value together.
    peft_ssf = (
        r"encoder_layer\d_down\.0\.patch_embed\.(proj|norm)"
        r"|.*\.blocks\.\d+\.(norm[12]|attn\.proj(_[qkv])?|mlp\.fc[12])"
    )
    peft_ssf_shared = r"(.*\.attn)\.proj_[qkv]"

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        encoder_depths: Sequence[int] = (1, 2, 2),
        encoder_heads: Sequence[int] = (2, 4, 4),
        encoder_drop: Sequence[float] = (0.0, 0.2, 0.0),
        decoder_depths: Sequence[int] = (2, 1),
        decoder_heads: Sequence[int] = (4, 4),
        decoder_drop: Sequence[float] = (0.0, 0.0),
        channel_drop: float = 0.2,
    ) -> None:
        super().__init__()
        self._config: dict[str, Any] = {
            "widths": _numbers("widths", widths, 4),
            "encoder_depths": _numbers("encoder_depths", encoder_depths, 3),
            "encoder_heads": _numbers("encoder_heads", encoder_heads, 3),
            "encoder_drop": _numbers("encoder_drop", encoder_drop, 3),
            "decoder_depths": _numbers("decoder_depths", decoder_depths, 2),
            "decoder_heads": _numbers("decoder_heads", decoder_heads, 2),
            "decoder_drop": _numbers("decoder_drop", decoder_drop, 2),
            "channel_drop": channel_drop,
        }
        w0, w1, w2, w3 = widths

        def down(i: int) -> nn.Sequential:
            # The published stage sits in a Sequential of one: its names carry a ".0.".
            return nn.Sequential(
                TransformerStage(
                    widths[i - 1],
                    widths[i],
                    encoder_depths[i - 1],
                    encoder_heads[i - 1],
                    encoder_drop[i - 1],
                    prompt_side=32 >> i,
                )
            )

        def up(i: int, in_channels: int, width: int) -> TransformerStage:
            return TransformerStage(
                in_channels,
                width,
                decoder_depths[i - 1],
                decoder_heads[i - 1],
                decoder_drop[i - 1],
                up=True,
                prompt_side=4 << i,
            )

        self.encoder_layer0_down = nn.Sequential(*_conv_unit(1, w0, stride=2))
        self.encoder_layer1_down = down(1)
        self.encoder_layer2_down = down(2)
        self.encoder_layer3_down = down(3)
        self.decoder_layer1 = nn.Sequential(*_conv_unit(w3, w3))
        self.resup1 = _Shortcut(w3, w3)
        self.decoder_layer1_up = up(1, w3, w2)
        conv, activation, norm = _conv_unit(2 * w2, w2)
        self.decoder_layer2 = nn.Sequential(conv, nn.Dropout3d(channel_drop), activation, norm)
        self.resup2 = _Shortcut(2 * w2, w2)
        self.decoder_layer2_up = up(2, w2, w1)
        self.decoder_layer3 = nn.Sequential(*_conv_unit(2 * w1, w1))
        self.resup3 = _Shortcut(2 * w1, w1)
        self.decoder_layer3_up = nn.ConvTranspose3d(w1, w0, 2, stride=2)
        self.decoder_layer4 = nn.Sequential(
            nn.Conv3d(2 * w0, w0, 3, padding=1),
            nn.Conv3d(w0, w0 // 2, 3, padding=1),
            nn.ConvTranspose3d(w0 // 2, 1, 2, stride=2),
            nn.LeakyReLU(LEAKY_SLOPE),
        )

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this network again; a fresh JSON-able dict."""
        return _copy(self._config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, D, H, W] -> [B, 1, D, H, W].

        Raises:
            ValueError: x is not [B, 1, D, H, W], or a side is not a multiple of 16 (pad it).
        """
        if x.dim() != 5 or x.shape[1] != 1:
            raise ValueError(f"generator input must be [B, 1, D, H, W], got {list(x.shape)}")
        if any(side % 16 for side in x.shape[2:]):
            raise ValueError(
                f"generator input sides must be multiples of 16, got {list(x.shape[2:])}"
            )
        en0 = self.encoder_layer0_down(x)
        en1 = self.encoder_layer1_down(en0)
        en2 = self.encoder_layer2_down(en1)
        en3 = self.encoder_layer3_down(en2)
        de0 = self.decoder_layer1_up(self.decoder_layer1(en3) + self.resup1(en3))
        skip = concatenate([en2, de0])
        de1 = self.decoder_layer2_up(self.decoder_layer2(skip) + self.resup2(skip))
        skip = concatenate([en1, de1])
        de2 = self.decoder_layer3_up(self.decoder_layer3(skip) + self.resup3(skip))
        return self.decoder_layer4(concatenate([en0, de2])) + x


class CVTGANDiscriminator(nn.Module):
    """Is a scan real? One answer per channel of the last feature map, at each cell of 16^3 voxels.

    Input is [short scan, real or generated scan] on the channel axis. With the defaults: 295,001
    parameters, of which 129 (`linear`, kept for strict loading of published files) are never used.

    Args:
        widths: channels after conv0, conv1, conv2 and of both transformer stages.
        depths: blocks of the two stages.
        heads: attention heads of the two stages.
        drop: dropout rates of the two stages.
        channel_drop: rate of the channel dropout after conv2.

    Raises:
        ValueError: a sequence has the wrong length, or heads do not divide a width.
    """

    peft_encoder = r"conv\d"
    peft_decoder = r"(?!)"  # matches nothing: a discriminator has no decoder
    peft_unused = r"linear\."

    def __init__(
        self,
        widths: Sequence[int] = (8, 16, 32, 64),
        *,
        depths: Sequence[int] = (1, 1),
        heads: Sequence[int] = (2, 2),
        drop: Sequence[float] = (0.3, 0.3),
        channel_drop: float = 0.2,
    ) -> None:
        super().__init__()
        self._config: dict[str, Any] = {
            "widths": _numbers("widths", widths, 4),
            "depths": _numbers("depths", depths, 2),
            "heads": _numbers("heads", heads, 2),
            "drop": _numbers("drop", drop, 2),
            "channel_drop": channel_drop,
        }
        w0, w1, w2, w3 = widths
        self.conv0 = nn.Sequential(*_conv_unit(2, w0, stride=2))
        self.conv1 = nn.Sequential(*_conv_unit(w0, w1))
        self.conv2 = nn.Sequential(*_conv_unit(w1, w2, stride=2), nn.Dropout3d(channel_drop))
        self.conv3 = TransformerStage(w2, w3, depths[0], heads[0], drop[0], prompt_side=8)
        self.conv4 = TransformerStage(w3, w3, depths[1], heads[1], drop[1], prompt_side=4)
        self.linear = nn.Linear(2 * w3, 1)

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this network again; a fresh JSON-able dict."""
        return _copy(self._config)

    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        """[B, 2, D, H, W] -> [B, C, ceil(D/16), ceil(H/16), ceil(W/16)].

        Args:
            x: the pair of scans.
            logits: False gives the published output, probabilities after a sigmoid; True leaves the
                sigmoid out, for a loss that has its own (binary_cross_entropy_with_logits).

        Raises:
            ValueError: x is not [B, 2, D, H, W].
        """
        if x.dim() != 5 or x.shape[1] != 2:
            raise ValueError(f"discriminator input must be [B, 2, D, H, W], got {list(x.shape)}")
        y = self.conv4(self.conv3(self.conv2(self.conv1(self.conv0(x)))))
        return y if logits else y.sigmoid()


def _copy(config: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, list) else v for k, v in config.items()}
