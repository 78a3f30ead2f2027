"""A step of a network that does not take place: every allocation is booked, none is made.

Tensors are fake (shapes, dtypes and devices, no memory). Forward, backward and the optimiser's step
run on them as they are, whatever the network and its adapters, and the ledger sees each storage
come and go. Only what a kernel allocates for itself alone is not seen; for convolutions on a CPU
that is much, and it is computed from their shapes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from petite_fast.ops import dispatch
from petite_fast.ops.memory import storage_key
from petite_fast.training.convolution_memory import RULES, transient_bytes

_SMALL = 8192  # elements: what ops look at are numbers per channel
_EAGER = "petite_fast.backends.eager"
_TRANSIENT = -1


class Ledger(TorchDispatchMode):
    """Books the storages that the ops inside this block allocate and free.

    Values: an op may look at a few numbers of a parameter (is any scale near 0?). Those of the real
    network are at hand for small parameters and what is computed from them alone; any other number
    that is looked at is a one, and any other truth is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: Any = WeakIdKeyDictionary()
        """Small fake tensors whose values are known, and those values."""
        self._before: dict[int, torch.UntypedStorage] = {}
        self._live: dict[int, tuple[int, Any]] = {}
        self._events: list[tuple[int, int]] = []
        self._level = 0
        self._count = 0

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Forget what was booked; `tensors` are there already and are not booked."""
        self._before = {storage_key(s): s for s in (t.untyped_storage() for t in tensors)}
        self._live.clear()
        self._events.clear()
        self._level = 0

    def numbers(self, storages: Iterable[torch.UntypedStorage]) -> set[int]:
        """The numbers that live storages are booked under."""
        keys = (storage_key(s) for s in storages)
        return {self._live[key][0] for key in keys if key in self._live}

    def peak(self, without: Collection[int] = ()) -> int:
        """The most bytes that were alive at once, those booked under `without` left out."""
        level = highest = 0
        for number, change in self._events:
            if number not in without:
                level += change
                highest = max(highest, level)
        return highest

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":  # inside an op of ours, composite ones come as they are
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        before = self._level
        function = dispatch.choose(func._opname, *args) if func.namespace == "petite_fast" else None
        # A kernel of ours allocates its results alone.
        own = function is not None and not function.__module__.startswith(_EAGER)
        out = self._run(func, args, kwargs, None if own or func in RULES else function)
        for tensor in _tensors(out):
            self._book(tensor.untyped_storage())
        transient = 0 if own else transient_bytes(func, args, out)
        rest = before + transient - self._level
        if rest > 0:
            self._events += [(_TRANSIENT, rest), (_TRANSIENT, -rest)]
        return out

    def _book(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._live or key in self._before:
            return
        number = self._count = self._count + 1

        def gone(_: Any) -> None:
            if self._live.get(key, (0, None))[0] == number:
                del self._live[key]
                self._change(number, -size)

        self._live[key] = (number, weakref.ref(storage, gone))
        self._change(number, size)

    def _change(self, number: int, size: int) -> None:
        self._level += size
        self._events.append((number, size))

    def _run(self, func: Any, args: Any, kwargs: Any, eager: Callable[..., Any] | None) -> Any:
        """`eager` is what computes an op of ours from ops of PyTorch, to be booked one by one."""
        inputs = _tensors((args, kwargs))
        known = None
        if inputs and all(t in self.values for t in inputs):
            known = self._on_values(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return (True if args[0].dtype == torch.bool else 1) if known is None else known
        if eager is not None:
            with self:
                out = eager(*args, **kwargs)
        else:
            out = self._without_values(func, args, kwargs, known)
        results = _tensors(out)
        if known is not None and all(t.numel() <= _SMALL for t in results):
            self.values.update(zip(results, _tensors(known), strict=True))
        else:
            for tensor in results:
                self.values.pop(tensor, None)
        return out

    def _without_values(self, func: Any, args: Any, kwargs: Any, known: Any) -> Any:
        with self.mode:
            try:
                return func(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                if known is None:
                    raise
                # The values decide the shape (nonzero, a boolean mask) or are the answer (equal).
                device = _tensors((args, kwargs))[0].device
                return tree_map_only(
                    Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), known
                )

    def _on_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`func` of the known values, on the CPU."""
        args, kwargs = tree_map_only(Tensor, lambda t: self.values[t], (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def without_memory(
    things: Any, modules: Iterable[nn.Module], ledger: Ledger, device: torch.device
) -> Any:
    """A copy of `things` in which the parameters and buffers of `modules` are fake, on `device`.

    Args:
        things: anything that can be deep-copied; all but those tensors is copied.
        modules: the modules in `things`.
        ledger: makes the fake tensors, and is told the values of small ones: those of the module,
            ones for a module on the meta device.
        device: of the fake tensors.
    """
    memo: dict[int, Any] = {}
    for tensor in [t for m in modules for t in (*m.parameters(), *m.buffers())]:
        if id(tensor) in memo:
            continue
        with ledger.mode:
            fake: Tensor = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
        memo[id(tensor)] = fake
        if tensor.numel() <= _SMALL:
            value = tensor.detach()
            ones = torch.ones(value.shape, dtype=value.dtype)
            ledger.values[fake] = ones if value.is_meta else value.to("cpu", copy=True)
    return copy.deepcopy(things, memo)
