"""Which modules a config means: Hugging Face PEFT's matching rule, within a half of the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from petite_fast.errors import InputError
from petite_fast.peft.config import Targets
from petite_fast.peft.networks import Parts, parts


@dataclass(frozen=True)
class Scope:
    """A network, or one of its halves.

    Attributes:
        net: the network.
        parts: what is known of it.
        pattern: the half: names that begin with it; None is the whole network.
        where: words for errors, such as " in the decoder".
    """

    net: nn.Module
    parts: Parts
    pattern: re.Pattern[str] | None = None
    where: str = ""

    @classmethod
    def whole(cls, net: nn.Module) -> Scope:
        """All of `net`."""
        return cls(net, parts(net))

    def holds(self, name: str) -> bool:
        """Whether a module or parameter of this name is inside."""
        return self.pattern is None or self.pattern.match(name) is not None

    def modules(self) -> dict[str, tuple[str, nn.Module]]:
        """{dotted name: (first name of that module, module)}, the network itself left out.

        A module in two places has two names: patterns see both, the first one is used, and it
        alone says which half the module is in.
        """
        first = {id(module): name for name, module in self.net.named_modules()}
        return {
            name: (first[id(module)], module)
            for name, module in self.net.named_modules(remove_duplicate=False)
            if name and self.holds(first[id(module)])
        }

    def unused(self, parameter: str) -> bool:
        """Whether the network says that this parameter is never in its graph."""
        pattern = self.parts.unused
        return pattern is not None and re.match(pattern, parameter) is not None

    def find(
        self, targets: Targets, can: Callable[[nn.Module], bool], refuse: str, what: str
    ) -> dict[str, nn.Module]:
        """{first name: module} of what `targets` matches; without targets, all that `can`.

        Args:
            targets: the config's target_modules.
            can: whether the method can adapt a module.
            refuse: what the method adapts, for the error when a target is something else.
            what: the name of the option, for errors.

        Raises:
            InputError: a target matches nothing, or what the method cannot adapt.
        """
        matches = matcher(targets, what)
        found: dict[str, nn.Module] = {}
        names = self.modules()
        for name, (first, module) in names.items():
            if not matches(name):
                continue
            if can(module):
                if not self.unused(f"{first}."):
                    found[first] = module
            elif targets is not None:
                raise InputError(
                    f"{what} {targets!r} matches {name!r}, a {type(module).__name__}; {refuse}"
                )
        if not found:
            able = [name for name, (_, module) in names.items() if can(module)]
            raise no_match(targets, what, self.where, able)
        return found


def matcher(targets: Targets, what: str) -> Callable[[str], bool]:
    """A string matches the whole name (`re.fullmatch`), a list names or their dotted endings.

    Raises:
        InputError: the string is not a regular expression.
    """
    if targets is None:
        return lambda name: True
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(f"{what} {targets!r} is not a regular expression: {error}") from None
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(name == target or name.endswith("." + target) for target in targets)


def no_match(targets: Any, what: str, where: str, names: list[str]) -> InputError:
    """The error for targets that match nothing; `names` would have been possible."""
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return InputError(
        f"{what} {targets!r} matches no module{where}; names there are: {some or 'none'}"
    )
