"""8-bit block storage on the native CPU kernels of csrc/cpu/compress.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petite_fast.backends import native
from petite_fast.backends.eager_random import BLOCK, block_count, seed_keys


def _can_run(device: torch.device, elements: int) -> tuple[bool, str]:
    if device.type != "cpu":
        return False, f"no kernel for device {device.type!r}"
    if elements == 0:
        return False, "the tensor is empty"
    return native.available()


def can_run_quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[bool, str]:
    """Whether `quantise` takes these arguments, and why not."""
    return _can_run(x.device, x.numel())


def quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of a dense tensor; only for what `can_run_quantise` accepts."""
    module, _ = native._load()
    blocks = block_count(x.numel())
    codes = torch.empty(blocks * BLOCK, dtype=torch.int8)
    scales = torch.empty(blocks, dtype=torch.float32)
    module.quantise(
        native._operand(x), codes.data_ptr(), codes.numel(), scales.data_ptr(), blocks,
        seed_keys(int(seed)), torch.get_num_threads(),
    )  # fmt: skip
    return codes, scales


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
    module, _ = native._load()
    out = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
    module.dequantise(
        codes.data_ptr(), codes.numel(), scales.data_ptr(), scales.numel(), native._operand(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
