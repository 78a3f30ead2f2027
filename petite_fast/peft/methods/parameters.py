"""Methods that train parameters of the base network: BitFit and layer norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import nn

from petite_fast.peft.config import BitFitConfig, LayerNormConfig
from petite_fast.peft.match import Scope, matcher, no_match
from petite_fast.peft.methods.site import Site


@dataclass
class ParameterSite(Site):
    """One parameter of the base that trains; `name` is the parameter's. It needs no folding."""

    def put_in(self, net: nn.Module) -> None:
        """Switch it on."""
        self._parameter(net).requires_grad_(True)

    def tensors(self, net: nn.Module) -> list[str]:
        """The parameter."""
        return [self.name]

    def take_out(self, net: nn.Module, merge: bool) -> None:
        """Its value is the network's already; `requires_grad` is put back with all others."""

    def _parameter(self, net: nn.Module) -> nn.Parameter:
        path, _, leaf = self.name.rpartition(".")
        return cast(nn.Parameter, getattr(net.get_submodule(path), leaf))


def find_biases(config: BitFitConfig, scope: Scope) -> list[Site]:
    """Every bias, or those of the modules that `config` names."""
    return _find(config, scope, lambda owner, leaf: leaf == "bias", "target_modules of the biases")


def find_layer_norms(config: LayerNormConfig, scope: Scope) -> list[Site]:
    """Weight and bias of every LayerNorm, or of the norms that `config` names."""
    kinds: tuple[type[nn.Module], ...] = (nn.LayerNorm,)
    if config.target_modules is not None:
        kinds = (*kinds, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm,
                 nn.modules.batchnorm._BatchNorm)  # fmt: skip
    return _find(
        config, scope, lambda owner, leaf: isinstance(owner, kinds), "target_modules of the norms"
    )


def _find(
    config: BitFitConfig | LayerNormConfig,
    scope: Scope,
    trains: Callable[[nn.Module, str], bool],
    what: str,
) -> list[Site]:
    matches = matcher(config.target_modules, what)
    found, owners = [], []
    for name, _ in scope.net.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if scope.unused(name) or not scope.holds(name):
            continue
        if trains(scope.net.get_submodule(owner), leaf):
            owners.append(owner)
            if matches(owner):
                found.append(name)
    if not found:
        raise no_match(config.target_modules, what, scope.where, owners)
    return [ParameterSite(name) for name in found]
