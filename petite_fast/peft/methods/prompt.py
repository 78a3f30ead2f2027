"""Prompts in transformer stages: channel prompts in CVT-GAN, token prompts in MONAI's ViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from petite_fast.errors import InputError
from petite_fast.nn import token_prompt
from petite_fast.nn.frozen import freeze
from petite_fast.peft.config import PromptConfig
from petite_fast.peft.match import Scope, matcher, no_match
from petite_fast.peft.methods.site import Site
from petite_fast.peft.networks import is_monai_vit


@dataclass
class PromptSite(Site):
    """One stage with prompts as its child `prompt`."""

    count: int
    config: PromptConfig

    def put_in(self, net: nn.Module) -> None:
        """Make the prompts and give them to the stage."""
        stage: Any = self.module(net)
        if is_monai_vit(stage):
            prompt = token_prompt.make_prompt_for(
                stage, self.count, deep=self.config.deep, gated=self.config.gated
            )
            token_prompt.convert_(stage, prompt)
        else:
            stage.prompt = stage.make_prompt(self.count, deep=self.config.deep)

    def tensors(self, net: nn.Module) -> list[str]:
        """Parameters and buffers of the prompts."""
        prompt = net.get_submodule(f"{self.name}.prompt")
        return [f"{self.name}.prompt.{leaf}" for leaf in prompt.state_dict()]

    def take_out(self, net: nn.Module, merge: bool) -> None:
        """Remove them; prompts cannot be folded, so with `merge` they stay, frozen."""
        stage: Any = self.module(net)
        if merge:
            freeze(stage.prompt)
        elif is_monai_vit(stage):
            token_prompt.release_(stage)
        else:
            stage.prompt = None


def takes_prompts(module: nn.Module) -> bool:
    """Whether `module` is a transformer stage that prompts can go into."""
    return hasattr(module, "make_prompt") or is_monai_vit(module)


def find(config: PromptConfig, scope: Scope) -> list[Site]:
    """The stages that `config` names, those with a count of 0 left out."""
    named = scope.modules()
    able = [name for name, (_, module) in named.items() if takes_prompts(module)]
    if not able:
        raise InputError(
            f"prompts are inputs of transformer stages, and there is none"
            f"{scope.where or ' in this network'} ({type(scope.net).__name__}): convolutions have "
            "no tokens to put prompts beside; use adapters, LoRA or SSF there"
        )
    counts: dict[str, int] = {}
    for pattern, count in config.num_prompts.items():
        matches = matcher(pattern, "num_prompts")
        hits = [name for name in named if matches(name)]
        if not hits:
            raise no_match(pattern, "num_prompts", scope.where, able)
        for name in hits:
            first, module = named[name]
            if not takes_prompts(module):
                raise InputError(
                    f"num_prompts {pattern!r} matches {name!r}, a {type(module).__name__}, which "
                    "takes no prompts (it has no make_prompt): prompts go into transformer stages"
                )
            if not config.gated and not is_monai_vit(module):
                raise InputError(
                    f"gated is false, but {name!r} takes channel prompts, which have no gate; "
                    "expected token prompts (MONAI's ViT)"
                )
            if counts.setdefault(first, count) != count:
                raise InputError(f"num_prompts gives {first!r} both {counts[first]} and {count}")
    return [PromptSite(name, count, config) for name, count in counts.items() if count]
