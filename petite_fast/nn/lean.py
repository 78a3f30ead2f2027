"""Norms, activations, MLPs and chains of them that keep one activation for the backward pass.

Where PyTorch keeps the input of a norm and of the activation behind it, the pair is one op here
(`ops.norm_act`) that keeps its output, which the next adapted layer keeps anyway. All of it happens
in place: a module changes its class, and `release_` or `leave_` changes it back.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from petite_fast.nn.frozen import require_type
from petite_fast.nn.lora import LoRALinear
from petite_fast.nn.norm import FrozenBatchNorm3d
from petite_fast.nn.ssf import SSFBatchNorm3d, SSFGroupNorm, SSFInstanceNorm3d, SSFLayerNorm
from petite_fast.nn.twin import Twin
from petite_fast.ops.activation import masked_activation
from petite_fast.ops.compress import storage
from petite_fast.ops.dropout import dropout
from petite_fast.ops.norm_act import norm_act
from petite_fast.ops.remade import remember

NORM_ACT, ACT_NORM = "norm_act", "act_norm"


def fused(
    norm: nn.Module,
    x: Tensor,
    activation: nn.Module | None = None,
    *,
    order: str = NORM_ACT,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(x) + residual), or norm(act(x)) for the order "act_norm", as one op.

    Args:
        norm: a module that `is_norm` takes.
        x: its input.
        activation: a module that `is_activation` takes; None is the identity.
        order: which comes first.
        residual: added between the two.
    """
    return norm_act(
        x, **_norm_keywords(norm, x), **_activation_keywords(activation), order=order,
        residual=residual,
    )  # fmt: skip


def is_norm(module: nn.Module) -> bool:
    """Whether `fused` takes this norm: one of torch's, frozen or with SSF, that nobody hooks."""
    if not isinstance(module, _NORMS) or has_hooks(module):
        return False
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    if isinstance(module, _InstanceNorm):
        # With running statistics in training mode, torch's own updates them.
        return not (module.track_running_stats and module.training)
    return True


def is_activation(module: nn.Module) -> bool:
    """Whether `fused` takes this activation."""
    if type(module) not in _ACTIVATIONS or has_hooks(module):
        return False
    return not isinstance(module, nn.GELU) or module.approximate == "none"


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what this module is given or gives."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def _norm_keywords(norm: Any, x: Tensor) -> dict[str, Any]:
    own = hasattr(norm, "_affine")  # SSF and fixed statistics: computed from more than the layer's
    weight, bias = norm._affine(x) if own else (norm.weight, norm.bias)
    keywords = {"weight": weight, "bias": bias, "eps": norm.eps}
    if isinstance(norm, nn.LayerNorm):
        return {"norm": "layer", **keywords}
    if isinstance(norm, nn.GroupNorm):
        return {"norm": "group", "groups": norm.num_groups, **keywords}
    if isinstance(norm, _InstanceNorm) and not norm.track_running_stats:
        return {"norm": "instance", **keywords}
    return {
        "norm": "batch", "running_mean": norm.running_mean, "running_var": norm.running_var,
        **keywords,
    }  # fmt: skip


def _activation_keywords(activation: Any) -> dict[str, Any]:
    if activation is None:
        return {}
    if isinstance(activation, nn.LeakyReLU):
        return {"activation": "leaky_relu", "slope": activation.negative_slope}
    if isinstance(activation, nn.PReLU):
        return {"activation": "prelu", "slope": activation.weight}
    return {"activation": _ACTIVATIONS[type(activation)]}


class LeanInstanceNorm3d(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` that keeps its output instead of its input."""

    torch_class: ClassVar[type[nn.Module]] = nn.InstanceNorm3d

    def _apply_instance_norm(self, x: Tensor) -> Tensor:
        # What torch's forward calls, on [N, C, D, H, W].
        return fused(self, x) if is_norm(self) else super()._apply_instance_norm(x)


class LeanGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that keeps its output instead of its input."""

    torch_class: ClassVar[type[nn.Module]] = nn.GroupNorm

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        return fused(self, x)


class LeanLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis that keeps its output instead of its input."""

    torch_class: ClassVar[type[nn.Module]] = nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return fused(self, x)


class LeanLeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU` that keeps a bit per value. Never in place, which saves nothing here."""

    torch_class: ClassVar[type[nn.Module]] = nn.LeakyReLU

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return masked_activation(x, self.negative_slope)


class LeanReLU(nn.ReLU):
    """`torch.nn.ReLU` that keeps a bit per value. Never in place, which saves nothing here."""

    torch_class: ClassVar[type[nn.Module]] = nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return masked_activation(x, 0.0)


LEAN_LAYERS: dict[type[nn.Module], Any] = {
    cls.torch_class: cls
    for cls in (LeanInstanceNorm3d, LeanGroupNorm, LeanLayerNorm, LeanLeakyReLU, LeanReLU)
}
"""Torch's layers and what they become."""

_NORMS = (
    nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm3d, SSFBatchNorm3d,
    SSFGroupNorm, SSFInstanceNorm3d, SSFLayerNorm,
)  # fmt: skip
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.LeakyReLU: "leaky_relu", LeanLeakyReLU: "leaky_relu", nn.ReLU: "relu", LeanReLU: "relu",
    nn.PReLU: "prelu", nn.GELU: "gelu", nn.Identity: "identity",
}  # fmt: skip


def convert_(module: nn.Module) -> Any:
    """Turn a torch norm or activation into its lean twin.

    Raises:
        TypeError: there is none for this class.
    """
    cls = LEAN_LAYERS.get(type(module), nn.Identity)
    require_type(module, getattr(cls, "torch_class", cls), "lean.convert_")
    module.__class__ = cls
    return module


class LeanChainTwin(Twin):
    """In front of a Sequential: a norm and the activation next to it are computed as one op.

    A dropout between them is passed over while it does nothing. Everything else is called as ever.
    """

    def forward(self, x: Any) -> Any:
        """What the Sequential computes."""
        modules = list(self.children())
        i = 0
        while i < len(modules):
            partner = self._partner(modules, i)
            if partner is None:
                x, i = modules[i](x), i + 1
            elif is_norm(modules[i]):
                x, i = fused(modules[i], x, modules[partner]), partner + 1
            else:
                x = fused(modules[partner], x, modules[i], order=ACT_NORM)
                i = partner + 1
        return x

    @staticmethod
    def _partner(modules: list[nn.Module], i: int) -> int | None:
        """Index of the module that `modules[i]` can be fused with, if there is one."""
        for j in range(i + 1, len(modules)):
            other = modules[j]
            if not isinstance(other, _DropoutNd) or (other.training and other.p > 0):
                return j if _are_pair(modules[i], other) else None
        return None


def _are_pair(first: nn.Module, second: nn.Module) -> bool:
    """A norm and its activation, or the other way round.

    A norm over the last axis behind an activation would save nothing, nor one behind GELU.
    """
    if is_norm(first):
        return is_activation(second)
    return (
        is_activation(first)
        and is_norm(second)
        and not isinstance(second, nn.LayerNorm)
        and not isinstance(first, (nn.GELU, nn.Identity))
    )


def can_be_chain(module: nn.Module) -> bool:
    """Whether this is a Sequential, by its forward, with a pair in it."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    solid = [m for m in module.children() if not isinstance(m, _DropoutNd)]
    return any(_are_pair(first, second) for first, second in zip(solid, solid[1:], strict=False))


class RecomputedTwin(Twin):
    """In front of an MLP, drop2(fc2(drop1(act(fc1(x))))): keeps its inputs only.

    Backward computes fc1 again, and act where fc2 has LoRA. A dropout keeps its seed. Where fc2
    would keep its input for itself, all of the MLP is computed again.
    """

    def forward(self, *args: Any) -> Any:
        """What the module computes."""
        inner = super().forward
        if torch.compiler.is_compiling() or not _has_graph(args, [self]):
            return inner(*args)
        first, act, drop1, second, drop2 = self._parts()
        frozen = _keeps_no_input(second)
        if not (
            all(map(_is_plain_dropout, (drop1, drop2)))
            and (frozen or (_keeps_remade(second) and _has_graph(args, [first, act])))
        ):
            return _again_in_backward(inner, args, [self])

        def hidden(x: Tensor, term: Tensor | None = None) -> Tensor:
            h = first(x)
            h = act(h if term is None else h + term)
            return h if frozen else _Recalled.apply(h)

        h = _again_in_backward(hidden, args, [first, act])
        if not frozen:
            node = h.grad_fn
            remember(h, (), lambda: node.saved_tensors[0])
        return _dropout(drop2, second(_dropout(drop1, h)))

    def _parts(self) -> Any:
        names = ("fc1", "act", "drop", "fc2", "drop")  # petite_fast.models.cvt.Mlp
        if not hasattr(self, "fc1"):
            names = ("linear1", "fn", "drop1", "linear2", "drop2")  # MONAI's MLPBlock
        return [getattr(self, name) for name in names]


class _Recalled(torch.autograd.Function):
    """The identity, which keeps its input. As the end of a checkpoint it makes that come back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _dropout(module: Any, x: Tensor) -> Tensor:
    """module(x) for what `_is_plain_dropout` takes."""
    if _is_active(module) and x.requires_grad:
        return dropout(x, module.p)
    return module(x)


def _is_active(module: Any) -> bool:
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def _is_plain_dropout(module: Any) -> bool:
    """Whether this does nothing, or is a dropout that `ops.dropout` can stand in for."""
    if type(module) not in (nn.Dropout, nn.Identity):
        return False
    return not _is_active(module) or (module.p < 1 and not module.inplace and not has_hooks(module))


def _keeps_no_input(linear: nn.Module) -> bool:
    """Whether nothing but a bias of this layer trains."""
    return isinstance(linear, (LoRALinear, nn.Linear)) and not any(
        p.requires_grad for name, p in linear.named_parameters() if name != "bias"
    )


def _keeps_remade(linear: nn.Module) -> bool:
    """Whether this layer keeps its input, by `ops.remade`, and nothing else."""
    return (
        type(linear) is LoRALinear
        and linear.lora_A.requires_grad
        and linear.per_sample is None
        and not linear._two_paths()
    )


def _has_graph(args: tuple[Any, ...], modules: list[nn.Module]) -> bool:
    """Whether there is anything to keep: before the first trained tensor there is not."""
    if not torch.is_grad_enabled():
        return False
    parameters = [p for module in modules for p in module.parameters()]
    return any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *parameters))


def _again_in_backward(function: Any, args: tuple[Any, ...], modules: list[nn.Module]) -> Any:
    """function(*args), made of `modules`, under torch.utils.checkpoint."""

    def exactly(*args: Any) -> Any:
        # Nothing of this forward stays, and the second one, in backward, must be like it.
        with storage("exact"):
            return function(*args)

    draws = any(
        _is_active(m) or (m.training and getattr(m, "lora_dropout", 0) > 0)
        for module in modules
        for m in module.modules()
    )
    return checkpoint(exactly, *args, use_reentrant=False, preserve_rng_state=draws)


class CheckpointedTwin(Twin):
    """In front of a stage of a network: torch.utils.checkpoint around its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stage computes."""
        inner = super().forward
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)


class StoredIn8BitsTwin(Twin):
    """In front of a network: what its lean layers keep for backward is kept in 8 bits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes."""
        with storage("int8"):
            return super().forward(*args, **kwargs)
