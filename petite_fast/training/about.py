"""What `petite-fast info` says: versions, backends, devices; recipes and what they train."""

from __future__ import annotations

import importlib.util
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from petite_fast import settings
from petite_fast._version import __version__
from petite_fast.backends import native
from petite_fast.backends.triton import TUNED_OPS
from petite_fast.errors import InputError
from petite_fast.models import CVTGANDiscriminator, build_network
from petite_fast.models.published import Network
from petite_fast.ops import dispatch
from petite_fast.peft.lean import Memory
from petite_fast.peft.mix import recipes
from petite_fast.training import memory as step_memory
from petite_fast.training.objectives import GANObjective, MSEObjective, Objective
from petite_fast.training.scans import check_patch
from petite_fast.training.tasks import adapted


def describe() -> dict[str, str]:
    """{name: value} lines; never raises for a machine without GPU or native module."""
    found = {
        "petite_fast": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
    there, reason = native.available()
    if there:
        build = native.build_info()
        found["native"] = ", ".join(f"{key} {_words(value)}" for key, value in build.items())
    else:
        found["native"] = f"not available: {reason}"
    if not torch.cuda.is_available():
        found["native (CUDA)"] = "not available: PyTorch finds no GPU here"
    else:
        for i in range(torch.cuda.device_count()):
            there, reason = native.cuda_available(i)
            state = "available" if there else f"not available: {reason}"
            found[f"native (cuda:{i})"] = state
    triton = importlib.util.find_spec("triton")
    found["triton"] = "installed" if triton else "not installed"
    found["forced backend"] = settings.backend() or "none (the fastest that can run)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["devices"] = ", ".join(["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(names))])
    return found


class RecipeSize(NamedTuple):
    """What a recipe trains in the full-size network: parameters, and their share in percent."""

    recipe: str
    trainable: int
    percent: float


def recipe_sizes(network: Network) -> list[RecipeSize]:
    """Every recipe of a network with its defaults; the networks have no values, so it is quick.

    The share is that of the network without adapters.

    Raises:
        ImportError: "unetr", and MONAI is not installed.
    """
    rows = []
    for recipe in recipes(network):
        with torch.device("meta"):
            generator = build_network(network)
            total = sum(p.numel() for p in generator.parameters())
            generator = adapted(generator, network, recipe)
        trainable = sum(p.numel() for p in generator.parameters() if p.requires_grad)
        rows.append(RecipeSize(recipe, trainable, 100 * trainable / total))
    return rows


@dataclass(frozen=True)
class StepQuestion:
    """What does a step of fine-tuning the full-size network take, and what runs it?

    Attributes:
        network: "cvtgan", with the discriminator that judges, or "unetr".
        recipe: what trains, with its defaults.
        batch: patches per step.
        memory: how activations are kept; see `get_peft_model`.
    """

    network: Network
    recipe: str
    batch: int
    memory: Memory

    @property
    def title(self) -> str:
        """Words for a table's head."""
        return f"{self.network}, {self.recipe}, {self.memory}"

    def estimate(self, patch: Sequence[int]) -> step_memory.MemoryEstimate:
        """For patches of this size.

        Raises:
            InputError: no such recipe, or a patch that is not three multiples of 16.
            ImportError: "unetr", and MONAI is not installed.
        """
        check_patch(patch)
        generator = self._build(tuple(patch))
        return step_memory.estimate(generator, patch, self.batch, objective=self._objective())

    def largest(self, budget_bytes: int) -> str:
        """The largest cubic patch that a budget has room for, in words.

        Raises:
            InputError: not even the smallest fits.
            ImportError: "unetr", and MONAI is not installed.
        """
        fit = step_memory.largest_patch(
            self._build, budget_bytes, self.batch, objective=self._objective()
        )
        budget, taken = map(step_memory.readable, (budget_bytes, fit.estimate.total))
        sides = "x".join(map(str, fit.patch))
        return f"the largest patch with batch {fit.batch} in {budget} is {sides}: {taken}"

    def decisions(self, patch: Sequence[int]) -> Counter[dispatch.Decision]:
        """Which backend ran what in one step here (on the first GPU, if there is one).

        Raises:
            InputError: no such recipe, or a patch that is not three multiples of 16.
            ImportError: "unetr", and MONAI is not installed.
        """
        check_patch(patch)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self._decide(patch, device, None, torch.contiguous_format)

    def tune(self, patch: Sequence[int]) -> dict[str, Counter[dispatch.Decision]]:
        """Measure Triton against the library in such a step on the first GPU: who runs what now.

        One step in float32 and one under autocast to bfloat16, both channels_last_3d, which is what
        the Triton kernels take. What was measured before is not measured again.

        Returns:
            {title: decisions}, of the ops that have been measured.

        Raises:
            InputError: no GPU, a forced backend, no such recipe, or a patch that is not three
                multiples of 16.
            ImportError: "unetr", and MONAI is not installed.
        """
        if not torch.cuda.is_available():
            raise InputError("--tune measures on a GPU, and PyTorch finds none here")
        if forced := settings.backend():
            raise InputError(f"--tune compares backends, and PETITE_FAST_BACKEND is {forced!r}")
        check_patch(patch)
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        tables = {}
        try:
            for dtype in (None, torch.bfloat16):
                found = self._decide(patch, "cuda", dtype, torch.channels_last_3d)
                tuned = {d: calls for d, calls in found.items() if d.op in TUNED_OPS}
                tables[f"{self.title}, {'float32' if dtype is None else 'bfloat16'}"] = Counter(
                    tuned
                )
        finally:
            torch.backends.cudnn.benchmark = before
        return tables

    def _decide(
        self,
        patch: Sequence[int],
        device: str,
        dtype: torch.dtype | None,
        layout: torch.memory_format,
    ) -> Counter[dispatch.Decision]:
        generator = self._build(tuple(patch)).to_empty(device=device).train()
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.normal_(std=0.02)
        generator.to(memory_format=layout)  # type: ignore[call-overload]
        x = torch.randn(self.batch, 1, *patch, device=device).contiguous(memory_format=layout)
        with dispatch.explaining() as found:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                y = generator(x)
            y.float().square().mean().backward()
        return found

    def _build(self, patch: tuple[int, ...]) -> nn.Module:
        sizes: dict[str, Any] = {"img_size": patch} if self.network == "unetr" else {}
        with torch.device("meta"):
            generator = build_network(self.network, **sizes)
            return adapted(generator, self.network, self.recipe, memory=self.memory)

    def _objective(self) -> Objective:
        if self.network == "unetr":
            return MSEObjective()
        with torch.device("meta"):
            return GANObjective(CVTGANDiscriminator(), train_discriminator=False)


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "/".join(map(str, value)) or "none"
    return str(value)
