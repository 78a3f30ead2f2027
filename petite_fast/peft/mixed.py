"""A batch in which every sample has an adapter of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petite_fast.peft.methods.lora import LoraSite

_LEAVES = ("lora_A", "lora_B")


def mixed_batch(model: Any, x: Tensor, names: list[str]) -> Tensor:
    """y[i] = `model` with adapter names[i] of x[i]; see `PeftModel.mixed_batch`.

    Raises:
        ValueError: a name is unknown, there is not one per sample, or `model` is in training mode.
    """
    if len(names) != len(x):
        raise ValueError(f"adapter_names: got {len(names)}, wanted one per sample: {len(x)}")
    known = sorted(model.peft_config)
    for name in names:
        if name not in known:
            raise ValueError(f"name: got {name!r}, wanted one of {known}")
    if model.training:
        raise ValueError("mixed_batch: got a network in training mode, wanted eval()")
    sites = model._peft.injection.sites
    with torch.no_grad():
        if all(isinstance(site, LoraSite) and not site.crossing for site in sites):
            return _one_pass(model, x, names)
        return _pass_per_adapter(model, x, names)


def _one_pass(model: Any, x: Tensor, names: list[str]) -> Tensor:
    """LoRA alone: every layer computes with a W_eff per sample, as one grouped convolution."""
    adapters = {model._peft.active: model._tensors(), **model._peft.stored}
    layers: list[Any] = [model.get_submodule(path) for path in model._peft.injection.lora]
    try:
        for path, layer in zip(model._peft.injection.lora, layers, strict=True):
            layer.per_sample = [
                tuple(adapters[name][f"{path}.{leaf}"].to(x.device) for leaf in _LEAVES)
                for name in names
            ]
        return model(x)
    finally:
        for layer in layers:
            layer.per_sample = None


def _pass_per_adapter(model: Any, x: Tensor, names: list[str]) -> Tensor:
    before = model._peft.active
    outputs: list[Any] = [None] * len(names)
    try:
        for name in dict.fromkeys(names):
            model.set_adapter(name)
            mine = [i for i, other in enumerate(names) if other == name]
            for i, y in zip(mine, model(x[mine]), strict=True):
                outputs[i] = y
    finally:
        model.set_adapter(before)
    return torch.stack(outputs)
