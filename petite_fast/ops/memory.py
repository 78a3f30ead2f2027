"""How many bytes autograd keeps between a forward and its backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch


def saved_bytes(fn: Callable[[], Any]) -> int:
    """Bytes of the unique storages that autograd keeps during ``fn()``, parameters excluded.

    `fn` runs a forward (and may return the loss or any nest of tensors). Counted are all tensors
    saved for backward, and tensors that a custom Function hides as attributes of its context,
    which the saved-tensor hooks do not see. A view counts with its whole storage; a storage
    counts once however often it is saved. Deterministic, and the same on every device, the meta
    device (and fake tensors) included, where nothing is allocated.

    Args:
        fn: no arguments; what it returns is walked for the graph behind it.

    Returns:
        Bytes.
    """
    _, storages = saved_storages(fn)
    return sum(storage.nbytes() for storage in storages)


def saved_storages(fn: Callable[[], Any]) -> tuple[Any, list[torch.UntypedStorage]]:
    """What ``fn()`` returns, and the storages that `saved_bytes` counts."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            storages[storage_key(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = fn()
    for tensor in _hidden_tensors(result):
        keep(tensor)
    # A parameter may be a fake tensor, which says so itself: hence both checks.
    parameters = {
        storage_key(thing.untyped_storage())
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor)
        and isinstance(thing, torch.nn.Parameter)
        and thing.layout is torch.strided
    }
    kept = [s for key, s in storages.items() if key not in parameters]
    storages.clear()  # the graph holds the hook, and with it this dict
    return result, kept


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells a live storage from all others: its address, or the object's without memory."""
    return storage._cdata if storage.device.type == "meta" else storage.data_ptr()


def _hidden_tensors(result: Any) -> Iterator[torch.Tensor]:
    """Tensors that the Python nodes of the graph behind `result` hold as plain attributes."""
    nodes = [t.grad_fn for t in _tensors(result) if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield from _tensors(list(getattr(node, "__dict__", {}).values()))
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
