"""3-D convolution and its grad_x with few channels on one side, as one kernel in Triton.

The implicit GEMM of `conv.py` with all that is summed over, (kD, kH, kW, C), as one axis: one
channel and a kernel of 3 are 27 products, which a step of 32 holds, where row by row of the kernel
nine steps of 16 would each hold 3. Where a row of channels is shorter than sixteen bytes, or the
volume is contiguous, single values are gathered with the voxels side by side.

Both layouts are taken, as a volume of one channel lies in both.
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

from petite_fast.backends.triton.conv import (
    adjoint_steps,
    dot_precision,
    inner_block,
    is_plain,
    locate,
)

ROWS = 128  # output voxels of a program
LAST = torch.channels_last_3d


@triton.jit
def few_channels_kernel(
    x,
    weight,
    bias,
    y,
    D,
    H,
    W,
    OUTPUTS,
    OD,
    OH,
    OW,
    rows,
    RD,
    RH,
    RW,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS voxels times COLUMNS channels of y, as `conv.conv_kernel`.

    x [N, D, H, W, CHANNELS] if X_LAST, else [N, CHANNELS, D, H, W]; y so too by Y_LAST. SINGLE: a
    block of x is [INNER, ROWS] and not [ROWS, INNER].
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(OUTPUTS, COLUMNS)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    program = program // column_blocks
    parities: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2] if ADJOINT else 1
    rows_axis: tl.constexpr = 0 if SINGLE else 1  # the axis to add to a row of voxels
    row = program // parities * ROWS + tl.arange(0, ROWS)
    n, out, first_read, first, count = locate(
        tl.expand_dims(row, rows_axis), program % parities, RD, RH, RW, KERNEL, STRIDE, PADDING,
        DILATION, STEP, INVERSE, ADJOINT,
    )  # fmt: skip
    in_d, in_h, in_w = first_read  # in a step of its own: Triton 3.6 knows no nested targets
    first_d, first_h, first_w = first
    count_d, count_h, count_w = count
    # Input voxels from one tap to the next; what stride and dilation share divides both.
    move_d: tl.constexpr = -(DILATION[0] * STEP[0] // STRIDE[0]) if ADJOINT else DILATION[0]
    move_h: tl.constexpr = -(DILATION[1] * STEP[1] // STRIDE[1]) if ADJOINT else DILATION[1]
    move_w: tl.constexpr = -(DILATION[2] * STEP[2] // STRIDE[2]) if ADJOINT else DILATION[2]
    inside = (tl.expand_dims(row, rows_axis) < rows) & (out[0] < OD) & (out[1] < OH) & (out[2] < OW)
    padded: tl.constexpr = ADJOINT or PADDING[0] + PADDING[1] + PADDING[2] > 0

    if X_LAST:
        place = (((n * D + in_d) * H + in_h) * W + in_w) * CHANNELS
        voxel_stride = CHANNELS
        channel_stride = 1
    else:
        place = ((n * CHANNELS * D + in_d) * H + in_h) * W + in_w
        voxel_stride = 1
        channel_stride = D * H * W

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    length = count_d * count_h * count_w * CHANNELS
    for start in range(0, length, INNER):
        inner = start + tl.arange(0, INNER)
        used = inner < length
        tap = inner // CHANNELS
        channel = inner - tap * CHANNELS
        tap_w = tap % count_w
        tap_h = tap // count_w % count_h
        tap_d = tap // (count_w * count_h)
        voxels = (tap_d * (move_d * H) + tap_h * move_h) * W + tap_w * move_w
        read = inside & tl.expand_dims(used, 1 - rows_axis)
        if padded:
            d = in_d + tl.expand_dims(tap_d * move_d, 1 - rows_axis)
            h = in_h + tl.expand_dims(tap_h * move_h, 1 - rows_axis)
            w = in_w + tl.expand_dims(tap_w * move_w, 1 - rows_axis)
            read = read & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        shift = tl.expand_dims(voxels * voxel_stride + channel * channel_stride, 1 - rows_axis)
        values = tl.load(x + place + shift, mask=read, other=0.0)
        if SINGLE:
            values = tl.trans(values)
        if ADJOINT:
            weight_row = (first_d + tap_d * STEP[0]) * KERNEL[1] + first_h + tap_h * STEP[1]
            weight_row = weight_row * KERNEL[2] + first_w + tap_w * STEP[2]
            weight_row = weight_row * CHANNELS + channel
        else:
            weight_row = inner
        factors = tl.load(
            weight + weight_row[:, None] * OUTPUTS + column[None, :],
            mask=used[:, None] & (column < OUTPUTS)[None, :],
            other=0.0,
        )
        total = tl.dot(values, factors, total, input_precision=PRECISION)

    if bias is not None:
        total += tl.load(bias + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    store_voxels(
        y, total.to(y.dtype.element_ty), row, column, program % parities, OUTPUTS, OD, OH, OW, rows,
        RD, RH, RW, STRIDE, ADJOINT, Y_LAST,
    )  # fmt: skip


@triton.jit
def store_voxels(
    y,
    values,
    row,
    column,
    parity,
    OUTPUTS,
    OD,
    OH,
    OW,
    rows,
    RD,
    RH,
    RW,
    STRIDE: tl.constexpr,
    ADJOINT: tl.constexpr,
    Y_LAST: tl.constexpr,
):
    """Write values [rows, columns]; in a contiguous volume with the voxels side by side."""
    if not Y_LAST:
        values = tl.trans(values)
    axis: tl.constexpr = 1 if Y_LAST else 0
    row = tl.expand_dims(row, axis)
    column = tl.expand_dims(column, 1 - axis)
    w = row % RW
    h = row // RW % RH
    d = row // (RW * RH) % RD
    n = row // (RW * RH * RD)
    if ADJOINT:
        w = w * STRIDE[2] + parity % STRIDE[2]
        h = h * STRIDE[1] + parity // STRIDE[2] % STRIDE[1]
        d = d * STRIDE[0] + parity // (STRIDE[2] * STRIDE[1])
    inside = (row < rows) & (d < OD) & (h < OH) & (w < OW)
    if Y_LAST:
        place = (((n * OD + d) * OH + h) * OW + w) * OUTPUTS + column
    else:
        place = (((n * OUTPUTS + column) * OD + d) * OH + h) * OW + w
    tl.store(y + place, values, mask=inside & (column < OUTPUTS))


def constants(
    channels: int,
    outputs: int,
    kernel: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    adjoint: bool,
    lasts: tuple[bool, bool],
    dtype: torch.dtype,
    precision: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `few_channels_kernel`, and how it is compiled.

    lasts: whether x and y are channels_last_3d.
    """
    stride, padding, dilation = map(tuple, geometry)
    step, inverse = adjoint_steps(stride, dilation, adjoint)
    plain = is_plain(dtype, precision)
    # Runs of sixteen bytes in memory: channels, or all of a row of a kernel that is its stride.
    whole = not adjoint and channels == 1 and kernel[2] == stride[2] and not any(padding)
    run = (kernel[2] if whole else channels) * dtype.itemsize
    single = not lasts[0] or run % 16 != 0
    taps = math.prod(math.ceil(k / s) for k, s in zip(kernel, step, strict=True))
    inner = 16 if plain else inner_block(taps * channels, dtype)
    # Single values have an address each, in registers, and so has each value of a result that is
    # written channel by channel; no matrix instruction, no narrow product. Larger blocks spill in
    # Triton 3.6.
    wide = single or not lasts[1]
    most = 32 if plain else 64 if wide else 128
    columns = min(most, max(16 if plain else 8, triton.next_power_of_2(outputs)))
    blocks: dict[str, Any] = {
        "CHANNELS": channels,
        "KERNEL": tuple(kernel),
        "STRIDE": stride,
        "PADDING": padding,
        "DILATION": dilation,
        "STEP": tuple(step),
        "INVERSE": tuple(inverse),
        "ADJOINT": adjoint,
        "X_LAST": lasts[0],
        "Y_LAST": lasts[1],
        "SINGLE": single,
        "PRECISION": precision,
        "ROWS": ROWS,
        "INNER": min(16, inner) if single else inner,
        "COLUMNS": columns,
    }
    warps = 8 if columns == 128 or single or (wide and columns == 64) else 4
    return blocks, {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}


def few_channels(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    adjoint: bool,
    layout: torch.memory_format,
) -> torch.Tensor:
    """y of `size` in `layout`: conv(x, weight, bias), or for `adjoint` grad_x with x as grad_y.

    weight [channels of y, of x, kD, kH, kW], for `adjoint` [of x, of y, ...]; geometry: stride,
    padding, dilation. x is channels_last_3d or contiguous.
    """
    packed = weight.permute(2, 3, 4, 0, 1) if adjoint else weight.permute(2, 3, 4, 1, 0)
    y = torch.empty(tuple(size), dtype=x.dtype, device=x.device, memory_format=layout)
    lasts = (x.is_contiguous(memory_format=LAST), layout == LAST)
    blocks, options = constants(
        x.shape[1], size[1], weight.shape[2:], geometry, adjoint, lasts, x.dtype,
        dot_precision(x.dtype),
    )  # fmt: skip
    parity = geometry[0] if adjoint else (1, 1, 1)
    rows = [triton.cdiv(n, s) for n, s in zip(size[2:], parity, strict=True)]
    count = size[0] * math.prod(rows)
    programs = triton.cdiv(count, ROWS) * math.prod(parity)
    few_channels_kernel[(programs * triton.cdiv(size[1], blocks["COLUMNS"]),)](
        x, packed.contiguous(), bias, y, *x.shape[2:], size[1], *size[2:], count, *rows, **blocks,
        **options,
    )  # fmt: skip
    return y
