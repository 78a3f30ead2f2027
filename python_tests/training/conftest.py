"""Tiny networks and samples that a training step takes milliseconds on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petite_fast.training.loop import TrainSettings


class TinyGenerator(nn.Module):
    """Convolution, BatchNorm and dropout: everything whose state a resumed run must restore."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.LeakyReLU(0.2), nn.Dropout3d(0.2)
        )
        self.head = nn.Conv3d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.head(self.body(x))


class TinyDiscriminator(nn.Module):
    """A patch discriminator with the calling convention of CVTGANDiscriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(2, 4, 3, stride=2), nn.BatchNorm3d(4), nn.Conv3d(4, 1, 1)
        )

    def forward(self, x: torch.Tensor, logits: bool = False) -> torch.Tensor:
        y = self.net(x)
        return y if logits else y.sigmoid()


class NoisySamples:
    """Smooth targets and their noisy inputs; sample = f(epoch, index)."""

    def __init__(self, length: int = 5, bad_number: int | None = None) -> None:
        self.length, self.epoch, self.bad_number = length, 0, bad_number
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.epoch * self.length + index
        self.seen.append(number)
        rng = torch.Generator().manual_seed(number)
        target = torch.rand(1, 1, 1, 1, generator=rng).expand(1, 8, 8, 8).clone()
        noisy = target + 0.5 * torch.randn(target.shape, generator=rng)
        if number == self.bad_number:
            noisy[0, 0, 0, 0] = float("nan")
        return {"input": noisy, "target": target}


@pytest.fixture
def make_networks() -> Callable[[], tuple[nn.Module, nn.Module]]:
    """Generator and discriminator, the same ones at every call."""

    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return TinyGenerator(), TinyDiscriminator()

    return make


@pytest.fixture
def generator(make_networks) -> nn.Module:
    return make_networks()[0]


@pytest.fixture
def discriminator(make_networks) -> nn.Module:
    return make_networks()[1]


@pytest.fixture
def samples() -> NoisySamples:
    return NoisySamples()


@pytest.fixture
def make_samples() -> type[NoisySamples]:
    return NoisySamples


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainSettings]:
    def make(**changes: Any) -> TrainSettings:
        values = {"out": tmp_path / "run", "steps": 6, "batch": 2, "save_every": 2, "seed": 3}
        return TrainSettings(**{**values, **changes})

    return make
