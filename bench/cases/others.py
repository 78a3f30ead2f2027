"""What others do about activation memory, re-created on torch's own layers.

`plain` is an adapted network whose layers are torch's again; `checkpointed` computes stages again
in backward; `memsave` keeps for a frozen layer nothing that its gradients do not need.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from petite_fast.nn.lora_base import LoRALayer
from petite_fast.ops import reference
from petite_fast.peft import PeftModel, lean


class _WithLoRA(nn.Module):
    """W -> W + scale * B.A, by autograd."""

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__()
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scale = layer.scaling
        self.transposed = isinstance(layer, nn.ConvTranspose3d)

    def forward(self, weight: Tensor) -> Tensor:
        return reference.effective_weight(
            weight, self.lora_A, self.lora_B, self.scale, transposed=self.transposed
        )


def plain(model: PeftModel) -> PeftModel:
    """`model`, in place, with torch's own layers: the same trained tensors, LoRA on the weight."""
    lean.undo(model, model._peft.injection.layers, model._peft.injection.twins)
    for module in list(model.modules()):
        if isinstance(module, LoRALayer):
            lora = _WithLoRA(module)
            del module.lora_A, module.lora_B
            module.__class__ = module.torch_class
            parametrize.register_parametrization(module, "weight", lora)
        elif isinstance(module, nn.BatchNorm3d):
            module.eval()
    return model


def checkpointed(net: nn.Module, stages: str) -> nn.Module:
    """`net`, in place, with torch.utils.checkpoint around the modules that `stages` matches."""
    found = [module for name, module in net.named_modules() if re.fullmatch(stages, name)]
    if not found:
        raise ValueError(f"stages: got {stages!r}, which no module of {type(net).__name__} matches")
    for module in found:
        module.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, module.forward, use_reentrant=False
        )
    return net


class _Convolution(torch.autograd.Function):
    """Keeps x for the weight's gradient alone; without it, zeros stand in for x in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.geometry, ctx.size = geometry, x.shape
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if x is None:
            x = torch.zeros(ctx.size, device=grad_y.device, dtype=grad_y.dtype)
        wants = list(ctx.needs_input_grad[:3])
        sizes = [weight.shape[1] * ctx.geometry[5] if ctx.geometry[3] else weight.shape[0]]
        grads = torch.ops.aten.convolution_backward(grad_y, x, weight, sizes, *ctx.geometry, wants)
        return *grads, *[None] * len(ctx.geometry)


class _FixedBatchNorm(torch.autograd.Function):
    """Batch norm in evaluation mode with a frozen weight keeps two numbers per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, bias: Tensor) -> Tensor:
        ctx.save_for_backward(norm.weight, norm.running_var)
        ctx.eps = norm.eps
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, bias, eps=norm.eps)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        weight, var = ctx.saved_tensors
        scale = (weight / (var + ctx.eps).sqrt()).view(1, -1, 1, 1, 1)
        return grad_y * scale, None, grad_y.sum((0, 2, 3, 4)) if ctx.needs_input_grad[2] else None


class _MaskedReLU(torch.autograd.Function):
    """Keeps a byte per value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        return grad_y * ctx.saved_tensors[0]


def memsave(net: nn.Module) -> nn.Module:
    """`net`, in place, by the rule of memsave_torch: a layer keeps what its trained tensors need.

    Convolutions, batch norms in evaluation mode and ReLU, as there; it has no rule for instance
    norm, group norm and LeakyReLU, and frozen Linears keep nothing in PyTorch itself.

    Source: arXiv 2404.12406.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.forward = functools.partial(_convolution, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.BatchNorm3d) and not module.weight.requires_grad:
            module.forward = functools.partial(  # type: ignore[method-assign]
                _batch_norm, module, module.forward
            )
        elif type(module) is nn.ReLU:
            module.forward = _MaskedReLU.apply  # type: ignore[method-assign]
    return net


def _convolution(conv: Any, x: Tensor) -> Tensor:
    transposed, kind = isinstance(conv, nn.ConvTranspose3d), x.device.type
    tensors = [x, conv.weight, conv.bias]
    if torch.is_autocast_enabled(kind):  # which does not see through a Function
        dtype = torch.get_autocast_dtype(kind)
        tensors = [None if each is None else each.to(dtype) for each in tensors]
    return _Convolution.apply(
        *tensors, conv.stride, conv.padding, conv.dilation, transposed,
        conv.output_padding, conv.groups,
    )  # fmt: skip


def _batch_norm(norm: nn.BatchNorm3d, forward: Any, x: Tensor) -> Tensor:
    return forward(x) if norm.training else _FixedBatchNorm.apply(x, norm, norm.bias)
