"""norm_act of the native backend on CUDA, and the bits that it keeps. No autograd here.

The same functions as `native_norm_act`, for channels-last memory and for one channel. Bound by
memory: the forward reads x for its statistics and again for y, the backward reads grad_y and y
(or xhat) for its sums and again for grad_x; with fixed statistics each is one reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from petite_fast import settings
from petite_fast.backends import native
from petite_fast.backends.eager_norm_act import (
    in_layout,
    is_channels_last,
    sign_size,
    statistics_count,
)
from petite_fast.backends.native_norm_act import (
    _SOURCES,
    _affine,
    _floats,
    _given,
    _shape,
    are_like,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    vectors = {"weight": weight, "bias": bias, "slope": slope}
    if norm == "fixed":
        if mean is None or var is None:
            return False, "mean and var are not given"
        vectors |= {"mean": mean, "var": var}
    return _can_run(x, norm, activation, unsafe, {"residual": residual}, vectors)


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
    return _can_run(grad_y, norm, activation, unsafe, tensors, vectors)


def _can_run(
    x: torch.Tensor,
    norm: str,
    activation: str,
    unsafe: torch.Tensor | None,
    tensors: dict[str, torch.Tensor | None],
    vectors: dict[str, torch.Tensor | None],
) -> tuple[bool, str]:
    possible, reason = _has_kernels(x.device)
    if not possible:
        return False, reason
    if activation == "gelu":
        return False, "no kernel for gelu"
    if norm == "layer":
        return False, "no kernel for 'layer'"
    if x.dtype not in _DTYPES:
        return False, f"no kernel for {x.dtype}"
    if x.numel() == 0:
        return False, "x is empty"
    channels_last = is_channels_last(x, norm)
    if not channels_last and not (x.shape[1] == 1 and x.is_contiguous()):
        return False, "x is not channels-last"
    if unsafe is not None and not channels_last:
        return False, "channels are kept beside y, and there is one channel"
    return are_like(x, norm, tensors, vectors)


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
    channels_last = is_channels_last(x, norm)
    y = torch.empty_like(x)
    statistics = _empty(statistics_count(x.shape, norm, groups), torch.float32, x)
    new_mean, new_var = statistics, torch.empty_like(statistics)
    if keep_xhat:
        xhat = torch.empty_like(x)
    elif unsafe is not None:
        size = (x.shape[0], len(unsafe), *x.shape[2:])
        xhat = in_layout(_empty(size, dtype, x), channels_last)
    else:
        xhat = _empty(0, dtype, x)
    signs = sign_size(x.shape, norm, channels_last) if keep_sign else (0,)
    sign = _empty(signs, torch.uint8, x)
    affine, _alive = _affine(weight, bias, slope, slope_value, unsafe, x, norm)
    used = (_floats(mean), _floats(var)) if norm == "fixed" else (new_mean, new_var)
    shape = _shape(x, norm, groups, act_first, eps)
    workspace = _workspace(shape, x)
    tensors = [native._operand(t) for t in (x, residual, y, *used)]
    tensors += [_given(xhat), _given(sign), native._operand(workspace)]
    _launch("norm_act", x.device, shape, affine, tensors)
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
    channels = grad_y.shape[1]
    grad_x = torch.empty_like(grad_y) if wants[0] else _empty(0, torch.float32, grad_y)
    grad_residual = torch.empty_like(grad_y) if wants[1] else _empty(0, torch.float32, grad_y)
    grad_weight = _empty(channels if wants[2] else 0, torch.float32, grad_y)
    grad_bias = _empty(channels if wants[3] else 0, torch.float32, grad_y)
    affine, _alive = _affine(weight, bias, slope, slope_value, unsafe, grad_y, norm)
    variance = _floats(var)
    shape = _shape(grad_y, norm, groups, act_first, eps)
    workspace = _workspace(shape, grad_y)
    # xhat itself needs no residual to be found.
    residual = residual if source == "y" else None
    tensors = [native._operand(t) for t in (grad_y, kept, xhat, residual)]
    tensors += [_given(sign), native._operand(variance)]
    tensors += [_given(t) for t in (grad_x, grad_residual, grad_weight, grad_bias)]
    tensors.append(native._operand(workspace))
    _launch("norm_act_backward", grad_y.device, shape, affine, _SOURCES[source], tensors)
    return grad_x, grad_residual, grad_weight, grad_bias, _empty(0, torch.float32, grad_y)


def can_run_pack_signs(x: torch.Tensor) -> tuple[bool, str]:
    """Whether `pack_signs` takes this tensor, and why not."""
    if x.dtype not in _DTYPES:
        return False, f"no kernel for {x.dtype}"
    return _can_run_rows(x)


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """As `eager_norm_act.pack_signs`, for tensors that `can_run_pack_signs` accepts."""
    length = x.shape[-1]
    bits = _empty((*x.shape[:-1], (length + 7) // 8), torch.uint8, x)
    rows = x.numel() // length
    _launch("pack_signs", x.device, rows, length, native._operand(x), _given(bits))
    return bits


def can_run_unpack_signs(bits: torch.Tensor, size: int) -> tuple[bool, str]:
    """Whether `unpack_signs` takes these arguments, and why not."""
    return _can_run_rows(bits)


def unpack_signs(bits: torch.Tensor, size: int) -> torch.Tensor:
    """As `eager_norm_act.unpack_signs`, for tensors that `can_run_unpack_signs` accepts."""
    positive = _empty((*bits.shape[:-1], size), torch.bool, bits)
    rows = math.prod(bits.shape[:-1])
    _launch("unpack_signs", bits.device, rows, size, _given(bits), _given(positive))
    return positive


def _can_run_rows(x: torch.Tensor) -> tuple[bool, str]:
    if x.numel() == 0 or not x.is_contiguous():
        return False, "the tensor is empty or not contiguous"
    return _has_kernels(x.device)


def _has_kernels(device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, f"no CUDA kernel for device {device.type!r}"
    if settings.backend() != "native":
        return False, "not measured yet against torch; PETITE_FAST_BACKEND=native takes it"
    return native.cuda_available(device.index)


def _launch(name: str, device: torch.device, *arguments: Any) -> None:
    """Enqueue the kernels of an op on the device's current stream."""
    function = getattr(native._load()[0], f"{name}_cuda")
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        function(*arguments, device.index, stream)


def _workspace(shape: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
    doubles = native._load()[0].norm_act_cuda_workspace(shape, native._operand(x))
    return _empty(doubles, torch.float64, x)


def _empty(size: int | Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)
