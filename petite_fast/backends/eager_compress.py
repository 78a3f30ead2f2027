"""8-bit block storage in ATen calls, on any device: csrc/common/compress.h, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petite_fast.backends.eager_random import (
    BLOCK,
    FRACTION_BITS,
    PIECE,
    block_count,
    block_key,
    memory_order,
    random_fraction,
    seed_keys,
)

LEVELS = 127  # codes are -LEVELS..LEVELS; LEVELS + 1 with FRACTION_BITS behind still fit an int32
FIXED_POINT = float(LEVELS << FRACTION_BITS)
LEVEL_SIZE = 1 / LEVELS
SMALL, LIFT = 2.0**-60, 2.0**64  # smaller blocks are lifted: FIXED_POINT / scale would overflow


def quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of a dense tensor: `petite_fast.ops.quantise`."""
    values = memory_order(x)
    blocks = block_count(x.numel())
    codes = torch.zeros(blocks * BLOCK, dtype=torch.int8, device=x.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    keys = seed_keys(int(seed))
    for begin in range(0, blocks, PIECE):
        end = min(begin + PIECE, blocks)
        piece = values[begin * BLOCK : end * BLOCK].float()
        rows = torch.nn.functional.pad(piece, (0, (end - begin) * BLOCK - len(piece)))
        rows = rows.view(-1, BLOCK)
        # Compared as integers, as a NaN is above infinity and both are above all numbers.
        bits = (rows.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True)
        largest = bits.view(torch.float32)
        finite = largest.isfinite()
        lift = torch.where(largest < SMALL, LIFT, 1.0)
        lifted = largest * lift
        usable = finite & (lifted > 0)
        factor = torch.full_like(lifted, FIXED_POINT).div_(lifted)
        fixed = torch.where(usable, rows * lift * factor, 0.0).to(torch.int32)
        index = torch.arange(begin, end, device=x.device).unsqueeze(1)
        fraction = random_fraction(*(block_key(key, index) for key in keys))
        code = (fixed + fraction) >> FRACTION_BITS
        code = torch.where(usable, code.clamp(-LEVELS, LEVELS), 0)
        codes[begin * BLOCK : end * BLOCK] = code.to(torch.int8).flatten()
        scales[begin:end] = torch.where(finite, largest, torch.nan).squeeze(1)
    return codes, scales


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """code / 127 * scale, rounded once: `petite_fast.ops.dequantise`."""
    out = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=codes.device)
    values = memory_order(out)
    for begin in range(0, len(scales), PIECE):
        rows = codes[begin * BLOCK : (begin + PIECE) * BLOCK].float().view(-1, BLOCK)
        rows = rows * LEVEL_SIZE * scales[begin : begin + PIECE].unsqueeze(1)
        target = values[begin * BLOCK : (begin + PIECE) * BLOCK]
        target.copy_(rows.flatten()[: len(target)])
    return out
