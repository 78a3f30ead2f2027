"""Scale and shift of features (SSF, Lian et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petite_fast.ops.scale_shift import scale_shift


class ScaleShift(nn.Module):
    """y = gamma * x + beta, one pair per channel; gamma = 1 and beta = 0 make it the identity.

    Args:
        channels: C, number of channels.
        channel_dim: 1 for volumes [N, C, ...], -1 for tokens [..., C].

    Raises:
        ValueError: `channel_dim` is neither 1 nor -1, or `channels` is less than 1.
    """

    def __init__(
        self,
        channels: int,
        channel_dim: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim: got {channel_dim!r}, wanted 1 or -1")
        if channels < 1:
            raise ValueError(f"channels: got {channels!r}, wanted a positive int")
        self.channel_dim = channel_dim
        self.gamma = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return scale_shift(x, self.gamma, self.beta, self.channel_dim)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"{self.gamma.numel()}, channel_dim={self.channel_dim}"
