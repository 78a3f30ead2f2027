"""Changing the class of a module in place, for classes that are not known beforehand."""

from __future__ import annotations

from typing import Any

from torch import nn

_CLASSES: dict[tuple[type, type], type] = {}


class Twin(nn.Module):
    """A mixin that stands in front of another class: `become_` makes a module an instance of both.

    The module keeps its name, hooks, parameters and every reference to it. Copies and pickles
    work, although the class is made at run time.
    """

    twin_of: type[nn.Module]
    """The class without the mixin."""
    twin_prefix = ""
    """Beginning of the class's name; by default the mixin's own name without "Twin"."""

    @classmethod
    def become_(cls, module: nn.Module) -> Any:
        """Put this mixin in front of the class of `module`."""
        module.__class__ = cls.twin(type(module))
        return module

    def leave_(self) -> nn.Module:
        """Undo `become_`."""
        self.__class__ = self.twin_of  # type: ignore[assignment]
        return self

    @classmethod
    def twin(cls, base: type[nn.Module]) -> Any:
        """The one class that is both this mixin and `base`."""
        key = (cls, base)
        if key not in _CLASSES:
            prefix = cls.twin_prefix or cls.__name__.removesuffix("Twin")
            parts = {"twin_of": base, "twin_mixin": cls}
            _CLASSES[key] = type(f"{prefix}{base.__name__}", (cls, base), parts)
        return _CLASSES[key]

    @classmethod
    def original(cls) -> type[nn.Module]:
        """The class without any mixin of this kind."""
        return _parts(cls)[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and copy find the class again through its parts.
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        return (_new, _parts(type(self)), *reduced[2:])


def _parts(cls: type[nn.Module]) -> tuple[tuple[type[Twin], ...], type[nn.Module]]:
    """The mixins in front, the outermost first, and the class behind them."""
    mixins: list[type[Twin]] = []
    while "twin_mixin" in vars(cls):
        mixins.append(vars(cls)["twin_mixin"])
        cls = vars(cls)["twin_of"]
    return tuple(mixins), cls


def _new(mixins: tuple[type[Twin], ...], base: type[nn.Module]) -> Any:
    for mixin in reversed(mixins):
        base = mixin.twin(base)
    return base.__new__(base)
