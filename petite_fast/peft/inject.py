"""Putting adapters into a network, in place, and taking them out again.

Everything that can be refused is refused while the plan is made; carrying it out changes classes
and adds tensors to modules, so names, hooks and references to modules survive.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.nn.adapted import AdaptedLayer
from petite_fast.nn.adapter import BottleneckAdapter
from petite_fast.nn.frozen import freeze
from petite_fast.peft import lean
from petite_fast.peft.config import AnyConfig, BitFitConfig, MixConfig
from petite_fast.peft.match import Scope
from petite_fast.peft.methods import Site, find_sites
from petite_fast.peft.methods.lora import LoraSite
from petite_fast.peft.methods.prompt import takes_prompts


@dataclass
class Injection:
    """What has changed, and what it takes to change it back."""

    sites: list[Site]
    layers: list[str]
    """Layers that became lean."""
    twins: list[str]
    """Modules that got a lean `Twin` in front."""
    tensors: list[str]
    """Everything that belongs to an adapter: trained parameters of the base, adapter tensors."""
    aliases: dict[str, list[str]]
    """Other names of the same tensors."""
    requires_grad: dict[str, bool]
    """Of the base network's parameters, before."""

    @property
    def lora(self) -> list[str]:
        """Names of the layers with LoRA."""
        return [site.name for site in self.sites if isinstance(site, LoraSite)]


def tensor(net: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(net.get_submodule(path), leaf))


def make_plan(net: nn.Module, config: AnyConfig, crossing: Collection[str] = ()) -> list[Site]:
    """Where `config` adapts `net`, and how. Changes nothing.

    Args:
        net: the network.
        config: what to adapt.
        crossing: LoRA layers in Hugging Face PEFT's form for grouped convolutions.

    Raises:
        InputError: a target that matches nothing, or a module that the method cannot adapt; a mix
            for a network whose encoder and decoder nobody names.
        TypeError: `config` is not a config.
    """
    whole = Scope.whole(net)
    if not isinstance(config, MixConfig):
        sites = find_sites(config, whole)
    else:
        sites = []
        for side in ("encoder", "decoder"):
            part = getattr(config, side)
            if part is not None:
                sites += find_sites(part, _half(whole, config, side))
        if config.bitfit:
            sites += find_sites(BitFitConfig(), whole)
    unique: dict[tuple[type, str], Site] = {}
    for site in sites:  # a bias may be named by BitFit in a half and by `bitfit`
        unique.setdefault((type(site), site.name), site)
        if isinstance(site, LoraSite):
            site.crossing = site.name in crossing
    return list(unique.values())


def _half(whole: Scope, config: MixConfig, side: str) -> Scope:
    pattern = getattr(config, f"{side}_modules") or getattr(whole.parts, side)
    if pattern is None:
        raise InputError(
            f"{type(whole.net).__name__} does not say which modules are its {side}, expected "
            f"{side}_modules in MixConfig or a class attribute peft_{side} with a pattern for "
            "their names"
        )
    return Scope(whole.net, whole.parts, re.compile(pattern), f" in the {side}")


def carry_out(net: nn.Module, plan: list[Site], memory: lean.Memory = "exact") -> Injection:
    """Freeze `net`, adapt what `plan` names, make everything else lean."""
    requires_grad = {
        name: p.requires_grad for name, p in net.named_parameters(remove_duplicate=False)
    }
    freeze(net)
    # Trained parameters of the base come last: an adapted layer freezes its own.
    plan = sorted(plan, key=lambda site: site.name in requires_grad)
    for site in plan:
        if site.name not in requires_grad:
            site.put_in(net)
    frozen = lean.freeze_layers(net)
    for site in plan:
        if site.name in requires_grad:
            site.put_in(net)
    layers, twins = lean.make_lean(net, memory)
    return Injection(
        plan,
        frozen + layers,
        twins,
        [name for site in plan for name in site.tensors(net)],
        {key: others for site in plan for key, others in site.aliases().items() if others},
        requires_grad,
    )


def take_out(net: nn.Module, injection: Injection, merge: bool) -> None:
    """Make every layer torch's own again, with the `requires_grad` it had.

    Args:
        net: the network.
        injection: what was done to it.
        merge: fold what can be folded into the weights and leave the rest (prompts, bottleneck
            adapters), frozen; False drops everything.
    """
    lean.undo(net, injection.layers, injection.twins)
    for site in reversed(injection.sites):
        site.take_out(net, merge)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(injection.requires_grad.get(name, False))


def has_adapter(module: nn.Module) -> bool:
    """Whether this very module holds an adapter of any kind."""
    has_prompt = takes_prompts(module) and getattr(module, "prompt", None) is not None
    return has_prompt or isinstance(module, (AdaptedLayer, BottleneckAdapter))


def require_bare(net: nn.Module) -> None:
    """Refuse what is not a network, hides one, or is adapted already.

    Raises:
        TypeError: not a module, or a compiled or wrapped one.
        ValueError: it has adapters.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: got {type(net).__name__}, wanted a torch.nn.Module")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    if isinstance(net, wrappers) or hasattr(net, "_orig_mod"):
        raise TypeError(
            f"net: got a {type(net).__name__}, wanted the network itself: adapt it before it is "
            "compiled or wrapped"
        )
    if any(hasattr(m, "_peft") or has_adapter(m) for m in net.modules()):
        raise ValueError(
            f"{type(net).__name__} has adapters already: load_adapter and add_adapter put another "
            "into it, and a merged network keeps its prompts"
        )
