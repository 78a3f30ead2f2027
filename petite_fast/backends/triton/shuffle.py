"""Transposed convolution with kernel = stride (and grad_x of the plain one) in Triton.

Its blocks do not overlap: one product of the coarse voxels [voxels, C] with the weight [C, (tap,
channel of y)], and each column is written to its place in the block. Where every voxel of y is in a
block, each is written once and nothing is added.
"""

# mypy: disallow-untyped-defs=False
# (a kernel's arguments are annotated for Triton, which looks the names up)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from petite_fast.backends.triton.conv import dot_precision, inner_block, is_plain

ROWS = 128  # coarse voxels of a program
LAST = torch.channels_last_3d


@triton.jit
def shuffle_kernel(
    x,
    weight,
    bias,
    y,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    rows,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS voxels of x times COLUMNS of (tap, channel of y), or of (channel, tap) unless Y_LAST.

    x [N, D, H, W, CHANNELS] if X_LAST, else [N, CHANNELS, D, H, W]; y [N, OD, OH, OW, OUTPUTS] or
    [N, OUTPUTS, OD, OH, OW]; weight [CHANNELS, columns]; bias [OUTPUTS] or None.
    """
    taps: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    columns: tl.constexpr = taps * OUTPUTS
    column_blocks: tl.constexpr = (columns + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, CHANNELS, INNER):
        inner = start + tl.arange(0, INNER)
        used = inner < CHANNELS
        if X_LAST:
            values = tl.load(
                x + row[:, None] * CHANNELS + inner[None, :],
                mask=(row < rows)[:, None] & used[None, :],
                other=0.0,
            )
        else:
            # Voxels lie side by side, so they go along the last axis of what is loaded.
            place = row + row // (W * H * D) * ((CHANNELS - 1) * (D * H * W))
            values = tl.trans(
                tl.load(
                    x + inner[:, None] * (D * H * W) + place[None, :],
                    mask=used[:, None] & (row < rows)[None, :],
                    other=0.0,
                )
            )
        factors = tl.load(
            weight + inner[:, None] * columns + column[None, :],
            mask=used[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(values, factors, total, input_precision=PRECISION)

    if Y_LAST:
        tap = column // OUTPUTS
        channel = column - tap * OUTPUTS
    else:
        channel = column // taps
        tap = column - channel * taps
    if bias is not None:
        total += tl.load(bias + channel, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tap_w = tap % BLOCK[2]
    tap_h = tap // BLOCK[2] % BLOCK[1]
    tap_d = tap // (BLOCK[2] * BLOCK[1])
    # With the voxels side by side along the last axis where the runs of a block are short.
    turned: tl.constexpr = not Y_LAST and BLOCK[2] < 8
    result = tl.trans(total) if turned else total
    axis: tl.constexpr = 0 if turned else 1
    row = tl.expand_dims(row, axis)
    w = row % W * BLOCK[2]
    h = row // W % H * BLOCK[1]
    d = row // (W * H) % D * BLOCK[0]
    n = row // (W * H * D)
    if Y_LAST:
        corner = (((n * OD + d) * OH + h) * OW + w) * OUTPUTS
        shift = ((tap_d * OH + tap_h) * OW + tap_w) * OUTPUTS + channel
    else:
        corner = ((n * OUTPUTS * OD + d) * OH + h) * OW + w
        shift = ((channel * OD + tap_d) * OH + tap_h) * OW + tap_w
    tl.store(
        y + corner + tl.expand_dims(shift, 1 - axis),
        result.to(y.dtype.element_ty),
        mask=(row < rows) & tl.expand_dims(column < columns, 1 - axis),
    )


def constants(
    channels: int,
    outputs: int,
    kernel: Sequence[int],
    lasts: tuple[bool, bool],
    dtype: torch.dtype,
    precision: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `shuffle_kernel`, and how it is compiled.

    lasts: whether x and y are channels_last_3d.
    """
    plain = is_plain(dtype, precision)
    columns = triton.next_power_of_2(math.prod(kernel) * outputs)
    blocks: dict[str, Any] = {
        "CHANNELS": channels,
        "OUTPUTS": outputs,
        "BLOCK": tuple(kernel),
        "X_LAST": lasts[0],
        "Y_LAST": lasts[1],
        "PRECISION": precision,
        "ROWS": ROWS,
        "INNER": 16 if plain else inner_block(channels, dtype),
        "COLUMNS": min(32 if plain else 128, max(16, columns)),
    }
    warps = 8 if blocks["COLUMNS"] == 128 else 4
    return blocks, {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}


def shuffle(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Sequence[int],
    layout: torch.memory_format,
) -> torch.Tensor:
    """y[kernel * v + tap, o] = sum_c x[v, c] weight[c, o, tap] + bias[o], of `size`, in `layout`.

    weight [C, O, kD, kH, kW]; x is channels_last_3d or contiguous. Without a bias y may be larger
    than the blocks; it is 0 there.
    """
    kernel = weight.shape[2:]
    covered = all(n == m * k for n, m, k in zip(size[2:], x.shape[2:], kernel, strict=True))
    y = torch.empty(tuple(size), dtype=x.dtype, device=x.device, memory_format=layout)
    if not covered:
        y.zero_()
    lasts = (x.is_contiguous(memory_format=LAST), layout == LAST)
    blocks, options = constants(
        x.shape[1], weight.shape[1], kernel, lasts, x.dtype, dot_precision(x.dtype)
    )
    packed = weight.permute(0, 2, 3, 4, 1) if lasts[1] else weight
    rows = len(x) * math.prod(x.shape[2:])
    columns = triton.cdiv(math.prod(kernel) * weight.shape[1], blocks["COLUMNS"])
    shuffle_kernel[(triton.cdiv(rows, ROWS) * columns,)](
        x, packed.contiguous(), bias, y, *x.shape[2:], *size[2:], rows, **blocks, **options
    )
    return y
