"""Putting adapters into a network, in place, and taking them out again.

Everything that can be refused is refused while the plan is made; carrying it out changes classes
and adds tensors to modules, so names, hooks and references to modules survive.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.nn.frozen import FrozenConv3d, FrozenConvTranspose3d, freeze
from petite_fast.nn.lora import LoRAConv3d, LoRAConvTranspose3d, LoRALayer, LoRALinear
from petite_fast.nn.norm import FrozenBatchNorm3d
from petite_fast.peft.config import (
    AnyConfig,
    BitFitConfig,
    LoraConfig,
    MixConfig,
    PromptConfig,
    Targets,
)

_LORA: dict[type[nn.Module], type[LoRALayer]] = {
    cls.torch_class: cls for cls in (LoRAConv3d, LoRAConvTranspose3d, LoRALinear)
}
_TWINS: dict[type[nn.Module], Any] = {
    cls.torch_class: cls for cls in (FrozenConv3d, FrozenConvTranspose3d, FrozenBatchNorm3d)
}
_Inside = Callable[[str], bool]


@dataclass
class Plan:
    """What will change: LoRA per module, biases that train, prompts per stage."""

    lora: dict[str, LoraConfig] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    prompts: dict[str, nn.Module] = field(default_factory=dict)


@dataclass
class Injection:
    """What has changed, by name, and what it takes to change it back."""

    lora: list[str]
    prompts: list[str]
    twins: list[str]
    tensors: list[str]
    """Everything that belongs to an adapter: trained biases, lora_A, lora_B, the prompts' state."""
    requires_grad: dict[str, bool]
    """Of the base network's parameters, before."""


def tensor(net: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(net.get_submodule(path), leaf))


def make_plan(net: nn.Module, config: AnyConfig) -> Plan:
    """What `config` means for `net`. Changes nothing.

    Raises:
        InputError: a target that matches nothing, or a module that the method cannot adapt; a mix
            for a network that does not say what its encoder and decoder are.
        TypeError: `config` is not a config.
    """
    plan = Plan()
    if not isinstance(config, MixConfig):
        _add(plan, net, config, lambda name: True, "")
        return plan
    for side, part in (("encoder", config.encoder), ("decoder", config.decoder)):
        if part is None:
            continue
        pattern = getattr(net, f"peft_{side}", None)
        if pattern is None:
            raise InputError(
                f"{type(net).__name__} does not say which modules are its {side}, expected a class "
                f"attribute peft_{side} with a pattern for their names"
            )
        _add(plan, net, part, re.compile(pattern).match, f" in the {side}")  # type: ignore[arg-type]
    if config.bitfit:
        _add(plan, net, BitFitConfig(), lambda name: True, "")
    return plan


def _add(plan: Plan, net: nn.Module, config: Any, inside: _Inside, where: str) -> None:
    if isinstance(config, LoraConfig):
        for name in _lora_targets(net, config.target_modules, inside, where):
            plan.lora[name] = config
    elif isinstance(config, BitFitConfig):
        found = _biases(net, config.target_modules, inside, where)
        plan.biases += [name for name in found if name not in plan.biases]
    elif isinstance(config, PromptConfig):
        for name, count in _prompt_stages(net, config, inside, where).items():
            plan.prompts[name] = net.get_submodule(name).make_prompt(count)  # type: ignore[operator]
    else:
        raise TypeError(f"config: got {type(config).__name__}, wanted a petite_fast config")


def carry_out(net: nn.Module, plan: Plan) -> Injection:
    """Freeze `net`, adapt what `plan` names, make every other frozen layer lean."""
    requires_grad = {
        name: p.requires_grad for name, p in net.named_parameters(remove_duplicate=False)
    }
    freeze(net)
    for name, config in plan.lora.items():
        module = net.get_submodule(name)
        _LORA[type(module)].convert_(
            module,
            config.r,
            config.lora_alpha,
            lora_dropout=config.lora_dropout,
            train_a=config.train_a,
        )
    twins = []
    for name, module in net.named_modules():
        if name and type(module) in _TWINS and _can_be_lean(module):
            _TWINS[type(module)].convert_(module)
            twins.append(name)
    for name in plan.biases:
        tensor(net, name).requires_grad_(True)
    for name, prompt in plan.prompts.items():
        net.get_submodule(name).prompt = prompt
    owned = list(plan.biases)
    owned += [f"{name}.{leaf}" for name in plan.lora for leaf in ("lora_A", "lora_B")]
    owned += [
        f"{name}.prompt.{leaf}"
        for name, prompt in plan.prompts.items()
        for leaf in prompt.state_dict()
    ]
    return Injection(list(plan.lora), list(plan.prompts), twins, owned, requires_grad)


def take_out(net: nn.Module, injection: Injection, merge: bool) -> None:
    """Make every layer torch's own again, with the `requires_grad` it had.

    Args:
        net: the network.
        injection: what was done to it.
        merge: fold LoRA into the weights and leave the prompts, frozen; False drops both.
    """
    for name in injection.lora:
        module = cast(LoRALayer, net.get_submodule(name))
        if merge:
            # A new tensor: the old one may be shared with another module.
            module.weight = nn.Parameter(module.effective_weight())
        for leaf in ("lora_A", "lora_B"):
            delattr(module, leaf)
        for leaf in ("r", "lora_alpha", "scaling", "lora_dropout", "train_a", "_folded"):
            module.__dict__.pop(leaf, None)
        module.__class__ = module.torch_class  # type: ignore[assignment]
    for name in injection.twins:
        twin = net.get_submodule(name)
        twin.__class__ = twin.torch_class  # type: ignore[assignment]
        twin.training = net.training
    for name in injection.prompts:
        stage: Any = net.get_submodule(name)
        if merge:
            freeze(stage.prompt)
        else:
            stage.prompt = None
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(injection.requires_grad.get(name, False))


def _named(net: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """{every dotted name: (first name of that module, module)}, the network itself left out.

    A module in two places has two names; patterns see both, the first one is used.
    """
    first = {id(module): name for name, module in net.named_modules()}
    return {
        name: (first[id(module)], module)
        for name, module in net.named_modules(remove_duplicate=False)
        if name
    }


def _matcher(targets: Targets, what: str) -> _Inside:
    """Hugging Face PEFT's rule: a string matches the whole name, a list names or endings."""
    if targets is None:
        return lambda name: True
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(f"{what} {targets!r} is not a regular expression: {error}") from None
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(name == target or name.endswith("." + target) for target in targets)


def _no_match(targets: Any, what: str, where: str, names: list[str]) -> InputError:
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return InputError(
        f"{what} {targets!r} matches no module{where}; names there are: {some or 'none'}"
    )


def _lora_targets(net: nn.Module, targets: Targets, inside: _Inside, where: str) -> list[str]:
    matches = _matcher(targets, "target_modules")
    named = {name: entry for name, entry in _named(net).items() if inside(name)}
    found: dict[str, None] = {}
    for name, (first, module) in named.items():
        if not matches(name):
            continue
        able = type(module) in _LORA and "weight" in module._parameters
        if not able and targets is not None:
            kinds = ", ".join(cls.__name__ for cls in _LORA)
            raise InputError(
                f"target_modules {targets!r} matches {name!r}, a {type(module).__name__}; "
                f"LoRA adapts torch's own {kinds}"
            )
        if able and not _unused(net, f"{name}.weight"):
            found[first] = None
    if not found:
        able_names = [name for name, (_, module) in named.items() if type(module) in _LORA]
        raise _no_match(targets, "target_modules", where, able_names)
    return list(found)


def _biases(net: nn.Module, targets: Targets, inside: _Inside, where: str) -> list[str]:
    matches = _matcher(targets, "target_modules")
    owners = [
        name.removesuffix(".bias")
        for name, _ in net.named_parameters()
        if name.endswith(".bias") and not _unused(net, name) and inside(name)
    ]
    found = [f"{owner}.bias" for owner in owners if matches(owner)]
    if not found:
        raise _no_match(targets, "target_modules of the biases", where, owners)
    return found


def _prompt_stages(
    net: nn.Module, config: PromptConfig, inside: _Inside, where: str
) -> dict[str, int]:
    named = {name: entry for name, entry in _named(net).items() if inside(name)}
    stages: dict[str, int] = {}
    for pattern, count in config.num_prompts.items():
        matches = _matcher(pattern, "num_prompts")
        hits = [name for name in named if matches(name)]
        if not hits:
            able = [name for name, (_, module) in named.items() if hasattr(module, "make_prompt")]
            raise _no_match(pattern, "num_prompts", where, able)
        for name in hits:
            first, module = named[name]
            if not hasattr(module, "make_prompt"):
                raise InputError(
                    f"num_prompts {pattern!r} matches {name!r}, a {type(module).__name__}, which "
                    "takes no prompts (it has no make_prompt): prompts go into transformer stages"
                )
            if stages.setdefault(first, count) != count:
                raise InputError(f"num_prompts gives {first!r} both {stages[first]} and {count}")
    return {name: count for name, count in stages.items() if count}


def _unused(net: nn.Module, parameter: str) -> bool:
    """Whether the network says that this parameter is never in its graph."""
    pattern = getattr(net, "peft_unused", None)
    return pattern is not None and re.match(pattern, parameter) is not None


def has_adapter(module: nn.Module) -> bool:
    """Whether this very module holds LoRA or a prompt."""
    has_prompt = hasattr(module, "make_prompt") and getattr(module, "prompt", None) is not None
    return has_prompt or isinstance(module, LoRALayer)


def _can_be_lean(module: nn.Module) -> bool:
    """A norm without running statistics cannot; nor a weight that a hook computes."""
    if isinstance(module, nn.BatchNorm3d):
        return module.running_mean is not None and module.running_var is not None
    return "weight" in module._parameters
