"""A place in the network where one method works."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class Site:
    """One adapted module. Subclasses say what is done to it; all of it happens in place.

    Attributes:
        name: dotted name of the module.
    """

    name: str

    def module(self, net: nn.Module) -> nn.Module:
        """The module at this place."""
        return net.get_submodule(self.name)

    def tensors(self, net: nn.Module) -> list[str]:
        """Names in `net` of every tensor that belongs to the adapter, after `put_in`."""
        raise NotImplementedError

    def aliases(self) -> dict[str, list[str]]:
        """{a name of `tensors`: other names of the same tensor}."""
        return {}

    def put_in(self, net: nn.Module) -> None:
        """Adapt the module; what trains gets ``requires_grad = True``."""
        raise NotImplementedError

    def take_out(self, net: nn.Module, merge: bool) -> None:
        """Make the module what it was, with the adapter folded in (`merge`) or dropped.

        What cannot be folded stays, frozen, when `merge` is set.
        """
        raise NotImplementedError

    def fold(self, net: nn.Module) -> None:
        """Fold the adapter into the module's weight for now; `unfold` undoes it, losslessly."""

    def unfold(self, net: nn.Module) -> None:
        """Undo `fold`."""
