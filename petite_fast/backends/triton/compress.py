"""8-bit block storage in Triton. The twin of csrc/common/compress.h, bit by bit.

A program codes ROWS blocks, one per row of its tile. Bound by memory: a value is read once and its
code written once. No product is added to anything, so fusing the two could change no bit; saying
that they are not to be fused keeps Triton from warning about its default.
"""

# mypy: disallow-untyped-defs=False
# (a kernel's arguments are annotated for Triton, which looks the names up)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from petite_fast.backends import eager_compress, eager_random
from petite_fast.backends.eager_random import block_count, memory_order
from petite_fast.backends.triton.random import (
    BLOCK,
    FRACTION_BITS,
    OPTIONS,
    ROWS,
    launch_keys,
    random_fraction,
)

LEVELS = tl.constexpr(eager_compress.LEVELS)
FIXED_POINT = tl.constexpr(eager_compress.FIXED_POINT)
LEVEL_SIZE = tl.constexpr(eager_compress.LEVEL_SIZE)
SMALL = tl.constexpr(eager_compress.SMALL)
LIFT = tl.constexpr(eager_compress.LIFT)
NON_FINITE = tl.constexpr(0x7F800000)  # bits of infinity


@triton.jit(do_not_specialize=["key0", "key1"])
def quantise_kernel(
    x,
    codes,
    scales,
    key0,
    key1,
    count,
    ROWS: tl.constexpr,
):
    """Codes and scales of ROWS blocks of `count` elements, not 0; the keys are int32."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    index = block[:, None] * BLOCK + lane[None, :]
    values = tl.load(x + index, mask=index < count, other=0.0).to(tl.float32)
    # Compared as integers, as a NaN is above infinity and both are above all numbers.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    finite = bits < NON_FINITE
    lift = tl.where(largest < SMALL, LIFT, 1.0)
    lifted = largest * lift
    usable = finite & (lifted > 0)
    factor = tl.div_rn(tl.full([ROWS], FIXED_POINT, tl.float32), tl.where(usable, lifted, 1.0))
    fixed = tl.where(usable[:, None], values * lift[:, None] * factor[:, None], 0.0).to(tl.int32)

    fraction = random_fraction(key0, key1, block)
    code = (fixed + fraction) >> FRACTION_BITS
    code = tl.minimum(tl.maximum(code, -LEVELS), LEVELS)
    code = tl.where(usable[:, None], code, 0)
    inside = block * BLOCK < count
    tl.store(codes + index, code.to(tl.int8), mask=inside[:, None])
    tl.store(scales + block, tl.where(finite, largest, float("nan")), mask=inside)


@triton.jit
def dequantise_kernel(codes, scales, out, count, ROWS: tl.constexpr):
    """Values of ROWS blocks of `count` elements, not 0."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < count
    code = tl.load(codes + index, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + block, mask=block * BLOCK < count, other=0.0)
    value = code * LEVEL_SIZE * scale[:, None]
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


def quantise(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of a dense tensor that is not empty."""
    blocks = block_count(x.numel())
    codes = torch.empty(blocks * eager_random.BLOCK, dtype=torch.int8, device=x.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    quantise_kernel[(triton.cdiv(blocks, ROWS),)](
        memory_order(x), codes, scales, *launch_keys(seed), x.numel(), ROWS=ROWS, **OPTIONS
    )
    return codes, scales


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values of what `quantise` returned."""
    out = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=codes.device)
    dequantise_kernel[(triton.cdiv(len(scales), ROWS),)](
        codes, scales, memory_order(out), out.numel(), ROWS=ROWS, **OPTIONS
    )
    return out
