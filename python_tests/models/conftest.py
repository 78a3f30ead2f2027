"""Golden values and tiny networks shared by the tests of the models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from petite_fast.models import CVTGANDiscriminator, CVTGANGenerator

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def formula() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_formula", GOLDEN / "formula.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cvtgan.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_unetr() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "unetr.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def filled(formula: ModuleType) -> Callable[[nn.Module], nn.Module]:
    """Give a network the weights of the golden values; eval mode."""

    def fill(network: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, value in network.state_dict().items():
                value.copy_(torch.from_numpy(formula.fill(name, tuple(value.shape))))
        return network.eval()

    return fill


@pytest.fixture
def tiny_generator() -> CVTGANGenerator:
    torch.manual_seed(0)
    return CVTGANGenerator(widths=(8, 16, 32, 64))


@pytest.fixture
def tiny_discriminator() -> CVTGANDiscriminator:
    torch.manual_seed(1)
    return CVTGANDiscriminator(widths=(4, 8, 8, 16))
