"""3-D convolution and its grad_x for channels_last_3d tensors in Triton, as one kernel.

Implicit GEMM: the rows are output voxels, the columns output channels. What is summed over is a
row of the kernel times the input channels, (kW, C): with dilation 1 they lie side by side in
memory, so few channels fill a matrix instruction too. Padding is a mask on the loads.

grad_x is the same sum over grad_y with taps and channels exchanged. With a stride, x[i] has only
taps k with (i + padding - dilation * k) divisible by the stride; these are the same for all i of
one remainder (parity) modulo the stride, so each parity is a dense convolution of its own: no
scatter, no atomics, every voxel written once.
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

from petite_fast.backends.triton import boxes
from petite_fast.backends.triton.tune import Config, configure

ROWS = 128  # output voxels of a program


@triton.jit
def _axis_taps(
    parity,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Taps first, first + STEP, ... (`count` of them); `offset`: what is read for the first."""
    if ADJOINT:
        # dilation * k = parity + padding (mod stride), divided by what stride and dilation share.
        shared: tl.constexpr = STRIDE // STEP
        first = (parity + PADDING) // shared * INVERSE % STEP
        count = tl.where((parity + PADDING) % shared == 0, (KERNEL - first + STEP - 1) // STEP, 0)
        offset = (parity + PADDING - DILATION * first) // STRIDE  # no remainder where count > 0
    else:
        first = 0
        count = KERNEL
        offset = -PADDING
    return first, count, offset


@triton.jit
def locate(
    row,
    parity,
    RD,
    RH,
    RW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Sample, output voxel, input voxel of the first tap; first and number of taps per axis."""
    rw = row % RW
    rh = row // RW % RH
    rd = row // (RW * RH) % RD
    n = row // (RW * RH * RD)
    parity_w = parity % STRIDE[2]
    parity_h = parity // STRIDE[2] % STRIDE[1]
    parity_d = parity // (STRIDE[2] * STRIDE[1])
    first_d, count_d, offset_d = _axis_taps(
        parity_d, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], STEP[0], INVERSE[0], ADJOINT
    )
    first_h, count_h, offset_h = _axis_taps(
        parity_h, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], STEP[1], INVERSE[1], ADJOINT
    )
    first_w, count_w, offset_w = _axis_taps(
        parity_w, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2], STEP[2], INVERSE[2], ADJOINT
    )
    first = (first_d, first_h, first_w)
    count = (count_d, count_h, count_w)
    if ADJOINT:
        out = (
            rd * STRIDE[0] + parity_d,
            rh * STRIDE[1] + parity_h,
            rw * STRIDE[2] + parity_w,
        )
        read = (rd + offset_d, rh + offset_h, rw + offset_w)
    else:
        out = (rd, rh, rw)
        read = (rd * STRIDE[0] + offset_d, rh * STRIDE[1] + offset_h, rw * STRIDE[2] + offset_w)
    return n, out, read, first, count


@triton.jit
def conv_kernel(
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
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS voxels times COLUMNS channels of y [N, OD, OH, OW, OUTPUTS].

    x [N, D, H, W, CHANNELS]; weight [kD, kH, kW, CHANNELS, OUTPUTS]; bias [OUTPUTS] or None.
    rows = N * RD * RH * RW: the voxels of y, for ADJOINT those of one parity.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(OUTPUTS, COLUMNS)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    program = program // column_blocks
    parities: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2] if ADJOINT else 1
    row = program // parities * ROWS + tl.arange(0, ROWS)
    n, out, first_read, first, count = locate(
        row, program % parities, RD, RH, RW, KERNEL, STRIDE, PADDING, DILATION, STEP, INVERSE,
        ADJOINT,
    )  # fmt: skip
    out_d, out_h, out_w = out  # in a step of its own: Triton 3.6 knows no nested targets
    in_d, in_h, in_w = first_read
    first_d, first_h, first_w = first
    count_d, count_h, count_w = count
    # Input voxels from one tap to the next; what stride and dilation share divides both.
    move_d: tl.constexpr = -(DILATION[0] * STEP[0] // STRIDE[0]) if ADJOINT else DILATION[0]
    move_h: tl.constexpr = -(DILATION[1] * STEP[1] // STRIDE[1]) if ADJOINT else DILATION[1]
    move_w: tl.constexpr = -(DILATION[2] * STEP[2] // STRIDE[2]) if ADJOINT else DILATION[2]
    inside = (row < rows) & (out_d < OD) & (out_h < OH) & (out_w < OW)
    voxel = ((n * D + in_d) * H + in_h) * W + in_w

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    inner_blocks = tl.cdiv(count_w * CHANNELS, INNER)
    for step in range(count_d * count_h * inner_blocks):
        tap_h = step // inner_blocks % count_h
        tap_d = step // (inner_blocks * count_h)
        inner = step % inner_blocks * INNER + tl.arange(0, INNER)
        tap_w = inner // CHANNELS
        channel = inner - tap_w * CHANNELS
        used = inner < count_w * CHANNELS

        d = in_d + tap_d * move_d
        h = in_h + tap_h * move_h
        w = in_w[:, None] + (tap_w * move_w)[None, :]
        read = inside & (d >= 0) & (d < D) & (h >= 0) & (h < H)
        place = (voxel + (tap_d * move_d * H + tap_h * move_h) * W) * CHANNELS
        values = tl.load(
            x + place[:, None] + (tap_w * (move_w * CHANNELS) + channel)[None, :],
            mask=read[:, None] & used[None, :] & (w >= 0) & (w < W),
            other=0.0,
        )
        tap = (first_d + tap_d * STEP[0]) * KERNEL[1] + first_h + tap_h * STEP[1]
        tap = tap * KERNEL[2] + first_w + tap_w * STEP[2]
        factors = tl.load(
            weight + (tap * CHANNELS + channel)[:, None] * OUTPUTS + column[None, :],
            mask=used[:, None] & (column < OUTPUTS)[None, :],
            other=0.0,
        )
        total = tl.dot(values, factors, total, input_precision=PRECISION)

    if bias is not None:
        total += tl.load(bias + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    target = (((n * OD + out_d) * OH + out_h) * OW + out_w) * OUTPUTS
    tl.store(
        y + target[:, None] + column[None, :],
        total.to(y.dtype.element_ty),
        mask=inside[:, None] & (column < OUTPUTS)[None, :],
    )


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as cuDNN's convolutions are allowed to."""
    if dtype != torch.float32:
        return "ieee"
    per_op = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9
    allowed = torch.backends.cudnn.allow_tf32 if per_op is None else per_op.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def is_plain(dtype: torch.dtype, precision: str) -> bool:
    """Whether products are made without matrix instructions."""
    return dtype == torch.float32 and precision == "ieee"


def inner_block(length: int, dtype: torch.dtype) -> int:
    """The block, of 128 bytes or less, that pads `length` least; 16 if all pad over a third."""
    blocks = [block for block in (64, 32) if block * dtype.itemsize <= 128]
    block = min(blocks, key=lambda block: math.ceil(length / block) * block)
    return block if 3 * block * math.ceil(length / block) <= 4 * length else 16


def adjoint_steps(
    stride: Sequence[int], dilation: Sequence[int], adjoint: bool
) -> tuple[list[int], list[int]]:
    """Per axis: from one tap of a parity to the next, and the inverse that finds the first."""
    if not adjoint:
        return [1, 1, 1], [0, 0, 0]
    shared = [math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    step = [s // g for s, g in zip(stride, shared, strict=True)]
    inverse = [pow(d // g, -1, n) for d, g, n in zip(dilation, shared, step, strict=True)]
    return step, inverse


def constants(
    channels: int,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    adjoint: bool,
    dtype: torch.dtype,
    precision: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `conv_kernel`, and how it is compiled."""
    step, inverse = adjoint_steps(stride, dilation, adjoint)
    plain = is_plain(dtype, precision)
    # Where channels do not come in sixteen bytes, each value has an address in a register.
    single = channels * dtype.itemsize % 16 != 0 or outputs % 16 != 0
    most = 32 if plain else 64 if single else 128
    columns = min(most, max(16, triton.next_power_of_2(outputs)))
    length = math.ceil(kernel[2] / step[2]) * channels
    blocks: dict[str, Any] = {
        "CHANNELS": channels,
        "KERNEL": tuple(kernel),
        "STRIDE": tuple(stride),
        "PADDING": tuple(padding),
        "DILATION": tuple(dilation),
        "STEP": tuple(step),
        "INVERSE": tuple(inverse),
        "ADJOINT": adjoint,
        "PRECISION": precision,
        "ROWS": ROWS,
        "INNER": 16 if plain or single else inner_block(length, dtype),
        "COLUMNS": columns,
    }
    warps = 8 if columns == 128 or single else 4
    return blocks, {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spatial: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    adjoint: bool,
    config: Config,
) -> torch.Tensor:
    """y of size `spatial`; weight [kD, kH, kW, channels of x, channels of y], contiguous."""
    outputs = weight.shape[4]
    y = torch.empty(
        (len(x), outputs, *spatial), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last_3d,
    )  # fmt: skip
    if "BOXES" in config:
        if boxes.fits(x, weight, geometry[0], geometry[2]):
            return boxes.conv(x, weight, bias, y, geometry[1], adjoint, config)
        config = {}  # measured with tensors at addresses that the copy engine takes
    blocks, options = constants(
        x.shape[1], outputs, weight.shape[:3], *geometry, adjoint, x.dtype, dot_precision(x.dtype)
    )
    configure(blocks, options, config)
    parity = geometry[0] if adjoint else (1, 1, 1)
    rows = [triton.cdiv(n, s) for n, s in zip(spatial, parity, strict=True)]
    count = len(y) * math.prod(rows)
    programs = triton.cdiv(count, blocks["ROWS"]) * math.prod(parity)
    conv_kernel[(programs * triton.cdiv(outputs, blocks["COLUMNS"]),)](
        x, weight, bias, y, *x.shape[2:], outputs, *spatial, count, *rows, **blocks, **options
    )
    return y


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    spatial: Sequence[int],
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """y = conv(x, weight, bias) of size `spatial`, one group; x and y channels_last_3d."""
    packed = weight.permute(2, 3, 4, 1, 0).contiguous()
    return _run(x, packed, bias, spatial, (stride, padding, dilation), False, config or {})


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: torch.Tensor | None = None,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """grad_x of `conv`, plus a bias: a transposed convolution. All volumes channels_last_3d."""
    packed = weight.permute(2, 3, 4, 0, 1).contiguous()
    return _run(
        grad_y, packed, bias, input_size[2:], (stride, padding, dilation), True, config or {}
    )
