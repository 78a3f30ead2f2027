"""Small networks that the peft tests adapt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from petite_fast.models import CVTGANGenerator


class SmallNet(nn.Module):
    """Every kind of layer that injection looks at: [N, 1, D, H, W] -> the same."""

    peft_encoder = r"(stem|norm|down)"
    peft_decoder = r"(up|head|tokens)"
    peft_unused = r"spare\."

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.down = nn.Conv3d(8, 8, 2, stride=2)
        self.tokens = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.head = nn.Conv3d(8, 1, 1)
        self.spare = nn.Conv3d(8, 8, 1)

    def forward(self, x):
        y = self.down(torch.relu(self.norm(self.stem(x))))
        y = y + self.tokens(y.movedim(1, -1)).movedim(-1, 1)
        return self.head(torch.relu(self.up(y))) + x


@pytest.fixture
def small() -> SmallNet:
    """Statistics of BatchNorm moved away from 0 and 1; evaluation mode; float64."""
    torch.manual_seed(0)
    net = SmallNet().double()
    with torch.no_grad():
        net(torch.randn(4, 1, 4, 4, 4, dtype=torch.float64))
    return net.eval()


@pytest.fixture
def small_input() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 1, 6, 4, 4, dtype=torch.float64)


@pytest.fixture
def generator() -> CVTGANGenerator:
    torch.manual_seed(0)
    return CVTGANGenerator(widths=(4, 8, 16, 32)).double().eval()


@pytest.fixture
def patch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 1, 32, 32, 16, dtype=torch.float64)
