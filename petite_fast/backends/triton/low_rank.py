"""The low-rank weight gradient of a 3-D convolution in Triton, for channels_last_3d tensors.

Both of its halves are sums over the taps: dA[tap] = x[tap]' G with G = grad_y B, and dB =
grad_y' t with t = sum of x[tap] A[tap]. So a program takes one block of taps and channels and a
share of the voxels, holds x and grad_y of a tile in shared memory, and makes from them G, its part
of t, its dA and its part of dB; G and t never reach memory. The programs of one share are
neighbours in the grid, which is meant to let all but the first find x and grad_y in the L2 cache.

Every program writes its sums to a place of its own; these are added up in a fixed order, so equal
inputs give equal bits.
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

from petite_fast.backends.triton.conv import dot_precision, is_plain
from petite_fast.backends.triton.tune import Config, configure

PROGRAMS = 1024  # about; a few for each multiprocessor. More would only write more partial sums.

# Output channels, rank and their product, rounded up to powers of two, up to which the sums stay in
# registers (looked up in compiled kernels); without matrix instructions a quarter of that product.
MOST_OUTPUTS, MOST_RANK, MOST_SUMS = 256, 32, 4096


@triton.jit
def low_rank_kernel(
    grad_y,
    x,
    lora_A,
    lora_B,
    part_A,
    part_B,
    part_bias,
    D,
    H,
    W,
    OUTPUTS,
    OD,
    OH,
    OW,
    rows,
    shares,
    RANK,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One block of (kW, C) in one row of taps (kD, kH), and every shares-th tile of ROWS voxels.

    grad_y [rows, OUTPUTS], rows = N * OD * OH * OW; x [N, D, H, W, CHANNELS];
    lora_A [RANK, CHANNELS, taps]; lora_B [OUTPUTS, RANK];
    part_A [shares, taps * CHANNELS, PADDED]; part_B [shares, blocks, OUTPUTS, PADDED];
    part_bias [shares, OUTPUTS].
    """
    inner_blocks: tl.constexpr = (KERNEL[2] * CHANNELS + INNER - 1) // INNER
    blocks: tl.constexpr = KERNEL[0] * KERNEL[1] * inner_blocks
    share = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    tap_h = block // inner_blocks % KERNEL[1]
    tap_d = block // (inner_blocks * KERNEL[1])
    inner = block % inner_blocks * INNER + tl.arange(0, INNER)
    tap_w = inner // CHANNELS
    channel = inner - tap_w * CHANNELS
    used = inner < KERNEL[2] * CHANNELS
    column = tl.arange(0, COLUMNS)
    real = column < OUTPUTS
    q = tl.arange(0, PADDED)
    tap_row = tap_d * KERNEL[1] + tap_h

    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    a = tl.load(
        lora_A + (q * (CHANNELS * taps))[None, :]
        + (channel * taps + tap_row * KERNEL[2] + tap_w)[:, None],
        mask=used[:, None] & (q < RANK)[None, :],
        other=0.0,
    ).to(x.dtype.element_ty)  # fmt: skip
    b = tl.load(
        lora_B + column[:, None] * RANK + q[None, :],
        mask=real[:, None] & (q < RANK)[None, :],
        other=0.0,
    ).to(x.dtype.element_ty)
    grad_A = tl.zeros([INNER, PADDED], tl.float32)
    grad_B = tl.zeros([COLUMNS, PADDED], tl.float32)
    grad_bias = tl.zeros([COLUMNS], tl.float32)

    for tile in range(share, tl.cdiv(rows, ROWS), shares):
        row = tile * ROWS + tl.arange(0, ROWS)
        d = row // (OW * OH) % OD * STRIDE[0] - PADDING[0] + tap_d
        h = row // OW % OH * STRIDE[1] - PADDING[1] + tap_h
        w = row % OW * STRIDE[2] - PADDING[2]
        n = row // (OW * OH * OD)
        tap = w[:, None] + tap_w[None, :]
        read = (row < rows) & (d >= 0) & (d < D) & (h >= 0) & (h < H)
        values = tl.load(
            x + ((((n * D + d) * H + h) * W + w) * CHANNELS)[:, None] + inner[None, :],
            mask=read[:, None] & used[None, :] & (tap >= 0) & (tap < W),
            other=0.0,
        )
        grads = tl.load(
            grad_y + (row * OUTPUTS)[:, None] + column[None, :],
            mask=(row < rows)[:, None] & real[None, :],
            other=0.0,
        )
        if WANT_A:
            g = tl.dot(grads, b, input_precision=PRECISION).to(x.dtype.element_ty)
            grad_A = tl.dot(tl.trans(values), g, grad_A, input_precision=PRECISION)
        if WANT_B:
            t = tl.dot(values, a, input_precision=PRECISION).to(x.dtype.element_ty)
            grad_B = tl.dot(tl.trans(grads), t, grad_B, input_precision=PRECISION)
        if WANT_BIAS:
            if block == 0:
                grad_bias += tl.sum(grads.to(tl.float32), axis=0)

    if WANT_A:
        place = (share * taps + tap_row * KERNEL[2]) * CHANNELS + inner
        tl.store(part_A + place[:, None] * PADDED + q[None, :], grad_A, mask=used[:, None])
    if WANT_B:
        place = (share * blocks + block) * OUTPUTS + column
        tl.store(part_B + place[:, None] * PADDED + q[None, :], grad_B, mask=real[:, None])
    if WANT_BIAS:
        if block == 0:
            tl.store(part_bias + share * OUTPUTS + column, grad_bias, mask=real)


def _padded(outputs: int, rank: int) -> tuple[int, int]:
    """What a matrix instruction takes: powers of two, 16 rows and 8 columns or more."""
    columns, width = triton.next_power_of_2(outputs), triton.next_power_of_2(rank)
    return max(16, columns), max(8, width)


def fits(outputs: int, rank: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the sums of a program stay in registers, and why not."""
    columns, padded = _padded(outputs, rank)
    most = MOST_SUMS // 4 if is_plain(dtype, dot_precision(dtype)) else MOST_SUMS
    if columns <= MOST_OUTPUTS and padded <= MOST_RANK and columns * padded <= most:
        return True, ""
    return False, (
        f"{outputs} output channels with rank {rank}: the sums do not stay in the registers"
    )


def constants(
    channels: int,
    outputs: int,
    rank: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    wants: tuple[bool, bool, bool],
    dtype: torch.dtype,
    precision: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `low_rank_kernel`, and how it is compiled."""
    columns, padded = _padded(outputs, rank)
    plain = is_plain(dtype, precision)
    sizes = (16,) if plain else (64, 32, 16) if dtype == torch.float32 else (128, 64, 32, 16)
    length = kernel[2] * channels
    # The least work: a block of x and all of grad_y are multiplied with rank columns, twice.
    inner = min(sizes, key=lambda size: math.ceil(length / size) * (size + columns))
    blocks: dict[str, Any] = {
        "CHANNELS": channels,
        "KERNEL": tuple(kernel),
        "STRIDE": tuple(stride),
        "PADDING": tuple(padding),
        **dict(zip(("WANT_A", "WANT_B", "WANT_BIAS"), wants, strict=True)),
        "PRECISION": precision,
        "ROWS": 32 if columns >= 256 or dtype == torch.float32 else 64,
        "INNER": inner,
        "COLUMNS": columns,
        "PADDED": padded,
    }
    warps = 8 if 2 * columns * padded >= MOST_SUMS or plain else 4
    # Left alone, ptxas keeps to 128 registers on sm_100 and spills a few.
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 255}
    return blocks, options


def low_rank_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    want_A: bool,
    want_B: bool,
    want_bias: bool,
    *,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A, B and the bias, in float32; empty if not wanted.

    dA[q, c, tap] = sum_v G[v, q] x[c, stride v + tap - padding], G = grad_y B; dB = grad_y' t,
    t = conv(x, A); db = sum_v grad_y[v]. G and t are rounded to the dtype of x. grad_y and x are
    channels_last_3d.
    """
    outputs, (r, channels, *kernel) = grad_y.shape[1], lora_A.shape
    blocks, options = constants(
        channels, outputs, r, kernel, stride, padding, (want_A, want_B, want_bias), x.dtype,
        dot_precision(x.dtype),
    )  # fmt: skip
    configure(blocks, options, config or {})
    taps, padded = math.prod(kernel), blocks["PADDED"]
    jobs = kernel[0] * kernel[1] * triton.cdiv(kernel[2] * channels, blocks["INNER"])
    rows = grad_y.numel() // outputs
    shares = max(1, min(PROGRAMS // jobs, triton.cdiv(rows, blocks["ROWS"])))

    def part(want: bool, *size: int) -> torch.Tensor:
        return grad_y.new_empty((shares, *size) if want else (0,), dtype=torch.float32)

    part_A = part(want_A, taps * channels, padded)
    part_B = part(want_B, jobs, outputs, padded)
    part_bias = part(want_bias, outputs)
    low_rank_kernel[(shares * jobs,)](
        grad_y, x, lora_A.contiguous(), lora_B.contiguous(), part_A, part_B, part_bias,
        *x.shape[2:], outputs, *grad_y.shape[2:], rows, shares, r, **blocks, **options,
    )  # fmt: skip
    grad_A, grad_B, grad_bias = part_A, part_B, part_bias
    if want_A:
        grad_A = part_A.sum(0)[:, :r].view(*kernel, channels, r).permute(4, 3, 0, 1, 2).contiguous()
    if want_B:
        grad_B = part_B.sum((0, 1))[:, :r].contiguous()
    if want_bias:
        grad_bias = part_bias.sum(0)
    return grad_A, grad_B, grad_bias
