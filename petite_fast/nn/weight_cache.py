"""An effective weight that is kept until what it was computed from changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class CachedWeight(NamedTuple):
    """An effective weight and what it was computed from.

    `sources` are the parameters, `aliases` tensors on the same storage: while an alias lives, no
    other tensor can appear at its address, so equal addresses mean the same memory.
    """

    weight: Tensor
    scaling: float
    sources: tuple[nn.Parameter, ...]
    aliases: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor, scaling: float, sources: tuple[nn.Parameter, ...]) -> CachedWeight:
        """`weight`, as computed from the sources as they are now."""
        aliases = tuple(p.detach() for p in sources)
        return cls(weight, scaling, sources, aliases, tuple(p._version for p in sources))

    def current(self, dtype: torch.dtype, scaling: float, sources: tuple[Tensor, ...]) -> bool:
        """Whether it is still what these sources give."""
        return (
            self.weight.dtype == dtype
            and self.scaling == scaling
            and all(
                now is then and now.data_ptr() == alias.data_ptr() and now._version == version
                for now, then, alias, version in zip(
                    sources, self.sources, self.aliases, self.versions, strict=True
                )
            )
        )
