"""Tensors that are not kept for backward because they can be made again from others that are.

`remember` notes on a tensor what it was made of; `keep`, which every op keeps through, then keeps
that in its place. Somebody else who keeps the tensor keeps the tensor: he loses memory, never
correctness. A tensor that was written to since is kept itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petite_fast.ops import compress
from petite_fast.ops.library import autocast_on, first_order

_NAME = "_petite_fast_remade"


class Source(NamedTuple):
    """What a tensor was made of: ``tensor = make(*parts)`` when it had this version."""

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    version: int


Records = tuple[tuple[int, Any], ...]
"""For each of several tensors how many are kept in its place, and the record of that."""


class Remade(NamedTuple):
    """How to make a tensor from what was kept of its parts."""

    make: Callable[..., Tensor]
    parts: Records


def keep(tensor: Tensor) -> tuple[tuple[Tensor | None, ...], Any]:
    """What a Function saves in a tensor's place, and the record that `restore` wants.

    In forward ``kept, ctx.record = keep(x)`` and ``ctx.save_for_backward(*kept, ...)``, in backward
    ``x = restore(kept, ctx.record)``, as late as possible, for it may make a new tensor. What is
    kept is x, or what it is remade from, each as `compress.keep` keeps it.
    """
    found = source(tensor)
    if found is None:
        return compress.keep(tensor)
    saved, records = keep_all(found.parts)
    return saved, Remade(found.make, records)


def keep_all(tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], Records]:
    """`keep` for several tensors, some of which may be None."""
    saved: list[Tensor | None] = []
    records = []
    for tensor in tensors:
        kept, record = ((), None) if tensor is None else keep(tensor)
        saved += kept
        records.append((len(kept), record))
    return tuple(saved), tuple(records)


def restore(kept: Sequence[Any], record: Any) -> Tensor:
    """The tensor that `keep` was given, exactly or within the rounding of `compress`."""
    if not isinstance(record, Remade):
        return compress.restore((kept[0], kept[1]), record)
    return record.make(*restore_all(kept, record.parts))


def restore_all(kept: Sequence[Any], records: Records) -> list[Any]:
    """The inverse of `keep_all`."""
    tensors, start = [], 0
    for count, record in records:
        there = count > 0 or record is not None  # nothing is kept of what comes from nothing
        tensors.append(restore(kept[start : start + count], record) if there else None)
        start += count
    return tensors


def remember(tensor: Tensor, parts: Sequence[Tensor], make: Callable[..., Tensor]) -> Tensor:
    """Note that `tensor` is ``make(*parts)``, and return it.

    Args:
        tensor: just made.
        parts: tensors that are likely to be kept anyway; parts behind `tensor` would be a cycle.
        make: deterministic, and right without a graph.
    """
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        setattr(tensor, _NAME, Source(tuple(parts), make, tensor._version))
    return tensor


def source(tensor: Tensor) -> Source | None:
    """What `tensor` was made of, if that was noted and it is as it was."""
    if torch.compiler.is_compiling():
        return None
    found: Source | None = getattr(tensor, _NAME, None)
    return found if found is not None and found.version == tensor._version else None


def concatenate(tensors: Sequence[Tensor], dim: int = 1) -> Tensor:
    """``torch.cat``; whoever keeps the result keeps its parts, which others may keep already."""

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts, dim)

    return remember(join(*tensors), tensors, join)


def recomputed(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor] = ()
) -> Tensor:
    """``function(x)``, of which x alone is kept: by its own backward and by who keeps the result.

    Worth it where x is kept anyway and `function` costs little. The backward runs it once more.

    Args:
        function: deterministic, without randomness.
        x: its input.
        parameters: what of `function` may train.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x)
    again = _Again(function, x.device.type)
    y = _Recomputed.apply(x, again, *parameters)
    return remember(y, [x], again.without_graph)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, again: _Again, *parameters: Tensor) -> Tensor:
        kept, ctx.record = keep(x)
        ctx.again, ctx.count = again, len(parameters)
        ctx.save_for_backward(*kept, *parameters)
        return again.without_graph(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        saved = ctx.saved_tensors
        parameters = saved[len(saved) - ctx.count :]
        need_x, _, *needs = ctx.needs_input_grad
        x = restore(saved, ctx.record).detach().requires_grad_(need_x)
        with torch.enable_grad(), ctx.again.autocast():
            y = ctx.again.function(x)
        wanted = [x] * need_x + [p for p, need in zip(parameters, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(y, wanted, grad_y))
        grad_x = next(gradients) if need_x else None
        return grad_x, None, *(next(gradients) if need else None for need in needs)


class _Again:
    """`function` under the autocast mode of now."""

    def __init__(self, function: Callable[[Tensor], Tensor], kind: str) -> None:
        self.function, self.kind = function, kind
        on = autocast_on(kind)
        self.dtype = torch.get_autocast_dtype(kind) if on else None

    def autocast(self) -> Any:
        """A context with that mode."""
        if self.dtype is None:
            return nullcontext()
        # In torch 2.9 the cache hands weights that were cast without a graph to one with it.
        return torch.autocast(self.kind, dtype=self.dtype, cache_enabled=False)

    def without_graph(self, x: Tensor) -> Tensor:
        """function(x)."""
        with torch.no_grad(), self.autocast():
            return self.function(x)
