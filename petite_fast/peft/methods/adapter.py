"""Bottleneck adapters behind MLPs and blocks of convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petite_fast.nn.adapter import BottleneckAdapter
from petite_fast.nn.frozen import freeze
from petite_fast.peft.config import AdapterConfig
from petite_fast.peft.match import Scope
from petite_fast.peft.methods.site import Site
from petite_fast.peft.networks import takes_adapter


@dataclass
class AdapterSite(Site):
    """One block with a child `adapter` that its output goes through."""

    config: AdapterConfig

    def put_in(self, net: nn.Module) -> None:
        """Add the child, and the hook that calls it (a Sequential calls it by itself)."""
        module = self.module(net)
        last: Any = _last_layer(module)
        tokens = isinstance(last, nn.Linear)
        adapter = BottleneckAdapter(
            last.out_features if tokens else last.out_channels,
            self.config.reduction,
            activation=self.config.activation,
            channel_dim=-1 if tokens else 1,
            device=last.weight.device,
            dtype=last.weight.dtype,
        )
        module.add_module("adapter", adapter.train(module.training))
        if not _is_sequential(module):
            module.register_forward_hook(apply_adapter)

    def tensors(self, net: nn.Module) -> list[str]:
        """Weights and biases of both maps."""
        adapter = net.get_submodule(f"{self.name}.adapter")
        return [f"{self.name}.adapter.{leaf}" for leaf, _ in adapter.named_parameters()]

    def take_out(self, net: nn.Module, merge: bool) -> None:
        """Remove it; an adapter cannot be folded, so with `merge` it stays, frozen."""
        module = self.module(net)
        if merge:
            freeze(module.get_submodule("adapter"))
            return
        del module._modules["adapter"]
        for key, hook in list(module._forward_hooks.items()):
            if hook is apply_adapter:
                del module._forward_hooks[key]


def apply_adapter(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook: the block's output through its adapter."""
    return module.get_submodule("adapter")(output)


def find(config: AdapterConfig, scope: Scope) -> list[Site]:
    """The modules that `config` names, or every block of a known kind."""
    found = scope.find(
        config.target_modules,
        (lambda module: _last_layer(module) is not None)
        if config.target_modules is not None
        else takes_adapter,
        "an adapter goes behind a module with a Linear or a convolution in it",
        "target_modules",
    )
    return [AdapterSite(name, config) for name in found]


def _last_layer(module: nn.Module) -> nn.Module | None:
    """The Linear or convolution that comes last in `module`: its outputs are the block's."""
    kinds = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)
    return next((m for m in reversed(list(module.modules())) if isinstance(m, kinds)), None)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
