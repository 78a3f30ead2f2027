"""norm_act of the native backend, and the bits that it keeps. No autograd here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from petite_fast.backends import native
from petite_fast.backends.eager_norm_act import (
    channel_axis,
    in_layout,
    is_channels_last,
    sign_size,
    statistics_count,
)

# Codes of csrc/common/norm_act.h.
_NORMS = {"instance": 0, "group": 0, "batch": 1, "fixed": 2, "layer": 3}
_SOURCES = {"none": 0, "y": 1, "xhat": 2}
_DTYPES = (torch.float32, torch.bfloat16)
_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def can_run_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    slope: torch.Tensor | None,
    residual: torch.Tensor | None,
    unsafe: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    slope_value: float,
    act_first: bool,
    keep_xhat: bool,
    keep_sign: bool,
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Whether `norm_act` takes these arguments, and why not."""
    if dtype != x.dtype:
        return False, f"x is {x.dtype}, y is to be {dtype}"
    if norm == "fixed" and (mean is None or var is None):
        return False, "mean and var are not given"
    vectors = {"weight": weight, "bias": bias, "slope": slope}
    if norm == "fixed":
        vectors |= {"mean": mean, "var": var}
    return _can_run(x, norm, groups, activation, {"residual": residual}, vectors)


def can_run_norm_act_backward(
    grad_y: torch.Tensor,
    kept: torch.Tensor | None,
    xhat: torch.Tensor | None,
    sign: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    unsafe: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    slope_value: float,
    act_first: bool,
    source: str,
    wants: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Whether `norm_act_backward` takes these arguments, and why not."""
    if wants[4]:
        return False, "the slope trains"
    if source not in _SOURCES:
        return False, f"no kernel that reads {source}"
    if dtype != grad_y.dtype:
        return False, f"grad_y is {grad_y.dtype}, grad_x is to be {dtype}"
    if var is None:
        return False, "var is not given"
    tensors = {"kept": kept, "residual": residual}
    if unsafe is None:
        tensors["xhat"] = xhat
    vectors = {"weight": weight, "bias": bias, "slope": slope, "var": var}
    return _can_run(grad_y, norm, groups, activation, tensors, vectors)


def _can_run(
    x: torch.Tensor,
    norm: str,
    groups: int,
    activation: str,
    tensors: dict[str, torch.Tensor | None],
    vectors: dict[str, torch.Tensor | None],
) -> tuple[bool, str]:
    if x.device.type != "cpu":
        return False, f"no kernel for device {x.device.type!r}"
    possible, reason = native.available()
    if not possible:
        return False, reason
    if activation == "gelu":
        return False, "no kernel for gelu"
    if x.dtype not in _DTYPES:
        return False, f"no kernel for {x.dtype}"
    if x.numel() == 0:
        return False, "x is empty"
    channels_last = is_channels_last(x, norm)
    if not channels_last and not x.is_contiguous():
        return False, "x is neither contiguous nor channels-last"
    channels = x.shape[channel_axis(norm)]
    if (
        channels_last
        and norm not in ("instance", "fixed")
        and not (norm == "group" and groups == channels)
    ):
        return False, f"no kernel for {norm!r} in channels-last memory"
    if (channels_last or norm == "layer") and channels > _module().NORM_ACT_MAX_CHANNELS:
        return False, f"{channels} channels are too many"
    return are_like(x, norm, tensors, vectors)


def are_like(
    x: torch.Tensor,
    norm: str,
    tensors: dict[str, torch.Tensor | None],
    vectors: dict[str, torch.Tensor | None],
) -> tuple[bool, str]:
    """Whether `tensors` are what x is and lie as it does, and `vectors` beside it, and why not."""
    channels_last = is_channels_last(x, norm)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            return False, f"{name} is {tensor.dtype}, x is {x.dtype}"
        lies = is_channels_last(tensor, norm) if channels_last else tensor.is_contiguous()
        if not lies:
            return False, f"{name} does not lie in memory as x does"
    for name, vector in vectors.items():
        if vector is not None and (vector.device != x.device or vector.dtype == torch.float64):
            return False, f"{name} is {vector.dtype} on {vector.device}"
    return True, ""


def norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    slope: torch.Tensor | None,
    residual: torch.Tensor | None,
    unsafe: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    slope_value: float,
    act_first: bool,
    keep_xhat: bool,
    keep_sign: bool,
    dtype: torch.dtype,
) -> _Outputs:
    """y, mean, variance, xhat and signs as `eager_norm_act.norm_act`; see `can_run_norm_act`."""
    module = _module()
    channels_last = is_channels_last(x, norm)
    y = torch.empty_like(x)
    statistics = _empty(statistics_count(x.shape, norm, groups), torch.float32)
    new_mean, new_var = statistics, torch.empty_like(statistics)
    if keep_xhat:
        xhat = torch.empty_like(x)
    elif unsafe is not None:
        size = list(x.shape)
        size[channel_axis(norm)] = len(unsafe)
        xhat = in_layout(_empty(size, dtype), channels_last)
    else:
        xhat = _empty(0, dtype)
    signs = sign_size(x.shape, norm, channels_last) if keep_sign else (0,)
    sign = _empty(signs, torch.uint8)
    affine, _alive = _affine(weight, bias, slope, slope_value, unsafe, x, norm)
    fixed = norm == "fixed"
    used = (_floats(mean), _floats(var)) if fixed else (new_mean, new_var)
    shape = _shape(x, norm, groups, act_first, eps)
    operand = native._operand(x)
    workspace = _empty(module.norm_act_workspace(shape, operand), torch.float64)
    module.norm_act(
        shape, affine, operand, native._operand(residual), native._operand(y),
        native._operand(used[0]), native._operand(used[1]), _given(xhat), _given(sign),
        native._operand(workspace), torch.get_num_threads(),
    )  # fmt: skip
    return y, new_mean, new_var, xhat, sign


def norm_act_backward(
    grad_y: torch.Tensor,
    kept: torch.Tensor | None,
    xhat: torch.Tensor | None,
    sign: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    unsafe: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    slope_value: float,
    act_first: bool,
    source: str,
    wants: Sequence[bool],
    dtype: torch.dtype,
) -> _Outputs:
    """Gradients as `eager_norm_act.norm_act_backward`; see `can_run_norm_act_backward`."""
    module = _module()
    channels = grad_y.shape[channel_axis(norm)]
    grad_x = torch.empty_like(grad_y) if wants[0] else _empty(0, torch.float32)
    grad_residual = torch.empty_like(grad_y) if wants[1] else _empty(0, torch.float32)
    grad_weight = _empty(channels if wants[2] else 0, torch.float32)
    grad_bias = _empty(channels if wants[3] else 0, torch.float32)
    affine, _alive = _affine(weight, bias, slope, slope_value, unsafe, grad_y, norm)
    variance = _floats(var)
    shape = _shape(grad_y, norm, groups, act_first, eps)
    operand = native._operand(grad_y)
    workspace = _empty(module.norm_act_workspace(shape, operand), torch.float64)
    module.norm_act_backward(
        shape, affine, _SOURCES[source], operand, native._operand(kept), native._operand(xhat),
        native._operand(residual), _given(sign), native._operand(variance), _given(grad_x),
        _given(grad_residual), _given(grad_weight), _given(grad_bias),
        native._operand(workspace), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_residual, grad_weight, grad_bias, _empty(0, torch.float32)


def can_run_pack_signs(x: torch.Tensor) -> tuple[bool, str]:
    """Whether `pack_signs` takes this tensor, and why not."""
    if x.dtype not in _DTYPES:
        return False, f"no kernel for {x.dtype}"
    return _can_run_rows(x)


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """As `eager_norm_act.pack_signs`, for tensors that `can_run_pack_signs` accepts."""
    length = x.shape[-1]
    bits = _empty((*x.shape[:-1], (length + 7) // 8), torch.uint8)
    _module().pack_signs(
        x.numel() // length, length, native._operand(x), _given(bits), torch.get_num_threads()
    )
    return bits


def can_run_unpack_signs(bits: torch.Tensor, size: int) -> tuple[bool, str]:
    """Whether `unpack_signs` takes these arguments, and why not."""
    return _can_run_rows(bits)


def unpack_signs(bits: torch.Tensor, size: int) -> torch.Tensor:
    """As `eager_norm_act.unpack_signs`, for tensors that `can_run_unpack_signs` accepts."""
    positive = _empty((*bits.shape[:-1], size), torch.bool)
    _module().unpack_signs(
        math.prod(bits.shape[:-1]), size, _given(bits), _given(positive), torch.get_num_threads()
    )
    return positive


def _can_run_rows(x: torch.Tensor) -> tuple[bool, str]:
    if x.device.type != "cpu":
        return False, f"no kernel for device {x.device.type!r}"
    if x.numel() == 0 or not x.is_contiguous():
        return False, "the tensor is empty or not contiguous"
    return native.available()


def _module() -> Any:
    return native._load()[0]


def _shape(x: torch.Tensor, norm: str, groups: int, act_first: bool, eps: float) -> tuple[Any, ...]:
    if norm == "layer":
        channels = x.shape[-1]
        sizes = (1, channels, x.numel() // channels, 1)
        return sizes, _NORMS[norm], True, act_first, eps
    samples, channels = x.shape[:2]
    per_sample = {"instance": channels, "group": groups}.get(norm, 1)
    sizes = (samples, channels, math.prod(x.shape[2:]), per_sample)
    return sizes, _NORMS[norm], is_channels_last(x, norm), act_first, eps


def _affine(
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_value: float,
    unsafe: torch.Tensor | None,
    x: torch.Tensor,
    norm: str,
) -> tuple[tuple[Any, ...], list[torch.Tensor | None]]:
    """The parameters as the kernels take them, and the tensors that must outlive the call."""
    if slope is not None:
        slope = slope.expand(x.shape[channel_axis(norm)])
    vectors = [_floats(t) for t in (weight, bias, slope)]
    w, b, s = (native._operand(t) for t in vectors)
    return (w, b, s, slope_value, _given(unsafe)), [*vectors, unsafe]


def _empty(size: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")


def _floats(vector: torch.Tensor | None) -> torch.Tensor | None:
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.detach().float().contiguous()


def _given(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """The operand; an empty tensor is absent, and bytes and indices have the code of floats."""
    if tensor is None or tensor.numel() == 0:
        return 0, 0, 0
    code = native._CODES.get(tensor.dtype, 0)
    return tensor.data_ptr(), code, tensor.numel()
