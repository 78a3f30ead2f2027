"""Random bits as a hash of seed and place, in ATen calls. The twin of csrc/common/random.h.

Unsigned 32-bit arithmetic is done in int64 and masked. That costs some 50 bytes an element, so the
work goes in pieces of PIECE blocks.
"""

from __future__ import annotations

from typing import TypeVar

import torch

BLOCK = 256  # elements that share two keys
FRACTION_BITS = 23
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


def block_key(key: int, block: torch.Tensor) -> torch.Tensor:
    """A key of the seed, made a key of each block."""
    low = _absorb(torch.full_like(block, key), block & _WORD)
    return _absorb(low, block >> 32)


def random_fraction(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """FRACTION_BITS random bits for each of the BLOCK elements of the blocks with these keys."""
    lane = torch.arange(BLOCK, device=first.device)
    h = (first + lane * _GOLDEN) & _WORD
    h = (((h ^ (h >> 16)) * _FIRST) & _WORD) ^ second
    h = ((h ^ (h >> 15)) * _SECOND) & _WORD
    return ((h ^ (h >> 16)) >> (32 - FRACTION_BITS)).to(torch.int32)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x / (1 - p) where the hash of seed and place says so, else 0: `petite_fast.ops.dropout`."""
    out = torch.empty_like(x)
    values, target = memory_order(x), memory_order(out)
    wide = torch.promote_types(x.dtype, torch.float32)
    keys, blocks = seed_keys(int(seed)), block_count(x.numel())
    for begin in range(0, blocks, PIECE):
        piece = values[begin * BLOCK : (begin + PIECE) * BLOCK]
        index = torch.arange(begin, min(begin + PIECE, blocks), device=x.device).unsqueeze(1)
        fraction = random_fraction(*(block_key(key, index) for key in keys)).flatten()[: len(piece)]
        # The factor is rounded as the kernels round it; filled in, as a copy would be a wait.
        scale = torch.full((), 1 / (1 - p), dtype=wide, device=x.device)
        kept = torch.where(fraction >= threshold(p), piece.to(wide) * scale, 0.0)
        target[begin * BLOCK : (begin + PIECE) * BLOCK] = kept.to(x.dtype)
    return out


def threshold(p: float) -> int:
    """p in units of 2^-FRACTION_BITS."""
    return round(p * 2**FRACTION_BITS)


def _mix(h: Words) -> Words:
    h = ((h ^ (h >> 16)) * _FIRST) & _WORD
    h = ((h ^ (h >> 15)) * _SECOND) & _WORD
    return h ^ (h >> 16)


def _absorb(h: Words, word: Words) -> Words:
    return _mix(((h ^ word) + _GOLDEN) & _WORD)
