"""The GAN objective against its formula, and where its gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from petite_fast.training.objectives import GANObjective, L1Objective, MSEObjective


@pytest.fixture
def scans() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    x, y = torch.rand(2, 1, 8, 8, 8), torch.rand(2, 1, 8, 8, 8)
    return x, y, torch.rand(2, 1, 8, 8, 8, requires_grad=True)


def test_losses_are_the_formula(discriminator: nn.Module, scans) -> None:
    x, y, fake = scans
    objective = GANObjective(discriminator, train_discriminator=False)  # eval: one BN, one answer
    p_fake = discriminator(torch.cat([x, fake], 1))
    p_real = discriminator(torch.cat([x, y], 1))
    losses = objective.generator_losses(x, y, fake)
    l1 = (fake - y).abs().mean()
    torch.testing.assert_close(losses["l1"], l1)
    torch.testing.assert_close(losses["loss"], -p_fake.log().mean() + 100 * l1)
    wanted = 0.5 * (-p_real.log().mean() - (1 - p_fake).log().mean())
    torch.testing.assert_close(objective.discriminator_loss(x, y, fake), wanted)


def test_generator_step_leaves_the_discriminator_without_gradient(
    discriminator: nn.Module, scans
) -> None:
    x, y, fake = scans
    objective = GANObjective(discriminator, train_discriminator=True, l1_weight=0.0)
    objective.generator_losses(x, y, fake)["loss"].backward()
    assert fake.grad is not None and fake.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_discriminator_step_leaves_the_generator_without_gradient(
    discriminator: nn.Module, scans
) -> None:
    x, y, fake = scans
    objective = GANObjective(discriminator, train_discriminator=True)
    objective.discriminator_loss(x, y, fake).backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_frozen_discriminator_is_in_eval_and_untrainable(discriminator: nn.Module) -> None:
    GANObjective(discriminator, train_discriminator=False)
    assert not discriminator.training
    assert not any(p.requires_grad for p in discriminator.parameters())


def test_no_sigmoid_floor(discriminator: nn.Module, scans) -> None:
    """A sure discriminator makes loss_D almost zero; with a sigmoid first it cannot pass 0.5."""
    x, y, fake = scans
    objective = GANObjective(discriminator, train_discriminator=False)

    class Sure(nn.Module):
        def forward(self, pair: torch.Tensor, logits: bool = False) -> torch.Tensor:
            assert logits
            return torch.where((pair[:, 1] == y[:, 0]).all(), 20.0, -20.0).reshape(1)

    objective.discriminator = Sure()
    assert objective.discriminator_loss(x, y, fake).item() < 1e-6


def test_l1_objective(scans) -> None:
    x, y, fake = scans
    losses = L1Objective().generator_losses(x, y, fake)
    assert math.isclose(losses["loss"].item(), (fake - y).abs().mean().item(), rel_tol=1e-6)


def test_mse_objective(scans) -> None:
    x, y, fake = scans
    losses = MSEObjective().generator_losses(x, y, fake)
    torch.testing.assert_close(losses["loss"], (fake - y).square().mean())
    torch.testing.assert_close(losses["l1"], (fake - y).abs().mean())
    assert losses["loss"].requires_grad and not losses["l1"].requires_grad
    assert MSEObjective.discriminator is None and not MSEObjective.trains_discriminator
