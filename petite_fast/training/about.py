"""What `petite-fast info` says: versions, backends, devices; recipes and what they train."""

from __future__ import annotations

import importlib.util
import platform
from typing import NamedTuple

import torch

from petite_fast import settings
from petite_fast._version import __version__
from petite_fast.backends import native
from petite_fast.models import build_network
from petite_fast.models.published import Network
from petite_fast.peft.mix import recipes
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


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "/".join(map(str, value)) or "none"
    return str(value)
