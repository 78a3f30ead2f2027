"""What norm_act keeps for its backward: the table, and the look at values that it depends on."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from petite_fast.backends.eager_norm_act import channel_axis
from petite_fast.ops import compress
from petite_fast.ops.adapted import LARGEST_SHIFT, SMALLEST_GAMMA

# n = y / slope is read back only where that division is harmless, in float16 too.
SMALLEST_SLOPE = 1e-4
# A residual cancels like a bias. It is counted as one of 1: nobody looks at its values.
RESIDUAL_SHIFT = 1.0


class Spec(NamedTuple):
    """Everything of a call that is not a tensor."""

    norm: str  # "batch" uses statistics of x, "fixed" the ones it is given
    groups: int
    eps: float
    activation: str  # "identity" | "leaky_relu" (relu and prelu too) | "gelu"
    slope: float
    act_first: bool
    dtype: torch.dtype  # of y
    channels_last: bool


class Plan(NamedTuple):
    """What the forward keeps for the backward."""

    source: str  # where xhat comes from: "none" | "y" | "xhat" | "x"
    sign: bool  # the signs of the activation's input, a bit each
    mean: bool
    bias: bool
    residual: bool
    unsafe: torch.Tensor | None = None  # source "y": channels whose xhat is kept beside it


def make_plan(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: Spec,
) -> Plan:
    """The table of the docstring of `norm_act`, by which gradients are wanted."""

    def trains(tensor: torch.Tensor | None) -> bool:
        return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad

    fixed, act_first = spec.norm == "fixed", spec.act_first
    kinked, gelu = spec.activation == "leaky_relu", spec.activation == "gelu"
    wants_x, wants_slope = trains(x), trains(slope)
    wants_any = wants_x or wants_slope or any(trains(t) for t in (weight, bias, residual))
    wants_xhat = trains(weight) or wants_slope or (wants_x and not fixed)
    bends = (wants_x or wants_slope) if act_first else wants_any  # a gradient goes through act
    if not (wants_xhat or (gelu and bends)):
        return Plan("none", kinked and bends, False, False, False)
    if act_first and (gelu or wants_slope):  # the gradient needs act's input, not its sign
        return Plan("x", False, True, False, False)
    # n is put together again from xhat for gelu and for a slope's gradient.
    rebuilds = gelu or wants_slope
    plain = Plan("x" if fixed else "xhat", kinked and bends, fixed, rebuilds, rebuilds)
    if gelu or (kinked and not act_first and not _slope_is_invertible(slope, spec.slope)):
        return plain
    if kinked and not act_first and not fixed and compress.active() == "int8":
        return plain  # y / slope would be the rounding of y, divided by the slope
    unsafe = None
    if weight is not None or bias is not None:
        if not _can_look(x):
            return plain
        unsafe = _unsafe_channels(weight, bias, 0.0 if residual is None else RESIDUAL_SHIFT)
        if unsafe is not None and (fixed or len(unsafe) == x.shape[channel_axis(spec.norm)]):
            return plain
    return Plan("y", kinked and act_first and bends, False, True, True, unsafe)


def _can_look(x: torch.Tensor) -> bool:
    """Whether values can be read: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _slope_is_invertible(slope: torch.Tensor | None, value: float) -> bool:
    if slope is None:
        return value >= SMALLEST_SLOPE
    if not _can_look(slope):
        return False
    state = _state(slope)
    known = _slopes.get(slope)
    if known is None or known[0] != state:
        known = state, bool((slope.detach() >= SMALLEST_SLOPE).all())
        _slopes[slope] = known
    return known[1]


def _unsafe_channels(
    weight: torch.Tensor | None, bias: torch.Tensor | None, shift: float
) -> torch.Tensor | None:
    """Indices of the channels whose xhat cannot be read from y without loss; None if all can."""
    state = [shift, *(_state(t) for t in (weight, bias) if t is not None)]
    key = bias if weight is None else weight
    known = _affines.get(key)
    if known is None or known[0] != state or known[1]() is not bias:
        unsafe = _find_unsafe(weight, bias, shift)
        known = state, (lambda: None) if bias is None else weakref.ref(bias), unsafe
        _affines[key] = known
    return known[2]


def _find_unsafe(
    weight: torch.Tensor | None, bias: torch.Tensor | None, shift: float
) -> torch.Tensor | None:
    with torch.no_grad():
        size = 1.0 if weight is None else weight.abs()
        shifts = shift if bias is None else bias.abs() + shift
        safe = torch.as_tensor(shifts <= LARGEST_SHIFT * size)
        if weight is not None:
            safe = safe & (size >= SMALLEST_GAMMA)
        unsafe = (~safe).nonzero().flatten()
    return unsafe if len(unsafe) else None


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when the tensor is written to, or is given other memory."""
    return tensor._version, tensor.untyped_storage()._cdata


# What the last look at a tensor said: a scan, and on a GPU a wait, per change and not per step.
_slopes: Any = WeakIdKeyDictionary()
_affines: Any = WeakIdKeyDictionary()
