"""Random bits as a hash, and dropout by them, in Triton. The twin of csrc/common/random.h.

A program works on ROWS blocks of elements, one per row of its tile. No product is added to
anything, so fusing the two could change no bit; saying that they are not to be fused keeps Triton
from warning about its default.
"""

# mypy: disallow-untyped-defs=False
# (a kernel's arguments are annotated for Triton, which looks the names up)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petite_fast.backends import eager_random
from petite_fast.backends.eager_random import block_count, memory_order, seed_keys

BLOCK = tl.constexpr(eager_random.BLOCK)
FRACTION_BITS = tl.constexpr(eager_random.FRACTION_BITS)
GOLDEN = tl.constexpr(0x9E3779B9)
FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x846CA68B)

ROWS = 8  # blocks per program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _absorb(h, word):
    """Mix a word into a hash, all uint32."""
    h = (h ^ word) + GOLDEN
    h = (h ^ (h >> 16)) * FIRST
    h = (h ^ (h >> 15)) * SECOND
    return h ^ (h >> 16)


@triton.jit
def _block_key(key, block):
    """A key of the seed (int32), made a key of each block (int64)."""
    key = _absorb(key.to(tl.uint32, bitcast=True), block.to(tl.uint32))
    return _absorb(key, (block >> 32).to(tl.uint32))


@triton.jit
def random_fraction(key0, key1, block):
    """FRACTION_BITS random bits for each element of the blocks: int32 [blocks, BLOCK]."""
    lane = tl.arange(0, BLOCK).to(tl.uint32)
    h = _block_key(key0, block)[:, None] + lane[None, :] * GOLDEN
    h = ((h ^ (h >> 16)) * FIRST) ^ _block_key(key1, block)[:, None]
    h = (h ^ (h >> 15)) * SECOND
    return ((h ^ (h >> 16)) >> (32 - FRACTION_BITS)).to(tl.int32)


@triton.jit(do_not_specialize=["key0", "key1", "threshold"])
def dropout_kernel(x, out, key0, key1, threshold, scale, count, ROWS: tl.constexpr):
    """Dropout of ROWS blocks of `count` elements, not 0; the keys are int32."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < count
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    keep = random_fraction(key0, key1, block) >= threshold
    value = tl.where(keep, value * scale, 0.0)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


def launch_keys(seed: torch.Tensor) -> list[int]:
    """The keys of a seed as int32, which is what a kernel takes."""
    return [key - ((key >> 31) << 32) for key in seed_keys(int(seed))]


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """As `eager_random.dropout`, for a dense tensor that is not empty."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(block_count(x.numel()), ROWS),)
    dropout_kernel[grid](
        memory_order(x), memory_order(out), *launch_keys(seed), eager_random.threshold(p),
        1 / (1 - p), x.numel(), ROWS=ROWS, **OPTIONS,
    )  # fmt: skip
    return out
