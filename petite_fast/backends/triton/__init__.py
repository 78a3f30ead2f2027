"""The Triton backend: CUDA kernels, compiled at first use. Triton is imported when one is needed.

The predicates here say whether a kernel can run; the functions load it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch

OLDEST_CAPABILITY = (8, 0)  # of the devices that the kernels are compiled for in the tests


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
    return _can_run(x.device, x.numel())


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
    return _can_run(codes.device, codes.numel())


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
    return _can_run(x.device, x.numel())


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x / (1 - p) or 0, by a hash of the seed; only for what `can_run_dropout` accepts."""
    from petite_fast.backends.triton import random

    with torch.cuda.device(x.device):
        return random.dropout(x, p, seed)
