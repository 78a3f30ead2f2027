"""The bottleneck adapter (Houlsby et al., ICML 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petite_fast.ops.bottleneck import ACTIVATIONS, bottleneck


class BottleneckAdapter(nn.Module):
    """y = x + up(act(down(x))) on the channels; only x is kept for the backward pass.

    `down` C -> hidden starts random, `up` hidden -> C starts at zero (weight and bias): the adapter
    starts as the identity, `up` learns from the first step and `down` from the second. On volumes
    the two are pointwise (1x1x1) convolutions, with the parameters of a Linear.

    Args:
        channels: C.
        reduction: hidden = max(1, C // reduction).
        hidden: width of the bottleneck; overrides `reduction`.
        activation: "gelu" (exact) or "relu".
        channel_dim: -1 for tokens [..., C], 1 for volumes [N, C, D, H, W] and any [N, C, ...].

    Raises:
        ValueError: a size is less than 1, the activation is unknown, or `channel_dim` is neither 1
            nor -1.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, wanted one of {ACTIVATIONS}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim: got {channel_dim!r}, wanted 1 or -1")
        for name, value in (("channels", channels), ("reduction", reduction), ("hidden", hidden)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a positive int")
        width = max(1, channels // reduction) if hidden is None else hidden
        self.activation, self.channel_dim = activation, channel_dim
        self.down = nn.Linear(channels, width, device=device, dtype=dtype)
        self.up = nn.Linear(width, channels, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], or [N, C, ...] -> [N, C, ...]."""
        return bottleneck(
            x,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            activation=self.activation,
            channel_dim=self.channel_dim,
        )

    def extra_repr(self) -> str:
        """The activation and the channel axis, for `print(module)`."""
        return f"activation={self.activation!r}, channel_dim={self.channel_dim}"
