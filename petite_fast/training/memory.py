"""What a training step takes in memory, and the largest patch that a budget has room for.

Nothing is measured and nothing is allocated: the step runs on tensors without memory (`ledger`),
so the answer holds for whatever network, adapters and memory mode there are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from petite_fast.errors import InputError
from petite_fast.ops.memory import saved_storages, storage_key
from petite_fast.training.ledger import Ledger, without_memory
from petite_fast.training.objectives import Objective
from petite_fast.training.scans import check_patch

logger = logging.getLogger("petite_fast")

LARGEST_SIDE = 512
"""Where the search for a patch ends, in voxels."""
LARGEST_BATCH = 8
"""Where the search for a batch ends: the batch that finetune has without a budget."""

_OPTIMISERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_NOT_POSSIBLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step, on one device.

    Attributes:
        patch, batch: of the input.
        parameter_bytes: parameters and buffers, trained or not; a discriminator's too.
        optimiser_bytes: state of the optimiser, for the trained parameters.
        gradient_bytes: gradients of the trained parameters, when all are there.
        activation_bytes: what autograd keeps between forward and backward, as `saved_bytes`.
        workspace_bytes: the most that everything else in the step takes at once: the batch, values
            and gradients on their way from layer to layer, effective weights, casts, the copies
            that CPU convolutions work on.
        step_bytes: the most that activations, gradients and workspace take at once; less than their
            sum, as each has its largest moment at another time.
    """

    patch: tuple[int, ...]
    batch: int
    parameter_bytes: int
    optimiser_bytes: int
    gradient_bytes: int
    activation_bytes: int
    workspace_bytes: int
    step_bytes: int

    @property
    def total(self) -> int:
        """The peak: parameters, optimiser and the step."""
        return self.parameter_bytes + self.optimiser_bytes + self.step_bytes


class Fit(NamedTuple):
    """The patch and the batch that a budget has room for, and what they take."""

    patch: tuple[int, ...]
    batch: int
    estimate: MemoryEstimate


def estimate(
    net: nn.Module,
    patch: Sequence[int],
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    optimiser: str = "adamw",
    channels: int = 1,
    objective: Objective | None = None,
    device: str | torch.device | None = None,
) -> MemoryEstimate:
    """Memory of one training step (forward, backward, optimiser) of `net` in training mode.

    Every tensor that PyTorch allocates is counted when it is made and when it is freed, in the
    second step of a run (the optimiser's state is there, gradients are not). Not counted: the
    interpreter and the libraries, fragmentation, and on a GPU what cuDNN takes for itself.

    Args:
        net: any network, with or without adapters, also on the meta device. It is not touched. Of a
            network without values (meta), the numbers per channel that an op looks at are taken as
            ones.
        patch: sides of the input in voxels.
        batch: samples per step.
        dtype: that of the parameters, or a lower one for mixed precision (autocast).
        optimiser: "adamw" (two moments per trained parameter) or "sgd" (none).
        channels: of the input.
        objective: what the loss is; None: none, backward starts from the output.
        device: where the step runs, which decides on kernels; None is where the network is, and for
            the meta device what training would take.

    Raises:
        InputError: a batch below 1, nothing trains, or an op cannot run without values.
        ValueError: unknown `optimiser`, or the network refuses the patch.
    """
    if optimiser not in _OPTIMISERS:
        raise ValueError(f"optimiser is {optimiser!r}, wanted one of {', '.join(_OPTIMISERS)}")
    if batch < 1:
        raise InputError(f"batch is {batch}, expected at least 1")
    if not any(p.requires_grad for p in net.parameters()):
        raise InputError("nothing trains in this network, so no step of it can be estimated")
    judge = None if objective is None else objective.discriminator
    modules = [net] if judge is None else [net, judge]
    place = torch.device(device) if device is not None else _device_of(net)
    ledger = Ledger()
    twin, goal = without_memory((net, objective), modules, ledger, place)
    parts = [twin] if judge is None else [twin, goal.discriminator]
    size = (batch, channels, *patch)
    try:
        with torch.random.fork_rng(devices=[]), ledger:
            step = _Step(twin.train(), goal, optimiser, place, dtype)
            step.first()
            ledger.start([t for m in parts for t in _state(m)] + step.optimiser_state())
            kept, activation_bytes = step.forward(size, ledger)
            gradients = step.backward(ledger)
            step.update()
    except _NOT_POSSIBLE as error:
        raise InputError(
            f"the memory of {type(net).__name__} cannot be estimated: an op of it needs values to "
            f"know its result ({error})"
        ) from error
    return MemoryEstimate(
        patch=tuple(patch),
        batch=batch,
        parameter_bytes=_bytes(t for m in modules for t in _state(m)),
        optimiser_bytes=_bytes(step.optimiser_state()),
        gradient_bytes=_bytes(step.trained),  # of the same shapes and dtypes
        activation_bytes=activation_bytes,
        workspace_bytes=ledger.peak(without=kept | gradients),
        step_bytes=ledger.peak(),
    )


class _Step:
    """One step of training, as `loop` makes it, on tensors without memory."""

    def __init__(
        self,
        net: nn.Module,
        objective: Objective | None,
        optimiser: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.net, self.objective, self.device = net, objective, device
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.optimiser = _OPTIMISERS[optimiser](self.trained, lr=1e-3)
        self.own = next(p.dtype for p in net.parameters() if p.is_floating_point())
        self.autocast: Any = contextlib.nullcontext()
        if dtype != self.own:
            self.autocast = torch.autocast(device.type, dtype)

    def first(self) -> None:
        """Make the optimiser's state."""
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.update()

    def update(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()

    def optimiser_state(self) -> list[Tensor]:
        states = self.optimiser.state.values()
        return [t for state in states for t in state.values() if isinstance(t, Tensor)]

    def forward(self, size: Sequence[int], ledger: Ledger) -> tuple[set[int], int]:
        """The loss; what of the booked is kept for backward, and the bytes of all that is kept."""
        self.x = torch.empty(size, dtype=self.own, device=self.device)
        target = None if self.objective is None else torch.empty_like(self.x)
        self.loss, kept = saved_storages(lambda: self._loss(target))
        return ledger.numbers(kept), sum(storage.nbytes() for storage in kept)

    def _loss(self, target: Tensor | None) -> Tensor:
        with self.autocast:
            self.y = self.net(self.x)
            if self.objective is None or target is None:
                return self.y
            return self.objective.generator_losses(self.x, target, self.y)["loss"]

    def backward(self, ledger: Ledger) -> set[int]:
        """What of the booked are gradients of parameters."""
        self.loss.backward(torch.ones_like(self.loss))
        grads = [p.grad.untyped_storage() for p in self.trained if p.grad is not None]
        return ledger.numbers(grads)


def largest_patch(
    build: Callable[[tuple[int, ...]], nn.Module],
    budget_bytes: int,
    batch: int | None = None,
    multiple: int = 16,
    *,
    smallest: int = 16,
    largest: int = LARGEST_SIDE,
    smallest_batch: int = 1,
    **options: Any,
) -> Fit:
    """The largest cubic patch whose step fits into a budget, then the largest batch of it.

    Found by bisection, as more voxels take more memory. The exception, where a larger patch than
    the one found could fit, are PyTorch's own convolutions on a CPU at batch 1 and a few voxels.

    Args:
        build: the network for a patch.
        budget_bytes: what `MemoryEstimate.total` may be.
        batch: samples per step; None: the patch is found with `smallest_batch`, and the batch is
            then raised as far as the budget goes, to 8 at most.
        multiple: the sides are multiples of it.
        smallest, largest: shortest and longest side that come into question.
        smallest_batch: the batch that a patch must at least have room for.
        options: further keywords of `estimate`.

    Raises:
        InputError: not even the smallest patch fits.
    """

    def of(step: int) -> MemoryEstimate:
        sides = (step * multiple,) * 3
        return estimate(build(sides), sides, batch or smallest_batch, **options)

    first = max(1, smallest // multiple)
    found = _last_that_fits(of, first, max(first, largest // multiple), budget_bytes)
    if batch is None and found.total <= budget_bytes:
        return largest_batch(build, budget_bytes, found.patch, smallest_batch, **options)
    return _fit(found, budget_bytes)


def largest_batch(
    build: Callable[[tuple[int, ...]], nn.Module],
    budget_bytes: int,
    patch: Sequence[int],
    smallest_batch: int = 1,
    **options: Any,
) -> Fit:
    """The largest batch, 8 at most, whose step with this patch fits into a budget.

    Args:
        build, budget_bytes, smallest_batch, options: as of `largest_patch`.
        patch: sides in voxels.

    Raises:
        InputError: not even `smallest_batch` fits.
    """
    net = build(tuple(patch))
    found = _last_that_fits(
        lambda batch: estimate(net, patch, batch, **options),
        smallest_batch,
        LARGEST_BATCH,
        budget_bytes,
    )
    return _fit(found, budget_bytes)


@dataclass(frozen=True)
class Budget:
    """Memory that a training may take, and the batch if that is settled.

    Attributes:
        bytes: what `MemoryEstimate.total` may be.
        batch: samples per step; None: as many as there is room for, 8 at most.
    """

    bytes: int
    batch: int | None = None

    def choose(
        self,
        net: nn.Module,
        patch: Sequence[int] | None,
        *,
        precision: str,
        objective: Objective,
        smallest: int,
        largest: int,
        smallest_batch: int,
    ) -> tuple[tuple[int, ...], int]:
        """Patch and batch for the training of `net`, where training would run; they are logged.

        Args:
            net: the network, its adapters in place.
            patch: sides in voxels, multiples of 16; None: the largest cube there is room for.
            precision: of the training.
            objective: of the training.
            smallest: shortest side of a cube that the network trains with, a multiple of 16.
            largest: side that the cube need not exceed, rounded up to a multiple of 16.
            smallest_batch: the batch that the network needs, unless the batch is settled.

        Raises:
            InputError: there is no room, or the patch is not three multiples of 16.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options: dict[str, Any] = {
            "dtype": _DTYPES[precision], "objective": objective, "device": device
        }  # fmt: skip
        if patch is None:
            fit = largest_patch(
                lambda _: net,
                self.bytes,
                self.batch,
                smallest=smallest,
                largest=-(-largest // 16) * 16,
                smallest_batch=smallest_batch,
                **options,
            )
        elif self.batch is None:
            check_patch(patch)
            fit = largest_batch(lambda _: net, self.bytes, patch, smallest_batch, **options)
        else:
            check_patch(patch)
            fit = _fit(estimate(net, patch, self.batch, **options), self.bytes)
        logger.info(
            "budget of %s: patch %s, batch %d, %s",
            readable(self.bytes), "x".join(map(str, fit.patch)), fit.batch,
            readable(fit.estimate.total),
        )  # fmt: skip
        return fit.patch, fit.batch


def _last_that_fits(
    of: Callable[[int], MemoryEstimate], low: int, high: int, budget: int
) -> MemoryEstimate:
    """Estimate of the largest number in [low, high] that fits, by bisection; of low if none."""
    best = of(low)
    while best.total <= budget and low < high:
        middle = (low + high + 1) // 2
        tried = of(middle)
        if tried.total <= budget:
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def _fit(found: MemoryEstimate, budget: int) -> Fit:
    if found.total > budget:
        raise InputError(
            f"patch {'x'.join(map(str, found.patch))} with batch {found.batch} takes "
            f"{readable(found.total)}, more than the budget of {readable(budget)}"
        )
    return Fit(found.patch, found.batch, found)


def readable(size: int) -> str:
    """Bytes as text, in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _device_of(net: nn.Module) -> torch.device:
    device = next(net.parameters()).device
    if device.type != "meta":
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage_key(s): s.nbytes() for s in storages}.values())
