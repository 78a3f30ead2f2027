"""Making an adapted network lean: which layers and blocks keep less for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from petite_fast.nn import lean
from petite_fast.nn.frozen import FrozenConv3d, FrozenConvTranspose3d
from petite_fast.nn.lean_blocks import lean_block, lean_norms
from petite_fast.nn.norm import FrozenBatchNorm3d
from petite_fast.nn.twin import Twin

Memory = Literal["exact", "int8", "checkpoint"]
MEMORY: tuple[Memory, ...] = ("exact", "int8", "checkpoint")

_FROZEN: dict[type[nn.Module], Any] = {
    cls.torch_class: cls for cls in (FrozenConv3d, FrozenConvTranspose3d, FrozenBatchNorm3d)
}


def freeze_layers(net: nn.Module) -> list[str]:
    """Frozen convolutions and batch norms become twins that keep nothing; their names."""
    names = []
    for name, module in net.named_modules():
        if type(module) in _FROZEN and _can_be_frozen(module):
            _FROZEN[type(module)].convert_(module)
            names.append(name)
    return names


def make_lean(net: nn.Module, memory: Memory) -> tuple[list[str], list[str]]:
    """Activations, norms and whole blocks become lean.

    A norm keeps its output only where nobody writes to that: in a Sequential with an activation
    next to it, and in the blocks of `nn.lean_blocks`. Elsewhere it stays torch's.

    Args:
        net: the network, its adapters in place.
        memory: "exact", "int8" (what the lean layers keep is kept in 8 bits) or "checkpoint" (the
            network's stages are computed again in backward).

    Returns:
        Names of layers that changed their class (see `torch_class`), and of modules with a `Twin`
        in front, in the order in which they got it.
    """
    layers, twins = [], []
    for name, module in list(net.named_modules()):
        found = [f"{name}.{leaf}" if name else leaf for leaf in lean_norms(module)]
        if type(module) in (nn.LeakyReLU, nn.ReLU):
            found.append(name)
        for each in found:
            lean.convert_(net.get_submodule(each))
        layers += found
        mixin: type[Twin] | None = lean_block(module)
        if mixin is None and lean.can_be_chain(module):
            mixin = lean.LeanChainTwin
        if mixin is not None:
            mixin.become_(module)
            twins.append(name)
    if memory == "checkpoint":
        for name in _stages(net):
            lean.CheckpointedTwin.become_(net.get_submodule(name))
            twins.append(name)
    elif memory == "int8":
        lean.StoredIn8BitsTwin.become_(net)
        twins.append("")
    return layers, twins


def undo(net: nn.Module, layers: list[str], twins: list[str]) -> None:
    """Put back the classes that `freeze_layers` and `make_lean` changed."""
    for name in reversed(twins):
        net.get_submodule(name).leave_()  # type: ignore[operator]
    for name in layers:
        layer = net.get_submodule(name)
        layer.__class__ = layer.torch_class  # type: ignore[assignment]
        layer.training = net.training


def _stages(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the children with parameters; of the members of a list, which is never called."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _stages(child, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}"


def _can_be_frozen(module: nn.Module) -> bool:
    """A norm without running statistics cannot; nor a weight that a hook computes."""
    if isinstance(module, nn.BatchNorm3d):
        return module.running_mean is not None and module.running_var is not None
    return "weight" in module._parameters
