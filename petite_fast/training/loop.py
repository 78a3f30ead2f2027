"""The one training loop, for pretraining and for fine-tuning, on Lightning Fabric.

Fabric gives the device, mixed precision and the process group (``torchrun`` and Slurm start
several processes, each works on its own samples and gradients are averaged). Everything that a
reader wants to check about training is here: what is optimised, with what, on which samples.

The samples of step k are a function of k and the dataset's seed alone, so the sampler's position
is the step.
"""

from __future__ import annotations

import logging
import math
import os
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins import Precision as Precision32
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from petite_fast.errors import InputError
from petite_fast.training import checkpoint
from petite_fast.training.interrupt import StopSignal, TrainingInterrupted
from petite_fast.training.logs import RunLog
from petite_fast.training.objectives import GANObjective, Objective

logger = logging.getLogger("petite_fast")

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class Samples(Protocol):
    """What the loop needs of a dataset."""

    def __len__(self) -> int:
        """Samples per epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next samples are of."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"input", "target"} [1, X, Y, Z], a function of (epoch, index) alone."""


@dataclass(frozen=True)
class TrainSettings:
    """How long and how to train.

    Attributes:
        out: run folder: log.csv, tensorboard/, checkpoints/.
        steps: optimiser steps in all; the cosine schedule ends at lr 0 there.
        batch: samples per step and process.
        lr, weight_decay: AdamW's; published 1e-3 and 1e-5.
        precision: "32-true", "bf16-mixed" or "16-mixed" (with loss scaling).
        seed: of the samples, dropout and everything else random in the run.
        save_every: steps between checkpoints.
        resume: "auto" (newest checkpoint, none is fine), "never", or a checkpoint.
    """

    out: Path
    steps: int
    batch: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-5
    precision: Precision = "32-true"
    seed: int = 42
    save_every: int = 100
    resume: checkpoint.Resume = "auto"

    def config(self) -> dict[str, Any]:
        """The settings that decide the result, hence must not change on resume."""
        names = ("steps", "batch", "lr", "weight_decay", "precision", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class TrainReport:
    """What a run did.

    Attributes:
        first_step: steps already done when it started (0, or the checkpoint's).
        steps: steps done in all.
        rows: one dict of numbers per step trained now (loss, l1, ..., lr, seconds).
        trainable, parameters: counts of the generator.
        step_seconds: median time of one optimiser step after warm-up, loading excluded.
    """

    first_step: int
    steps: int
    trainable: int
    parameters: int
    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Median seconds of one step, the first tenth (at least two steps) left out."""
        times = [row["seconds"] for row in self.rows]
        warm = min(max(2, len(times) // 10), max(len(times) - 1, 0))
        return statistics.median(times[warm:]) if times else 0.0

    @property
    def trainable_percent(self) -> float:
        """Share of the generator's parameters that were trained, in percent."""
        return 100.0 * self.trainable / self.parameters


def train(
    generator: nn.Module,
    objective: Objective,
    samples: Samples,
    settings: TrainSettings,
    *,
    config: dict[str, Any] | None = None,
    known: Iterable[str] = (),
    title: str = "training",
) -> TrainReport:
    """Train `generator` in place (and the objective's discriminator, if it trains one).

    AdamW over the parameters that require gradients, no others; cosine learning rate for both
    networks; checkpoints every ``save_every`` steps and at the end.

    Args:
        generator: network on [N, 1, X, Y, Z]; frozen parameters stay as they are.
        objective: L1Objective or GANObjective.
        samples: the training samples.
        settings: see TrainSettings.
        config: anything else that decides the result (recipe, base sha256, data): JSON-able,
            saved in every checkpoint and compared on resume.
        known: names of frozen parameters that come from the base file and need not be saved.
        title: words before the progress bar.

    Raises:
        InputError: nothing is trainable, there is no data, the loss is not finite (the step is
            named), or the checkpoint to resume does not fit.
        TrainingInterrupted: Ctrl-C or SIGTERM; the last completed step is saved.
        OSError: a checkpoint cannot be written; the one before is intact.
    """
    _check(generator, samples, settings)
    run = _Run(generator, objective, settings, config or {}, frozenset(known))
    run.seed()
    first_step = run.resume()
    report = TrainReport(
        first_step=first_step,
        steps=first_step,
        trainable=sum(p.numel() for p in generator.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in generator.parameters()),
    )
    logger.info(
        "%s: %d of %d parameters train (%.3f %%), steps %d to %d on %s, %s",
        title, report.trainable, report.parameters, report.trainable_percent,
        first_step + 1, settings.steps, run.fabric.device, settings.precision,
    )  # fmt: skip
    log_folder = settings.out if run.fabric.is_global_zero else None
    with (
        StopSignal() as stop,
        RunLog(log_folder, first_step, settings.steps, title) as log,
    ):
        for step in range(first_step + 1, settings.steps + 1):
            batch = run.batch(samples, step)
            row = run.step(step, *batch)
            report.rows.append(row)
            report.steps = step
            log.write(step, row)
            due = step % settings.save_every == 0 or step == settings.steps
            if due or stop.received:
                run.save(step)
            if stop.received and step < settings.steps:
                raise TrainingInterrupted(
                    f"stopped after step {step} of {settings.steps}; the same command with "
                    "--resume auto goes on from there"
                )
    logger.info("%s: median step %.4f s", title, report.step_seconds)
    return report


class _Run:
    """The moving parts of one run: networks, optimisers, schedules, and their state on disk."""

    def __init__(
        self,
        generator: nn.Module,
        objective: Objective,
        settings: TrainSettings,
        config: dict[str, Any],
        known: frozenset[str],
    ) -> None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # The plugin by hand: asked for "16-mixed" on a CPU, Fabric would take bfloat16 instead.
        precision = (
            Precision32()
            if settings.precision == "32-true"
            else MixedPrecision(settings.precision, device)
        )
        self.fabric = lightning_fabric.Fabric(
            accelerator=device,
            devices=processes,
            num_nodes=int(os.environ.get("WORLD_SIZE", processes)) // processes,
            plugins=[precision],
        )
        self.fabric.launch()
        self.precision = precision
        self.settings, self.objective = settings, objective
        self.config = {**config, **settings.config()}
        self.folder = settings.out / "checkpoints"
        self.networks: dict[str, nn.Module] = {"generator": self.fabric.to_device(generator)}
        discriminator = objective.discriminator
        if discriminator is not None:
            discriminator = self.fabric.to_device(discriminator)
            if objective.trains_discriminator:
                self.networks["discriminator"] = discriminator
        self.skip = {"generator": known, "discriminator": frozenset[str]()}
        self.trained: dict[str, dict[str, nn.Parameter]] = {}
        self.optimizers: dict[str, Any] = {}
        self.schedules: dict[str, CosineAnnealingLR] = {}
        for name, net in self.networks.items():
            self.trained[name] = {n: p for n, p in net.named_parameters() if p.requires_grad}
            optimizer = AdamW(
                self.trained[name].values(), lr=settings.lr, weight_decay=settings.weight_decay
            )
            self.schedules[name] = CosineAnnealingLR(optimizer, T_max=settings.steps)
            self.optimizers[name] = self.fabric.setup_optimizers(optimizer)
            net.train()

    def seed(self) -> None:
        seed = self.settings.seed + self.fabric.global_rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def batch(self, samples: Samples, step: int) -> tuple[Tensor, Tensor]:
        """(input, target) [N, 1, X, Y, Z] of `step`, on the device."""
        fabric, size = self.fabric, self.settings.batch
        first = ((step - 1) * fabric.world_size + fabric.global_rank) * size
        chosen = []
        for number in range(first, first + size):
            epoch, index = divmod(number, len(samples))
            samples.set_epoch(epoch)
            chosen.append(samples[index])
        x = torch.stack([sample["input"] for sample in chosen])
        y = torch.stack([sample["target"] for sample in chosen])
        return fabric.to_device(x), fabric.to_device(y)

    def step(self, step: int, x: Tensor, y: Tensor) -> dict[str, float]:
        """One step of G, then of D when it trains; one forward of G serves both."""
        start = time.perf_counter()
        lr = self.schedules["generator"].get_last_lr()[0]
        with self.fabric.autocast():
            fake = self.networks["generator"](x)
            losses = self.objective.generator_losses(x, y, fake)
        self._update("generator", losses["loss"], step)
        if isinstance(self.objective, GANObjective) and self.objective.trains_discriminator:
            with self.fabric.autocast():
                losses["loss_d"] = self.objective.discriminator_loss(x, y, fake)
            self._update("discriminator", losses["loss_d"], step)
        row = {name: value.item() for name, value in losses.items()}
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return row | {"lr": float(lr), "seconds": seconds}

    def _update(self, name: str, loss: Tensor, step: int) -> None:
        if not math.isfinite(loss.item()):
            raise InputError(self._not_finite(f"the {name}'s loss is {loss.item()}", step))
        optimizer = self.optimizers[name]
        self.fabric.backward(loss)
        if self.fabric.world_size > 1:
            for p in self.trained[name].values():
                if p.grad is not None:
                    p.grad = self.fabric.all_reduce(p.grad, reduce_op="mean")  # type: ignore[assignment]
        optimizer.step()
        optimizer.zero_grad()
        self.schedules[name].step()

    def save(self, step: int) -> None:
        """Write the state after `step`; never one that has turned NaN or Inf."""
        for name, trained in self.trained.items():
            for parameter, value in trained.items():
                if not torch.isfinite(value).all():
                    raise InputError(self._not_finite(f"the {name}'s {parameter} is NaN", step))
        if not self.fabric.is_global_zero:
            return
        tensors, rng = checkpoint.rng_state()
        optimizers = {}
        for name, net in self.networks.items():
            tensors |= checkpoint.network_tensors(net, self.skip[name], f"{name}/")
            moments, optimizers[name] = checkpoint.optimizer_state(
                self.optimizers[name], list(self.trained[name]), f"adamw/{name}/"
            )
            tensors |= moments
        record = {
            "config": self.config,
            "rng": rng,
            "optimizers": optimizers,
            "schedules": {k: v.state_dict() for k, v in self.schedules.items()},
            "loss_scale": self.precision.state_dict(),
        }
        checkpoint.save_state(self.folder, step, tensors, record)

    def resume(self) -> int:
        """Restore the state to go on from; the number of steps it has done (0: a new run)."""
        found = checkpoint.find_resume(self.folder, self.settings.resume)
        if found is None:
            return 0
        tensors, record = checkpoint.load_state(found, self.config)
        for name, net in self.networks.items():
            checkpoint.restore_network(net, tensors, self.skip[name], f"{name}/")
            checkpoint.restore_optimizer(
                self.optimizers[name], list(self.trained[name]), f"adamw/{name}/",
                tensors, record["optimizers"][name],
            )  # fmt: skip
            self.schedules[name].load_state_dict(record["schedules"][name])
        self.precision.load_state_dict(record["loss_scale"])
        if self.fabric.world_size == 1:
            checkpoint.restore_rng(tensors, record["rng"])
        logger.info("resumed after step %d", record["step"])
        return int(record["step"])

    def _not_finite(self, what: str, step: int) -> str:
        kept = checkpoint.find_resume(self.folder, "auto")
        where = f"{kept.name} is kept" if kept else "no checkpoint was written yet"
        return (
            f"training stopped at step {step}: {what} ({where}); "
            "use a smaller --lr or another --precision"
        )


def _check(generator: nn.Module, samples: Samples, settings: TrainSettings) -> None:
    if not any(p.requires_grad for p in generator.parameters()):
        raise InputError(
            "nothing is trainable: every parameter of the generator is frozen; "
            "choose a recipe that trains something"
        )
    if len(samples) == 0:
        raise InputError("no training data: the chosen split has no subject")
    for name in ("steps", "batch", "save_every"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got "
                             f"{getattr(settings, name)}")  # fmt: skip
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise InputError(f"--lr must be a positive number, got {settings.lr}")
