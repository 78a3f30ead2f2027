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
from petite_fast.nn.norm import FrozenBatchNorm3d
from petite_fast.nn.ssf import SSFBatchNorm3d, SSFGroupNorm, SSFInstanceNorm3d, SSFLayerNorm
from petite_fast.nn.twin import Twin
from petite_fast.ops.activation import masked_activation
from petite_fast.ops.compress import storage
from petite_fast.ops.norm_act import norm_act

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
    if not isinstance(module, _NORMS) or _has_hooks(module):
        return False
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    if isinstance(module, _InstanceNorm):
        # With running statistics in training mode, torch's own updates them.
        return not (module.track_running_stats and module.training)
    return True


def is_activation(module: nn.Module) -> bool:
    """Whether `fused` takes this activation."""
    if type(module) not in _ACTIVATIONS or _has_hooks(module):
        return False
    return not isinstance(module, nn.GELU) or module.approximate == "none"


def _has_hooks(module: nn.Module) -> bool:
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
    """In front of an MLP: keeps its inputs only, and computes it again in backward."""

    def forward(self, *args: Any) -> Any:
        """What the module computes."""
        inner = super().forward
        if torch.compiler.is_compiling() or not self._has_graph(args):
            return inner(*args)

        def exactly(*args: Any) -> Any:
            # Nothing of this forward stays, and the second one, in backward, must be like it.
            with storage("exact"):
                return inner(*args)

        draws = any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in self.modules())
        return checkpoint(exactly, *args, use_reentrant=False, preserve_rng_state=draws)

    def _has_graph(self, args: tuple[Any, ...]) -> bool:
        """Whether there is anything to keep: before the first trained tensor there is not."""
        if not torch.is_grad_enabled():
            return False
        return any(isinstance(t, Tensor) and t.requires_grad for t in args) or any(
            p.requires_grad for p in self.parameters()
        )


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
