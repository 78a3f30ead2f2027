"""The one autograd.Function behind adapted_conv and adapted_linear.

    W_eff = gamma * (W + s * B.A)        b_eff = gamma * b + beta        y = map(x, W_eff, b_eff)

A `Map` (convolution, transposed convolution, linear) supplies the linear algebra; this file
supplies the calculus: what is kept, how W_eff is rebuilt, which weight gradient is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from petite_fast.backends.eager import conv_layout, has_last_strides, scale_outputs
from petite_fast.ops import library, remade
from petite_fast.ops.library import autocast_on, below_autocast, first_order

_LAST = torch.channels_last_3d
# dgamma is read off the output as sum dy (y - beta) / gamma only where that division is harmless.
SMALLEST_GAMMA = 1e-2
LARGEST_SHIFT = 10.0  # of |beta / gamma|


class Wants(NamedTuple):
    """Which gradients `Map.low_rank_gradient` computes."""

    lora_A: bool
    lora_B: bool
    bias: bool


LowRankGradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Map(Protocol):
    """A linear map with a weight; immutable. `r` channels per group are the low-rank space."""

    @property
    def groups(self) -> int:
        """Independent channel groups."""

    @property
    def transposed(self) -> bool:
        """Whether the weight's first axis is the input's channels."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """y = map(x, weight, bias)."""

    def grad_input(
        self, grad_y: torch.Tensor, weight: torch.Tensor, size: torch.Size
    ) -> torch.Tensor:
        """grad_x, of shape `size`."""

    def grad_weight(
        self, grad_y: torch.Tensor, x: torch.Tensor, size: Sequence[int]
    ) -> torch.Tensor:
        """grad_weight, of shape `size`."""

    def grad_bias(self, grad_y: torch.Tensor) -> torch.Tensor:
        """Sum of grad_y over all but the channels, in float32 (float64 for float64)."""

    def low_rank_input(self, x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
        """t = A*x, r channels per group: what B sees of x."""

    def low_rank_grad_A(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """d(loss)/dA for scale 1, through G = (gamma B)' grad_y."""

    def low_rank_grad_B(
        self,
        grad_y: torch.Tensor,
        t: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """d(loss)/dB for scale 1, through t."""

    def low_rank_gradient(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor | None,
        t: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
        wants: Wants,
    ) -> LowRankGradients:
        """The gradients of A, B (for scale 1) and the bias from x, or from t without A's."""

    def low_rank_is_smaller(self, x: torch.Tensor, lora_A: torch.Tensor) -> bool:
        """Whether t takes less memory than x."""

    def low_rank_is_faster(self, weight: torch.Tensor, r: int) -> bool:
        """Whether the low-rank weight gradient beats the full one."""


def composed_low_rank_gradient(
    map_: Map,
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gamma: torch.Tensor | None,
    wants: Wants,
) -> LowRankGradients:
    """`Map.low_rank_gradient` by the map's other methods."""
    grad_a = grad_b = None
    if wants.lora_A:
        assert x is not None
        grad_a = map_.low_rank_grad_A(grad_y, x, lora_A, lora_B, gamma)
    if wants.lora_B:
        if t is None:
            assert x is not None
            t = map_.low_rank_input(x, lora_A)
        grad_b = map_.low_rank_grad_B(grad_y, t, lora_B, gamma)
    return grad_a, grad_b, map_.grad_bias(grad_y) if wants.bias else None


class Plan(NamedTuple):
    """What the forward keeps for the backward, and which weight gradient is used."""

    keep: str  # "nothing" | "x" | "t" | "y"
    low_rank: bool


class Settings(NamedTuple):
    """Everything of a call that is not a tensor."""

    map: Map
    scale: float
    dtype: torch.dtype
    plan: Plan


def apply(
    map_: Map,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scale: float,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
) -> torch.Tensor:
    """Cast x as autocast asks, choose what to keep, run the Function."""
    dtype = compute_dtype(x, weight)
    plan = make_plan(map_, x, weight, lora_A, lora_B, gamma, beta)
    settings = Settings(map_, scale, dtype, plan)
    return _Adapted.apply(x.to(dtype), weight, bias, lora_A, lora_B, gamma, beta, settings)


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The autocast dtype under autocast, else the dtype of x, which must be the weight's.

    Raises:
        TypeError: x and weight differ and no autocast says which to use.
    """
    kind = x.device.type
    if autocast_on(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x: got {x.dtype}, wanted {weight.dtype}, the dtype of the weight (or autocast)"
        )
    return x.dtype


def make_plan(
    map_: Map,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
) -> Plan:
    """The saved-tensor table: nothing, r channels (LoRA-FA), the output (SSF) or x."""
    if not torch.is_grad_enabled():
        return Plan("nothing", False)
    trains_a = lora_A is not None and lora_A.requires_grad
    trains_b = lora_B is not None and lora_B.requires_grad
    trains_gamma = gamma is not None and gamma.requires_grad
    if weight.requires_grad or (trains_gamma and (trains_a or trains_b)):
        return Plan("x", False)
    if trains_gamma:
        return Plan("y" if _readable_from_output(gamma, beta) else "x", False)
    if lora_A is not None and (trains_a or trains_b):
        if not trains_a and map_.low_rank_is_smaller(x, lora_A):
            return Plan("t", True)
        return Plan("x", map_.low_rank_is_faster(weight, lora_A.shape[0]))
    return Plan("nothing", False)


def _readable_from_output(gamma: torch.Tensor | None, beta: torch.Tensor | None) -> bool:
    """Whether every channel's pre-scale value can be had from y without loss.

    It looks at gamma's values, which a compiled graph or a CUDA graph cannot: there the answer
    is no, and x is kept, which is always right.
    """
    if gamma is None or torch.compiler.is_compiling():
        return False
    if gamma.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    size = gamma.detach().abs()
    readable = size >= SMALLEST_GAMMA
    if beta is not None:
        readable = readable & (beta.detach().abs() <= LARGEST_SHIFT * size)
    return bool(readable.all())


class _Adapted(torch.autograd.Function):
    """Keeps what `Plan` says, as `remade.keep` keeps it, and the parameters; rebuilds W_eff."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor | None,
        lora_B: torch.Tensor | None,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        settings: Settings,
    ) -> torch.Tensor:
        y = below_autocast(_run)(x, weight, bias, lora_A, lora_B, gamma, beta, settings)
        keep = settings.plan.keep
        kept: tuple[torch.Tensor | None, ...] = (None,)
        ctx.record = None
        if keep == "t" and lora_A is not None:
            t = settings.map.low_rank_input(x, lora_A.to(settings.dtype))
            kept, ctx.record = remade.keep(t)
        elif keep != "nothing":
            kept, ctx.record = remade.keep(x if keep == "x" else y)
        ctx.settings = settings
        ctx.x_size = x.shape
        ctx.channels_last = weight.dim() == 5 and conv_layout(x, weight) == _LAST
        # bias and beta are read only for grad_gamma; everything kept here is a parameter or `kept`.
        ctx.save_for_backward(*kept, weight, bias, lora_A, lora_B, gamma, beta)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        return below_autocast(_gradients)(grad_y, ctx)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    settings: Settings,
) -> torch.Tensor:
    w = _build_weight(settings, weight, lora_A, lora_B, gamma)
    if weight.dim() == 5 and has_last_strides(weight) and conv_layout(x, w) != _LAST:
        # W_eff is contiguous; from here on volumes have the frozen weight's memory format.
        w = torch.empty_like(w, memory_format=_LAST).copy_(w)
    if bias is not None and gamma is not None:
        bias = gamma * bias
    if beta is not None:
        bias = beta if bias is None else bias + beta
    return settings.map.forward(x, w, None if bias is None else bias.to(settings.dtype))


def _build_weight(
    settings: Settings,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gamma: torch.Tensor | None,
) -> torch.Tensor:
    if lora_A is None and gamma is None:
        return weight.to(settings.dtype)
    return library.effective_weight(
        weight, lora_A, lora_B, settings.scale, gamma, settings.map.groups,
        settings.map.transposed, settings.dtype,
    )  # fmt: skip


def _gradients(grad_y: torch.Tensor, ctx: Any) -> tuple[torch.Tensor | None, ...]:
    settings: Settings = ctx.settings
    map_, scale, dtype, plan = settings
    *saved, weight, bias, lora_A, lora_B, gamma, beta = ctx.saved_tensors
    if ctx.channels_last and not has_last_strides(grad_y):
        grad_y = torch.empty_like(grad_y, memory_format=_LAST).copy_(grad_y)
    need_x, need_w, need_b, need_a, need_B, need_gamma, need_beta = ctx.needs_input_grad[:7]
    grad_x = grad_w = grad_b = grad_a = grad_B = grad_gamma = grad_beta = None

    if need_x:
        w_eff = _build_weight(settings, weight, lora_A, lora_B, gamma)
        grad_x = map_.grad_input(grad_y, w_eff, ctx.x_size)
        del w_eff

    kept: Any = None if plan.keep == "nothing" else remade.restore(saved, ctx.record)
    need_total = need_b or need_beta or need_gamma
    total = None
    if plan.low_rank and (need_a or need_B):
        x, t = (None, kept) if plan.keep == "t" else (kept, None)
        a, b = lora_A.to(dtype), lora_B.to(dtype)
        wants = Wants(need_a, need_B, need_total)
        grad_a, grad_B, total = map_.low_rank_gradient(grad_y, x, t, a, b, gamma, wants)
        if grad_a is not None:
            grad_a = (grad_a * scale).to(lora_A.dtype)
        if grad_B is not None:
            grad_B = (grad_B * scale).to(lora_B.dtype)
    if need_total:
        total = map_.grad_bias(grad_y) if total is None else total
        if need_beta:
            grad_beta = total.to(beta.dtype)
        if need_b:
            grad_b = (total if gamma is None else total * gamma).to(bias.dtype)
        if need_gamma and plan.keep == "y":
            grad_gamma = map_.grad_bias(grad_y * kept)
            if beta is not None:
                grad_gamma = grad_gamma - total * beta
            grad_gamma = (grad_gamma / gamma).to(gamma.dtype)

    if not plan.low_rank and plan.keep == "x" and (need_w or need_a or need_B or need_gamma):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = map_.grad_weight(grad_y, kept, weight.shape).to(wide)
        if need_gamma:
            plain = library.effective_weight(
                weight, lora_A, lora_B, scale, None, map_.groups, map_.transposed, wide
            )
            grad_gamma = _sum_outputs(grad * plain, map_)
            if bias is not None:
                grad_gamma = grad_gamma + total * bias
            grad_gamma = grad_gamma.to(gamma.dtype)
        if gamma is not None:
            grad = scale_outputs(grad, gamma.to(wide), map_.groups, map_.transposed)
        if need_w:
            grad_w = grad.to(weight.dtype)
        if need_a or need_B:
            rows, a, b = grad.flatten(1), lora_A.to(wide).flatten(1), lora_B.to(wide).flatten(1)
            if need_a:
                grad_a = b @ rows.t() if map_.transposed else b.t() @ rows
                grad_a = (grad_a * scale).to(lora_A.dtype).view(lora_A.shape)
            if need_B:
                grad_B = a @ rows if map_.transposed else rows @ a.t()
                grad_B = (grad_B * scale).to(lora_B.dtype).view(lora_B.shape)
    return grad_x, grad_w, grad_b, grad_a, grad_B, grad_gamma, grad_beta, None


def _sum_outputs(weight: torch.Tensor, map_: Map) -> torch.Tensor:
    """Sum over everything but the output channels: adjoint of `scale_outputs`. -> (O,)."""
    if not map_.transposed:
        return weight.flatten(1).sum(1)
    return weight.flatten(2).sum(2).unflatten(0, (map_.groups, -1)).sum(1).flatten()
