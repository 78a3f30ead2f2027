"""What adapted layers have in common: fold the adapter in, put it aside again, become torch's own.

An adapted layer is a torch layer whose class was exchanged in place (`convert_`), so its name, its
hooks and every reference to it stayed. The way back is as gentle.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class AdaptedLayer(nn.Module):
    """A mixin in front of a torch layer that adds parameters of an adapter to it.

    Folded, the layer computes with a frozen `weight` (and `bias`, where the adapter touches it)
    that has the adapter in it, and the adapter takes no part: what is loaded into it, or trained,
    counts from the next `fold_` on. The state dict of a folded layer holds the folded values. A
    change of device or dtype reaches the base's parameters too.

    Attributes:
        torch_class: the torch layer that this class stands in for.
        adapter_parameters: names of the parameters that belong to the adapter.
        adapter_settings: names of its plain attributes.
    """

    torch_class: ClassVar[type[nn.Module]]
    adapter_parameters: ClassVar[tuple[str, ...]]
    adapter_settings: ClassVar[tuple[str, ...]] = ()

    weight: Any
    bias: Any
    _base: dict[str, nn.Parameter | None] | None = None  # the base's own parameters, while folded

    def _folded_values(self) -> dict[str, Tensor]:
        """{"weight": ..., "bias": ...} with the adapter in them, new tensors; only what changes.

        Raises:
            ValueError: this adapter is no function of the layer's weight and bias.
        """
        raise NotImplementedError

    @property
    def is_folded(self) -> bool:
        """Whether weight and bias have the adapter in them."""
        return self._base is not None

    def fold_(self) -> None:
        """Exchange weight (and bias) for frozen ones with the adapter in them; exact, rounded once.

        Does nothing on a folded layer.

        Raises:
            ValueError: this adapter is no function of the layer's weight and bias.
        """
        if self.is_folded:
            return
        with torch.inference_mode(False), torch.no_grad():
            folded = {
                name: nn.Parameter(value, requires_grad=False)
                for name, value in self._folded_values().items()
            }
        self._base = {name: self._parameters[name] for name in folded}
        self._parameters.update(folded)

    def unfold_(self) -> None:
        """Put back the very parameters that `fold_` took away, if it did."""
        if self._base is None:
            return
        self._parameters.update(self._base)
        self._base = None

    def release_(self, merge: bool) -> nn.Module:
        """Become torch's own layer again, in place; the adapter's tensors and attributes go.

        Args:
            merge: leave new parameters with the adapter folded in; False leaves the base's own.
                Nothing here changes ``requires_grad``, and new parameters are frozen.

        Raises:
            ValueError: `merge`, and this adapter cannot be folded. The layer is then as it was.
        """
        self.unfold_()  # an earlier fold may be out of date
        if merge:
            self.fold_()
        for name in self.adapter_parameters:
            del self._parameters[name]
        for name in (*self.adapter_settings, "_base"):
            self.__dict__.pop(name, None)
        self.__class__ = self.torch_class  # type: ignore[assignment]
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # A move must reach the base's parameters, which the folded ones stand in for.
        folded = self.is_folded
        self.unfold_()
        super()._apply(*args, **kwargs)
        if folded:
            self.fold_()
        return self
