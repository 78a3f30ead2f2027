"""norm_act: a normalisation and its activation as one op that keeps one tensor, not three."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.backends.eager_norm_act import channel_axis, in_layout, is_channels_last
from petite_fast.ops import compress, library, remade
from petite_fast.ops.library import autocast_on, below_autocast, first_order
from petite_fast.ops.norm_act_plan import Plan, Spec, make_plan

NORMS = ("instance", "group", "batch", "layer")
ACTIVATIONS = ("identity", "leaky_relu", "relu", "gelu", "prelu")
ORDERS = ("norm_act", "act_norm")


def norm_act(
    x: torch.Tensor,
    norm: str,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    slope: float | torch.Tensor = 0.01,
    order: str = "norm_act",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalisation, affine map, residual and activation in one op.

        xhat = (x - mean) / sqrt(var + eps)        n = weight * xhat + bias
        "norm_act": y = act(n + residual)          "act_norm": the same n for act(x)

    Statistics and arithmetic are in float32 (float64 for float64). Kept for backward (a unit is
    the size of x; statistics are one or two numbers per mean):

    - batch norm with running statistics, which is linear: the signs (1/32 of a float32 unit);
      nothing for the identity; x for gelu. If the weight or the slope trains, y besides, or x.
    - activation invertible (identity, slope >= 1e-4): y, which the next layer keeps anyway, and
      the residual. xhat is read back from y where ``|weight| >= 1e-2`` and ``|bias| <= 10
      |weight|`` (with a residual ``|bias| + 1``); that of the other channels is kept beside it.
      "act_norm" keeps the signs too, for any slope.
    - else xhat and the signs (gelu: xhat alone), as for weights under torch.compile and in CUDA
      graph capture, where values cannot be looked at. "act_norm" keeps x for gelu and for a slope
      that trains.

    The look at weight, bias and slope is remembered until one of them changes; a change through
    ``.data`` is not seen.

    Args:
        x: [N, C, ...]; for "layer" [..., C]. A contiguous or channels-last one is used as it is.
        norm: "instance" (statistics per sample and channel), "group" (per sample and group),
            "batch" (per channel) or "layer" (over the last axis).
        weight: [C] or None.
        bias: [C] or None.
        groups: of "group".
        running_mean: [C], "batch" only.
        running_var: [C], "batch" only.
        training: "batch": normalise by the batch and update the running statistics (the variance
            with its unbiased estimate), else use the running statistics.
        momentum: of the new statistics in the running ones.
        eps: added to the variance.
        activation: "identity", "leaky_relu", "relu", "gelu" (exact) or "prelu".
        slope: of "leaky_relu", a number; of "prelu", a tensor of 1 or C numbers.
        order: "norm_act" or "act_norm".
        residual: of the size of x, "norm_act" only.

    Returns:
        y, of the size and memory format of x and the dtype that torch's functions would give.

    Raises:
        ValueError: an unknown name, shapes that do not fit, or one value per statistic.
        TypeError: x is not floating-point, or a slope of the wrong type.
        RuntimeError: a second derivative is asked for.

    Source: InPlace-ABN (Rota Bulo et al. 2018) for the inversion.
    """
    slopes = slope if isinstance(slope, torch.Tensor) else None
    tensors = (x, weight, bias, running_mean, running_var, slopes, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            norm_act, tensors, x, norm, weight=weight, bias=bias, groups=groups,
            running_mean=running_mean, running_var=running_var, training=training,
            momentum=momentum, eps=eps, activation=activation, slope=slope, order=order,
            residual=residual,
        )  # fmt: skip
    _check_names(norm, activation, order, slope, residual)
    _check_tensors(x, norm, groups, weight, bias, running_mean, running_var, slopes, residual)
    fixed = norm == "batch" and not training
    if fixed and (running_mean is None or running_var is None):
        raise ValueError("running_mean, running_var: got None, wanted both when not training")
    if not fixed:
        _check_counts(x, norm, groups)
    act_first = order == "act_norm" and activation != "identity"
    spec = Spec(
        norm="fixed" if fixed else norm,
        groups=groups if norm == "group" else 1,
        eps=float(eps),
        activation="leaky_relu" if activation in ("relu", "prelu") else activation,
        slope=float(slope) if activation == "leaky_relu" else float(activation != "relu"),
        act_first=act_first,
        dtype=_output_dtype(x, residual, norm, activation, act_first),
        channels_last=is_channels_last(x, norm),
    )
    x = in_layout(x, spec.channels_last)
    if residual is not None:
        residual = in_layout(residual, spec.channels_last)
    plan = make_plan(x, weight, bias, slopes, residual, spec)
    given = (running_mean, running_var) if fixed else (None, None)
    codes: list[Any] = []
    y, mean, var = _NormAct.apply(
        x, weight, bias, slopes, residual, *given, plan.unsafe, spec, plan._replace(unsafe=None),
        codes,
    )  # fmt: skip
    if codes:
        _remember(y, codes, residual, weight, bias, slopes, spec)
    if norm == "batch" and training and x.numel() > 0:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            _update(running_mean, mean, momentum)
            _update(running_var, var * (count / (count - 1)), momentum)
    return y


def _remember(
    y: torch.Tensor,
    codes: list[Any],
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    spec: Spec,
) -> None:
    """Who keeps y in 8 bits keeps the codes of xhat, which are kept already, and the residual."""
    kept, scales, packing = codes
    weight, bias, slope = (None if t is None else t.detach() for t in (weight, bias, slope))

    def make(kept: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        xhat = compress.restore((kept, scales), packing)
        mean = xhat.new_zeros(xhat.shape[1], dtype=torch.float32)
        again: torch.Tensor
        again, *_ = library.norm_act(
            xhat, weight, bias, mean, mean + 1, slope, residual, None, "fixed", 1, 0.0,
            spec.activation, spec.slope, False, False, False, spec.dtype,
        )  # fmt: skip
        return again

    remade.remember(y, [kept] if residual is None else [kept, residual], make)


def _update(running: torch.Tensor | None, new: torch.Tensor, momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * new."""
    if running is not None:
        running.copy_((1 - momentum) * running + momentum * new)


def _check_names(
    norm: str,
    activation: str,
    order: str,
    slope: float | torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    for name, value, allowed in (
        ("norm", norm, NORMS),
        ("activation", activation, ACTIVATIONS),
        ("order", order, ORDERS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, wanted one of {allowed}")
    if activation == "prelu" and not isinstance(slope, torch.Tensor):
        raise TypeError(f"slope: got {type(slope).__name__}, wanted a tensor for 'prelu'")
    if activation != "prelu" and isinstance(slope, torch.Tensor):
        raise TypeError(f"slope: got a tensor, wanted a number for {activation!r}")
    if residual is not None and order == "act_norm":
        raise ValueError("residual: got a tensor with order 'act_norm', wanted None")


def _check_tensors(
    x: torch.Tensor,
    norm: str,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    slope: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, wanted a floating-point dtype")
    if x.dim() < (1 if norm == "layer" else 2):
        wanted = "[..., C]" if norm == "layer" else "[N, C, ...]"
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted {wanted}")
    channels = x.shape[channel_axis(norm)]
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, wanted ({channels},)")
    if norm != "batch" and (running_mean is not None or running_var is not None):
        raise ValueError(f"running_mean, running_var: got tensors for {norm!r}, wanted None")
    if slope is not None and tuple(slope.shape) not in ((1,), (channels,)):
        raise ValueError(f"slope: got shape {tuple(slope.shape)}, wanted (1,) or ({channels},)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, wanted {tuple(x.shape)}")
    if norm == "group" and (groups < 1 or channels % groups):
        raise ValueError(f"groups: got {groups}, wanted a divisor of {channels} channels")


def _check_counts(x: torch.Tensor, norm: str, groups: int) -> None:
    """Refuse what torch refuses: statistics of a single value."""
    voxels = math.prod(x.shape[2:])
    if norm == "instance" and voxels == 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted more than 1 voxel per channel")
    values = {"batch": x.shape[0] * voxels, "group": x.shape[0] * x.shape[1] // groups * voxels}
    if values.get(norm, 0) == 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted more than 1 value per statistic")


def _output_dtype(
    x: torch.Tensor, residual: torch.Tensor | None, norm: str, activation: str, act_first: bool
) -> torch.dtype:
    """The dtype of torch's functions in that order: autocast lowers prelu, on CUDA it raises
    layer and group norm to float32; a residual promotes."""
    kind, dtype = x.device.type, x.dtype
    autocast = autocast_on(kind) and dtype != torch.float64
    lowers = autocast and activation == "prelu"
    if lowers and act_first:
        dtype = torch.get_autocast_dtype(kind)
    if autocast and kind == "cuda" and norm in ("layer", "group"):
        dtype = torch.float32
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    if lowers and not act_first and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return dtype


class _NormAct(torch.autograd.Function):
    """Keeps what `Plan` says; y is the first output, mean and variance have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        slope: torch.Tensor | None,
        residual: torch.Tensor | None,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        unsafe: torch.Tensor | None,
        spec: Spec,
        plan: Plan,
        codes: list[Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, new_mean, new_var, xhat, sign = library.norm_act(
            x, weight, bias, mean, var, slope, residual, unsafe, spec.norm, spec.groups, spec.eps,
            spec.activation, spec.slope, spec.act_first, plan.source == "xhat", plan.sign,
            spec.dtype,
        )  # fmt: skip
        ctx.spec, ctx.source = spec, plan.source
        ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, residual)]
        mean, var = (mean, var) if spec.norm == "fixed" else (new_mean, new_var)
        large = (
            {"y": y, "x": x}.get(plan.source),
            xhat if plan.source == "xhat" or unsafe is not None else None,
            residual if plan.residual else None,
        )
        saved, ctx.records = remade.keep_all(large)
        packing = ctx.records[1][1]
        if packing is not None and not spec.act_first and spec.norm != "layer":
            codes += [*saved[:2], packing]
        ctx.save_for_backward(
            *saved,
            sign if plan.sign else None,
            mean if plan.mean else None,
            var,
            weight,
            bias if plan.bias else None,
            slope,
            unsafe,
        )
        ctx.mark_non_differentiable(new_mean, new_var)
        return y, new_mean, new_var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: torch.Tensor, *_: Any) -> Any:
        return below_autocast(_gradients)(grad_y, ctx)


def _gradients(grad_y: torch.Tensor, ctx: Any) -> tuple[torch.Tensor | None, ...]:
    spec: Spec = ctx.spec
    *saved, sign, mean, var, weight, bias, slope, unsafe = ctx.saved_tensors
    kept, xhat, residual = remade.restore_all(saved, ctx.records)
    x_dtype, bias_dtype, residual_dtype = ctx.dtypes
    need_x, need_weight, need_bias, need_slope, need_residual = ctx.needs_input_grad[:5]
    # Without an activation the residual's gradient is grad_y itself.
    passes = spec.activation == "identity"
    wants = [need_x, need_residual and not passes, need_weight, need_bias, need_slope]
    grad_x, grad_residual, grad_weight, grad_bias, grad_slope = library.norm_act_backward(
        in_layout(grad_y, spec.channels_last), kept, xhat, sign, residual, mean, var, weight, bias,
        slope, unsafe, spec.norm, spec.groups, spec.eps, spec.activation, spec.slope,
        spec.act_first, ctx.source, wants, x_dtype,
    )  # fmt: skip
    if passes:
        grad_residual = grad_y
    return (
        grad_x if need_x else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(bias_dtype) if need_bias else None,
        grad_slope.to(slope.dtype) if need_slope else None,
        grad_residual.to(residual_dtype) if need_residual else None,
        *[None] * 6,
    )
