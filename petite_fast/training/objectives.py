"""What the network is trained to do: L1, mean squared error, or the GAN objective of PETITE.

    loss_G = BCE(D([x, G(x)]), 1) + 100 * mean |G(x) - y|
    loss_D = (BCE(D([x, y]), 1) + BCE(D([x, G(x)]), 0)) / 2         G(x) detached

x short scan, y standard scan, G(x) reconstruction, all [N, 1, X, Y, Z]; BCE is taken on the
discriminator's logits (the published code feeds BCE-with-logits a sigmoid, which puts a floor of
0.3133 under the real and adversarial terms and of 0.6931 under the fake term), and one forward
of G serves both steps. Source: arXiv 2407.07517; weights from its public code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class L1Objective:
    """mean |G(x) - y|: the objective without a discriminator."""

    discriminator: nn.Module | None = None
    trains_discriminator = False

    def generator_losses(self, x: Tensor, y: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """{"loss": what to minimise, "l1": ...}; x, y, fake are [N, 1, X, Y, Z]."""
        l1 = F.l1_loss(fake, y)
        return {"loss": l1, "l1": l1.detach()}


class MSEObjective:
    """mean (G(x) - y)^2: the published objective of UNETR, which has no discriminator."""

    discriminator: nn.Module | None = None
    trains_discriminator = False

    def generator_losses(self, x: Tensor, y: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """{"loss": what to minimise, "l1": mean |G(x) - y|}; x, y, fake are [N, 1, X, Y, Z]."""
        return {"loss": F.mse_loss(fake, y), "l1": F.l1_loss(fake.detach(), y)}


class GANObjective:
    """The adversarial objective.

    Args:
        discriminator: network on [N, 2, X, Y, Z]; called with ``logits=True`` (no sigmoid).
        train_discriminator: True in pretraining; False freezes it in eval mode: its step is
            skipped, the adversarial term for G stays (PETITE's fine-tuning).
        l1_weight: weight of the L1 term, 100 as published.
    """

    def __init__(
        self, discriminator: nn.Module, *, train_discriminator: bool, l1_weight: float = 100.0
    ) -> None:
        self.discriminator = discriminator
        self.trains_discriminator = train_discriminator
        self.l1_weight = l1_weight
        discriminator.train(train_discriminator)
        discriminator.requires_grad_(train_discriminator)

    def generator_losses(self, x: Tensor, y: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """{"loss", "l1", "adversarial"} of G's step; D gets no gradient from it."""
        with _no_parameter_gradients(self.discriminator):
            judged = self._logits(torch.cat([x, fake], dim=1))
        adversarial = _bce(judged, 1.0)
        l1 = F.l1_loss(fake, y)
        return {
            "loss": adversarial + self.l1_weight * l1,
            "l1": l1.detach(),
            "adversarial": adversarial.detach(),
        }

    def discriminator_loss(self, x: Tensor, y: Tensor, fake: Tensor) -> Tensor:
        """loss_D of D's step; `fake` is detached here, so G gets no gradient from it."""
        real = self._logits(torch.cat([x, y], dim=1))
        generated = self._logits(torch.cat([x, fake.detach()], dim=1))
        return 0.5 * (_bce(real, 1.0) + _bce(generated, 0.0))

    def _logits(self, pair: Tensor) -> Tensor:
        return self.discriminator(pair, logits=True)


Objective = L1Objective | MSEObjective | GANObjective


def _bce(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


@contextmanager
def _no_parameter_gradients(net: nn.Module) -> Iterator[None]:
    """Gradients flow through `net` but none is computed for its own parameters."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
