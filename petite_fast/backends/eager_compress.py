"""8-bit block storage in ATen calls, on any device. The twin of csrc/common/compress.h, bit by bit.

Unsigned 32-bit arithmetic is done in int64 and masked. That costs some 50 bytes an element, so the
work goes in pieces of PIECE blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

BLOCK = 256  # elements that share a scale
LEVELS = 127  # codes are -LEVELS..LEVELS
FRACTION_BITS = 23  # of a fixed-point code; LEVELS + 1 of them still fit an int32
FIXED_POINT = float(LEVELS << FRACTION_BITS)
LEVEL_SIZE = 1 / LEVELS
SMALL, LIFT = 2.0**-60, 2.0**64  # smaller blocks are lifted: FIXED_POINT / scale would overflow
PIECE = 4096

Words = TypeVar("Words", int, torch.Tensor)  # 32 bits each

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # lowbias32, from Wellons' hash-prospector


def block_count(count: int) -> int:
    """Blocks that hold `count` elements."""
    return (count + BLOCK - 1) // BLOCK


def seed_keys(seed: int) -> tuple[int, int]:
    """Two independent 32-bit keys of a 64-bit seed; every backend starts from them."""
    keys = []
    for start in (0, _SECOND):
        keys.append(_absorb(_absorb(start, seed & _WORD), seed >> 32 & _WORD))
    return keys[0], keys[1]


def memory_order(x: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor, of any memory format, as they lie in memory: a 1-D view."""
    return x.as_strided((x.numel(),), (1,))


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
        fraction = _random_fraction(*(_block_key(key, index) for key in keys))
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


def _mix(h: Words) -> Words:
    h = ((h ^ (h >> 16)) * _FIRST) & _WORD
    h = ((h ^ (h >> 15)) * _SECOND) & _WORD
    return h ^ (h >> 16)


def _absorb(h: Words, word: Words) -> Words:
    return _mix(((h ^ word) + _GOLDEN) & _WORD)


def _block_key(key: int, block: torch.Tensor) -> torch.Tensor:
    low = _absorb(torch.full_like(block, key), block & _WORD)
    return _absorb(low, block >> 32)


def _random_fraction(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """FRACTION_BITS random bits for each of the BLOCK elements of the blocks with these keys."""
    lane = torch.arange(BLOCK, device=first.device)
    h = (first + lane * _GOLDEN) & _WORD
    h = (((h ^ (h >> 16)) * _FIRST) & _WORD) ^ second
    h = ((h ^ (h >> 15)) * _SECOND) & _WORD
    return ((h ^ (h >> 16)) >> (32 - FRACTION_BITS)).to(torch.int32)
