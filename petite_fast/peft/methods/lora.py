"""LoRA on convolutions and linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from petite_fast.errors import InputError
from petite_fast.nn.lora import LoRAConv3d, LoRAConvTranspose3d, LoRALayer, LoRALinear
from petite_fast.peft.config import LoraConfig
from petite_fast.peft.match import Scope
from petite_fast.peft.methods.site import Site

LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    cls.torch_class: cls for cls in (LoRAConv3d, LoRAConvTranspose3d, LoRALinear)
}


@dataclass
class LoraSite(Site):
    """One layer with LoRA; `crossing` is Hugging Face PEFT's form for grouped convolutions."""

    config: LoraConfig
    crossing: bool = False

    def put_in(self, net: nn.Module) -> None:
        """Turn the torch layer into its LoRA twin."""
        module = self.module(net)
        r, alpha = self.config.settings(self.name)
        options: dict[str, Any] = {
            "lora_dropout": self.config.lora_dropout,
            "use_rslora": self.config.use_rslora,
            "train_a": self.config.train_a,
        }
        if _is_fused(self.name):
            options["qkv_parts"] = self.config.qkv_parts
        if self.crossing:
            options["crossing"] = True
        LAYERS[type(module)].convert_(module, r, alpha, **options)

    def tensors(self, net: nn.Module) -> list[str]:
        """lora_A and lora_B."""
        return [f"{self.name}.{leaf}" for leaf in ("lora_A", "lora_B")]

    def take_out(self, net: nn.Module, merge: bool) -> None:
        """Back to torch's layer."""
        self._layer(net).release_(merge)

    def fold(self, net: nn.Module) -> None:
        """W becomes W_eff; W itself is kept."""
        self._layer(net).fold_()

    def unfold(self, net: nn.Module) -> None:
        """W again."""
        self._layer(net).unfold_()

    def _layer(self, net: nn.Module) -> Any:
        return cast(LoRALayer, self.module(net))


def find(config: LoraConfig, scope: Scope) -> list[Site]:
    """The layers that `config` names, or all that LoRA can adapt."""
    kinds = ", ".join(cls.__name__ for cls in LAYERS)
    found = scope.find(
        config.target_modules,
        lambda module: type(module) in LAYERS and "weight" in module._parameters,
        f"LoRA adapts torch's own {kinds}",
        "target_modules",
    )
    parts = config.qkv_parts
    if parts != "qkv":
        for name, module in found.items():
            if _is_fused(name) and not (
                isinstance(module, nn.Linear) and module.out_features % 3 == 0
            ):
                raise InputError(
                    f"qkv_parts {parts!r} wants {name!r} to be a Linear with 3 outputs per "
                    f"channel, got {module}"
                )
    return [LoraSite(name, config) for name in found]


def _is_fused(name: str) -> bool:
    return name.rpartition(".")[2] == "qkv"
