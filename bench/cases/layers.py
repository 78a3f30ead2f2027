"""The ways to train a convolution that every suite compares."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from measure import Provider
from torch import nn

from petite_fast.backends import native


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def provider(
    name: str,
    module: nn.Module,
    x: torch.Tensor,
    flops: float = 0.0,
    backend: str | None = None,
    autocast: torch.dtype | None = None,
) -> Provider:
    """A step of `module`: forward, then the gradients of x (if it wants one) and what trains.

    With `autocast` the forward is under torch.autocast to that dtype.
    """
    inputs = [x, *trainable(module)] if x.requires_grad else trainable(module)
    grad: dict[torch.Size, torch.Tensor] = {}

    def forward() -> torch.Tensor:
        with torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext():
            return module(x)

    def backward(y: torch.Tensor) -> None:
        if y.shape not in grad:
            grad[y.shape] = torch.randn_like(y)
        torch.autograd.grad(y, inputs, grad[y.shape], allow_unused=True)

    return Provider(name, forward, backward, flops, backend=backend)


def frozen(module: nn.Module) -> nn.Module:
    """A copy that trains nothing, its batch norms in evaluation mode."""
    module = copy.deepcopy(module).requires_grad_(False)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm3d):
            each.eval()
    return module


def hf_peft(
    module: nn.Module, r: int, dropout: float = 0.0, targets: str | list[str] = r".*conv\d*"
) -> nn.Module | str:
    """`module` (a container) with HF PEFT's LoRA on `targets`, or the reason why not."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets)
    try:
        return inject_adapter_in_model(config, frozen(module))
    except (ValueError, NotImplementedError) as error:
        return str(error).split(". ")[0].splitlines()[0]


def our_backends() -> list[str]:
    """Backends of ours that this machine has for the CPU."""
    return ["eager", "native"] if native.available()[0] else ["eager"]


def randomise_b(module: nn.Module) -> Any:
    """LoRA B away from zero, as after a few steps; returns the module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return module
