"""The Triton backend: CUDA kernels, compiled at first use. Triton is imported when one is needed.

The predicates here say whether a kernel can run; the functions load it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from petite_fast import settings
from petite_fast.backends import eager
from petite_fast.backends.geometry import ConvGeometry
from petite_fast.backends.triton import tune

OLDEST_CAPABILITY = (8, 0)  # of the devices that the kernels are compiled for in the tests
CONV_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of a convolution's tensors: indices are int32, and the last tile goes on after the last voxel.
MOST_ELEMENTS = 2**31 - 2**12


@functools.cache
def available(device: int) -> tuple[bool, str]:
    """Whether Triton kernels run on CUDA device number `device`, and why not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return False, f"triton does not load: {error}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, OLDEST_CAPABILITY))
        return False, f"compute capability {have}, the kernels need {need} or more"
    return True, ""


def _can_run(device: torch.device, elements: int) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, f"no kernel for device {device.type!r}"
    if elements == 0:
        return False, "the tensor is empty"
    return available(device.index)


def can_run_quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[bool, str]:
    """Whether `quantise` takes these arguments, and why not."""
    return _can_run_unmeasured(x)


def quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of a dense tensor; only for what `can_run_quantise` accepts."""
    from petite_fast.backends.triton import compress

    with torch.cuda.device(x.device):
        return compress.quantise(x, seed)


def can_run_dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Whether `dequantise` takes these arguments, and why not."""
    return _can_run_unmeasured(codes)


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values; only for what `can_run_dequantise` accepts."""
    from petite_fast.backends.triton import compress

    with torch.cuda.device(codes.device):
        return compress.dequantise(codes, scales, size, stride, dtype)


def can_run_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> tuple[bool, str]:
    """Whether `dropout` takes these arguments, and why not."""
    if x.dtype == torch.float64:
        return False, "no kernel for torch.float64"
    return _can_run_unmeasured(x)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x / (1 - p) or 0, by a hash of the seed; only for what `can_run_dropout` accepts."""
    from petite_fast.backends.triton import random

    with torch.cuda.device(x.device):
        return random.dropout(x, p, seed)


def _conv_configs(
    tensor: torch.Tensor, weight: torch.Tensor, third: Any, *numbers: Any
) -> list[tune.Config]:
    """Those of `tune.CONV` that can run; the arguments are those of the op."""
    from petite_fast.backends.triton import boxes

    g = ConvGeometry.of_op(*numbers)
    fits = boxes.fits(tensor, weight.permute(2, 3, 4, 0, 1), g.stride, g.dilation)
    return [config for config in tune.CONV if fits or "BOXES" not in config]


def _tuned(op: str, args: tuple[Any, ...]) -> tune.Entry | None:
    """What was measured for the geometry of these arguments."""

    def candidates() -> list[tuple[tune.Config, tune.Run]]:
        configs = tune.LOW_RANK if op == "low_rank_gradient" else _conv_configs(*args)
        return [(config, functools.partial(_FUNCTIONS[op], *args, config=config))
                for config in configs]  # fmt: skip

    return tune.find(op, args, functools.partial(getattr(eager, op), *args), candidates)


def _config(op: str, args: tuple[Any, ...]) -> tune.Config:
    entry = _tuned(op, args)
    return {} if entry is None else entry.config


def _wins(op: str, *args: Any) -> tuple[bool, str]:
    """Whether a kernel is asked for, or was faster on this device than the library."""
    if settings.backend() == "triton":
        return True, ""
    entry = _tuned(op, args)
    if entry is None:
        return False, (
            "not measured on this device (petite-fast info --tune does it);"
            " PETITE_FAST_BACKEND=triton takes it"
        )
    return entry.triton_wins, "" if entry.triton_wins else entry.text


def _can_run_unmeasured(tensor: torch.Tensor) -> tuple[bool, str]:
    """For kernels that `tune` does not measure: only where they are asked for."""
    if tensor.device.type == "cuda" and settings.backend() != "triton":
        return False, "not measured yet; PETITE_FAST_BACKEND=triton takes it"
    return _can_run(tensor.device, tensor.numel())


def _can_run_conv(
    tensor: torch.Tensor, weight: torch.Tensor, numbers: tuple[Any, ...]
) -> tuple[bool, str]:
    """`tensor` is x or grad_y."""
    possible, reason = _can_run(tensor.device, tensor.numel())
    if not possible:
        return False, reason
    g = ConvGeometry.of_op(*numbers)
    if g.groups != 1:
        return False, f"no kernel for {g.groups} groups"
    if tensor.dtype not in CONV_DTYPES or weight.dtype != tensor.dtype:
        return False, f"no kernel for {tensor.dtype} with a weight of {weight.dtype}"
    if not tensor.is_contiguous(memory_format=torch.channels_last_3d) or (
        eager.conv_layout(tensor, weight) != torch.channels_last_3d
    ):
        return False, "the kernel wants channels_last_3d"
    return True, ""


def _can_index(*sizes: Sequence[int]) -> tuple[bool, str]:
    """Whether tensors of these sizes are neither empty nor too large, and why not."""
    if any(min(size) < 1 for size in sizes):
        return False, "the result is empty"
    if any(math.prod(size) > MOST_ELEMENTS for size in sizes):
        return False, f"more than {MOST_ELEMENTS} elements"
    return True, ""


def _conv_size(x: torch.Tensor, weight: torch.Tensor, g: ConvGeometry) -> list[int]:
    """Of y, for one group."""
    channels = weight.shape[1] if g.transposed else len(weight)
    return [len(x), channels, *g.output_size(x.shape[2:], weight.shape[2:])]


def can_run_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_forward` takes these arguments, and why not."""
    possible, reason = _can_run_conv(x, weight, numbers)
    if not possible:
        return False, reason
    size = _conv_size(x, weight, ConvGeometry.of_op(*numbers))
    possible, reason = _can_index(x.shape, size)
    return _wins("conv", x, weight, bias, *numbers) if possible else (False, reason)


def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
    config: tune.Config | None = None,
) -> torch.Tensor:
    """y = conv(x, weight, bias); only for what `can_run_conv` accepts."""
    from petite_fast.backends.triton import conv

    if config is None:
        config = _config("conv", (x, weight, bias, *numbers))
    g = ConvGeometry.of_op(*numbers)
    geometry = g.stride, g.padding, g.dilation
    with torch.cuda.device(x.device):
        size = _conv_size(x, weight, g)
        if g.transposed:
            return conv.conv_grad_input(x, weight, size, *geometry, bias, config=config)
        return conv.conv(x, weight, bias, *geometry, size[2:], config=config)


def can_run_conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_input` takes these arguments, and why not."""
    possible, reason = _can_run_conv(grad_y, weight, numbers)
    if possible:
        possible, reason = _can_index(grad_y.shape, input_size)
    if not possible:
        return False, reason
    return _wins("conv_grad_input", grad_y, weight, input_size, *numbers)


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
    config: tune.Config | None = None,
) -> torch.Tensor:
    """grad_x of `conv_forward`; only for what `can_run_conv_grad_input` accepts."""
    from petite_fast.backends.triton import conv

    if config is None:
        config = _config("conv_grad_input", (grad_y, weight, input_size, *numbers))
    g = ConvGeometry.of_op(*numbers)
    geometry = g.stride, g.padding, g.dilation
    with torch.cuda.device(grad_y.device):
        if g.transposed:
            return conv.conv(grad_y, weight, None, *geometry, input_size[2:], config=config)
        return conv.conv_grad_input(grad_y, weight, input_size, *geometry, config=config)


def can_run_low_rank_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor | None,
    *rest: Any,
) -> tuple[bool, str]:
    """Whether `low_rank_gradient` takes these arguments, and why not."""
    possible, reason = _can_run(grad_y.device, grad_y.numel())
    if not possible:
        return False, reason
    if x is None or t is not None or lora_B is None:
        return False, "the kernel wants x and both factors, and makes t itself"
    for tensor in (x, grad_y):
        if tensor.dtype not in CONV_DTYPES or tensor.dtype != x.dtype:
            return False, f"no kernel for x of {x.dtype} with grad_y of {grad_y.dtype}"
        if not tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return False, "the kernel wants channels_last_3d"
        possible, reason = _can_index(tensor.shape)
        if not possible:
            return False, reason
    from petite_fast.backends.triton import low_rank

    possible, reason = low_rank.fits(grad_y.shape[1], len(lora_A), x.dtype)
    if not possible:
        return False, reason
    return _wins("low_rank_gradient", grad_y, x, t, lora_A, lora_B, *rest)


def low_rank_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    t: None,
    *arguments: Any,
    config: tune.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A, B and the bias; only for what `can_run_low_rank_gradient` accepts."""
    from petite_fast.backends.triton import low_rank

    if config is None:
        config = _config("low_rank_gradient", (grad_y, x, t, *arguments))
    with torch.cuda.device(x.device):
        return low_rank.low_rank_gradient(grad_y, x, *arguments, config=config)


def _can_run_bottleneck(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[bool, str]:
    """`tensors`: x, and grad_y before it in a backward pass."""
    possible, reason = _can_run_unmeasured(tensors[0])
    if not possible:
        return False, reason
    x = tensors[-1]
    known = x.dtype in CONV_DTYPES and dtype in CONV_DTYPES
    if not known or torch.promote_types(x.dtype, dtype) != x.dtype:
        return False, f"no kernel for x of {x.dtype} with products in {dtype}"
    for tensor in tensors:
        if tensor.dtype != x.dtype:
            return False, f"no kernel for x of {x.dtype} with grad_y of {tensor.dtype}"
        if not tensor.is_contiguous():
            return False, "the kernel wants contiguous tensors"
    return _can_index(x.shape)


def can_run_bottleneck(
    x: torch.Tensor, down_weight: torch.Tensor, *arguments: Any
) -> tuple[bool, str]:
    """Whether `bottleneck_forward` takes these arguments, and why not."""
    possible, reason = _can_run_bottleneck((x,), arguments[-1])
    if not possible:
        return False, reason
    from petite_fast.backends.triton import bottleneck

    return bottleneck.fits_forward(len(down_weight))


def bottleneck_forward(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """y = x + up(act(down(x))); only for what `can_run_bottleneck` accepts."""
    from petite_fast.backends.triton import bottleneck

    with torch.cuda.device(x.device):
        return bottleneck.bottleneck(x, *arguments)


def can_run_bottleneck_backward(
    grad_y: torch.Tensor, x: torch.Tensor, down_weight: torch.Tensor, *arguments: Any
) -> tuple[bool, str]:
    """Whether `bottleneck_backward` takes these arguments, and why not."""
    possible, reason = _can_run_bottleneck((grad_y, x), arguments[-1])
    if not possible:
        return False, reason
    from petite_fast.backends.triton import bottleneck

    hidden, channels = down_weight.shape
    return bottleneck.fits_backward(channels, hidden, x.dtype, arguments[-1])


def bottleneck_backward(
    grad_y: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five gradients; only for what `can_run_bottleneck_backward` accepts."""
    from petite_fast.backends.triton import bottleneck

    with torch.cuda.device(grad_y.device):
        return bottleneck.bottleneck_backward(grad_y, *arguments)


_FUNCTIONS: dict[str, Any] = {
    "conv": conv_forward,
    "conv_grad_input": conv_grad_input,
    "low_rank_gradient": low_rank_gradient,
}
TUNED_OPS = tuple(_FUNCTIONS)
