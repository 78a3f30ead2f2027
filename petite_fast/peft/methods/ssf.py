"""SSF: a scale and a shift per channel, folded into the layer that makes the channels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from petite_fast.nn import ssf as layers
from petite_fast.peft.config import SSFConfig
from petite_fast.peft.match import Scope
from petite_fast.peft.methods.site import Site

NORMS = (
    layers.SSFLayerNorm,
    layers.SSFInstanceNorm3d,
    layers.SSFBatchNorm3d,
    layers.SSFGroupNorm,
)
CONVOLUTIONS = (layers.SSFConv3d, layers.SSFConvTranspose3d)
LAYERS: dict[type[nn.Module], Any] = {
    cls.torch_class: cls for cls in (*NORMS, *CONVOLUTIONS, layers.SSFLinear)
}
_LEAVES = ("ssf_scale", "ssf_shift")
_WIDE = torch.float32


@dataclass
class SSFSite(Site):
    """One layer with a scale and a shift; `others` are layers that share them."""

    others: list[str]

    def put_in(self, net: nn.Module) -> None:
        """Turn the torch layers into their SSF twins."""
        first = self._convert(net, self.name)
        for name in self.others:
            self._convert(net, name, first.ssf_scale, first.ssf_shift)

    def tensors(self, net: nn.Module) -> list[str]:
        """Scale and shift."""
        return [f"{self.name}.{leaf}" for leaf in _LEAVES]

    def aliases(self) -> dict[str, list[str]]:
        """The same two in the layers that share them."""
        return {
            f"{self.name}.{leaf}": [f"{other}.{leaf}" for other in self.others] for leaf in _LEAVES
        }

    def take_out(self, net: nn.Module, merge: bool) -> None:
        """Back to torch's layers."""
        for layer in self._layers(net):
            layer.release_(merge)
            layer.training = net.training

    def fold(self, net: nn.Module) -> None:
        """Weight and bias become the scaled and shifted ones; their own are kept."""
        for layer in self._layers(net):
            layer.fold_()

    def unfold(self, net: nn.Module) -> None:
        """Weight and bias again."""
        for layer in self._layers(net):
            layer.unfold_()

    def _convert(self, net: nn.Module, name: str, *shared: nn.Parameter) -> Any:
        module = net.get_submodule(name)
        like = next(net.parameters())  # a norm may have no tensor of its own
        return LAYERS[type(module)].convert_(
            module, *shared, device=like.device, dtype=torch.promote_types(like.dtype, _WIDE)
        )

    def _layers(self, net: nn.Module) -> list[Any]:
        return [cast(Any, net.get_submodule(name)) for name in (self.name, *self.others)]


def find(config: SSFConfig, scope: Scope) -> list[Site]:
    """The layers that `config` names, or the network, or the defaults of SSFConfig."""
    targets = config.target_modules
    if targets is None and (pattern := scope.parts.ssf):
        inside = [name for name, _ in scope.modules().values() if re.fullmatch(pattern, name)]
        targets = sorted(set(inside)) or None
    able = LAYERS if targets is not None else _defaults(scope)
    kinds = ", ".join(cls.__name__ for cls in LAYERS)
    found = scope.find(
        targets, lambda module: _can(module, able), f"SSF adapts torch's own {kinds}",
        "target_modules",
    )  # fmt: skip
    shared = scope.parts.ssf_shared
    groups: dict[str, list[str]] = {}
    for name in found:
        match = re.fullmatch(shared, name) if shared else None
        # A dot at the beginning: no module has such a name.
        groups.setdefault(f".{match[1]}" if match else name, []).append(name)
    return [SSFSite(names[0], names[1:]) for names in groups.values()]


def _defaults(scope: Scope) -> dict[type[nn.Module], Any]:
    """Norms and Linears; in a network with neither, convolutions.

    A scale between a convolution and its InstanceNorm would be undone by the norm.
    """
    convolutions = {cls.torch_class for cls in CONVOLUTIONS}
    others = {torch: cls for torch, cls in LAYERS.items() if torch not in convolutions}
    there = {type(module) for _, module in scope.modules().values()}
    return others if there & others.keys() else LAYERS


def _can(module: nn.Module, able: dict[type[nn.Module], Any]) -> bool:
    if type(module) not in able:
        return False
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    if isinstance(module, nn.BatchNorm3d):
        return module.running_mean is not None
    # A weight that a hook computes cannot be folded.
    return "weight" in module._parameters
