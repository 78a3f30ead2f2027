"""The bottleneck adapter y = x + up(act(down(x))) in Triton, one pass forward and one backward.

A program holds the hidden layer of a tile of tokens in registers; it never reaches memory. Backward
takes x and grad_y of a tile, all channels at once, makes grad_x and adds the tile's part to the
four gradients that sum over tokens. These lie in registers, so channels and hidden ones are bounded
(`fits_backward`); every program writes its sums to a place of its own, and they are added up in a
fixed order, so equal inputs give equal bits.

Tokens [T, C] and volumes [N, C, S] are both taken as they lie.
"""

# mypy: disallow-untyped-defs=False
# (a kernel's arguments are annotated for Triton, which looks the names up)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from petite_fast.backends.triton.conv import is_plain

PROGRAMS = 512  # of a backward pass, about; more would only write more partial sums
MOST_HIDDEN = 128  # whose products stay in the registers in a forward pass
# The same for the sums of a backward pass: (channels, hidden channels), rounded up to powers of
# two; looked up in compiled kernels. The second where x and products have 16 bits; without matrix
# instructions half as many hidden ones.
MOST_SUMS = ((64, 64), (128, 16))


@triton.jit
def _load(x, row, channel, rows, SPACE, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """x of some tokens and channels [rows, channels]; voxels side by side in a volume."""
    if LAST:
        values = tl.load(
            x + row[:, None] * CHANNELS + channel[None, :],
            mask=(row < rows)[:, None] & (channel < CHANNELS)[None, :],
            other=0.0,
        )
    else:
        place = row + row // SPACE * ((CHANNELS - 1) * SPACE)
        values = tl.trans(
            tl.load(
                x + place[None, :] + (channel * SPACE)[:, None],
                mask=(row < rows)[None, :] & (channel < CHANNELS)[:, None],
                other=0.0,
            )
        )
    return values


@triton.jit
def _store(y, values, row, channel, rows, SPACE, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """The inverse of `_load`."""
    values = values.to(y.dtype.element_ty)
    if LAST:
        tl.store(
            y + row[:, None] * CHANNELS + channel[None, :],
            values,
            mask=(row < rows)[:, None] & (channel < CHANNELS)[None, :],
        )
    else:
        place = row + row // SPACE * ((CHANNELS - 1) * SPACE)
        tl.store(
            y + place[None, :] + (channel * SPACE)[:, None],
            tl.trans(values),
            mask=(row < rows)[None, :] & (channel < CHANNELS)[:, None],
        )


@triton.jit
def _vector(bias, index, count):
    """Some of a vector of `count`, in float32."""
    return tl.load(bias + index, mask=index < count, other=0.0).to(tl.float32)


@triton.jit
def _normal_cdf(inner):
    return 0.5 + 0.5 * tl.erf(inner * 0.7071067811865476)


@triton.jit
def forward_kernel(
    x,
    down,
    down_bias,
    up,
    up_bias,
    y,
    rows,
    SPACE,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GELU: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    PADDED: tl.constexpr,
):
    """y of ROWS tokens. x and y [rows, CHANNELS] if LAST, else [rows / SPACE, CHANNELS, SPACE].

    down [CHANNELS, HIDDEN] and up [HIDDEN, CHANNELS], in the dtype of the products.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, PADDED)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, CHANNELS, INNER):
        channel = start + tl.arange(0, INNER)
        values = _load(x, row, channel, rows, SPACE, CHANNELS, LAST).to(down.dtype.element_ty)
        factors = tl.load(
            down + channel[:, None] * HIDDEN + h[None, :],
            mask=(channel < CHANNELS)[:, None] & (h < HIDDEN)[None, :],
            other=0.0,
        )
        total = tl.dot(values, factors, total, input_precision=PRECISION)
    total += _vector(down_bias, h, HIDDEN)[None, :]
    if GELU:
        hidden = total * _normal_cdf(total)
    else:
        hidden = tl.where(total <= 0, 0.0, total)  # a NaN stays
    hidden = hidden.to(down.dtype.element_ty)
    for start in range(0, CHANNELS, INNER):
        channel = start + tl.arange(0, INNER)
        factors = tl.load(
            up + h[:, None] * CHANNELS + channel[None, :],
            mask=(channel < CHANNELS)[None, :] & (h < HIDDEN)[:, None],
            other=0.0,
        )
        change = tl.dot(hidden, factors, input_precision=PRECISION)
        change += _vector(up_bias, channel, CHANNELS)[None, :]
        # The second time from the cache.
        values = _load(x, row, channel, rows, SPACE, CHANNELS, LAST).to(tl.float32)
        _store(y, values + change, row, channel, rows, SPACE, CHANNELS, LAST)


@triton.jit
def backward_kernel(
    grad_y,
    x,
    down,
    down_bias,
    up,
    grad_x,
    part_down,
    part_down_bias,
    part_up,
    part_up_bias,
    rows,
    shares,
    SPACE,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GELU: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """grad_x and the sums of every shares-th tile of ROWS tokens.

    Layouts as in `forward_kernel`; part_down and part_up [shares, CHANNELS, HIDDEN],
    part_down_bias [shares, HIDDEN], part_up_bias [shares, CHANNELS], in float32.
    """
    share = tl.program_id(0)
    channel = tl.arange(0, COLUMNS)
    h = tl.arange(0, PADDED)
    real = (channel < CHANNELS)[:, None] & (h < HIDDEN)[None, :]
    into = tl.load(down + channel[:, None] * HIDDEN + h[None, :], mask=real, other=0.0)
    back = tl.load(up + h[None, :] * CHANNELS + channel[:, None], mask=real, other=0.0)
    bias = _vector(down_bias, h, HIDDEN)
    grad_down = tl.zeros([COLUMNS, PADDED], tl.float32)
    grad_up = tl.zeros([COLUMNS, PADDED], tl.float32)
    grad_down_bias = tl.zeros([PADDED], tl.float32)
    grad_up_bias = tl.zeros([COLUMNS], tl.float32)

    for tile in range(share, tl.cdiv(rows, ROWS), shares):
        row = tile * ROWS + tl.arange(0, ROWS)
        values = _load(x, row, channel, rows, SPACE, CHANNELS, LAST).to(down.dtype.element_ty)
        wide = _load(grad_y, row, channel, rows, SPACE, CHANNELS, LAST)
        grads = wide.to(down.dtype.element_ty)
        inner = tl.dot(values, into, input_precision=PRECISION) + bias[None, :]
        grad_inner = tl.dot(grads, back, input_precision=PRECISION)
        if GELU:
            cdf = _normal_cdf(inner)
            hidden = inner * cdf
            density = 0.3989422804014327 * tl.exp(-0.5 * inner * inner)
            grad_inner = grad_inner * (cdf + inner * density)
        else:
            hidden = tl.where(inner <= 0, 0.0, inner)
            grad_inner = tl.where(inner > 0, grad_inner, 0.0)
        # Tokens past the end have grad_y 0, so what their inner is adds nothing.
        grad_down_bias += tl.sum(grad_inner, axis=0)
        grad_up_bias += tl.sum(wide.to(tl.float32), axis=0)
        hidden = hidden.to(down.dtype.element_ty)
        grad_inner = grad_inner.to(down.dtype.element_ty)
        grad_down = tl.dot(tl.trans(values), grad_inner, grad_down, input_precision=PRECISION)
        grad_up = tl.dot(tl.trans(grads), hidden, grad_up, input_precision=PRECISION)
        change = tl.dot(grad_inner, tl.trans(into), input_precision=PRECISION)
        _store(grad_x, wide.to(tl.float32) + change, row, channel, rows, SPACE, CHANNELS, LAST)

    place = (share * CHANNELS + channel)[:, None] * HIDDEN + h[None, :]
    tl.store(part_down + place, grad_down, mask=real)
    tl.store(part_up + place, grad_up, mask=real)
    tl.store(part_down_bias + share * HIDDEN + h, grad_down_bias, mask=h < HIDDEN)
    tl.store(part_up_bias + share * CHANNELS + channel, grad_up_bias, mask=channel < CHANNELS)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as cuBLAS is allowed to."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _padded(channels: int, hidden: int) -> tuple[int, int]:
    """Powers of two, 16 or more, which is what a product sums over at least."""
    columns, width = (max(16, triton.next_power_of_2(n)) for n in (channels, hidden))
    return columns, width


def fits_forward(hidden: int) -> tuple[bool, str]:
    """Whether the hidden layer of a tile stays in registers, and why not."""
    if hidden <= MOST_HIDDEN:
        return True, ""
    return False, f"{hidden} hidden channels do not stay in the registers, up to {MOST_HIDDEN} do"


def fits_backward(
    channels: int, hidden: int, x_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[bool, str]:
    """Whether the sums of a program stay in registers, and why not. dtype: of the products."""
    columns, width = _padded(channels, hidden)
    plain = is_plain(dtype, dot_precision(dtype))
    sums = MOST_SUMS[:1] if x_dtype == torch.float32 else MOST_SUMS
    if any(columns <= c and width <= (h // 2 if plain else h) for c, h in sums):
        return True, ""
    return False, f"{channels} channels with {hidden} hidden: the sums do not stay in the registers"


def constants(
    channels: int,
    hidden: int,
    activation: str,
    last: bool,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of a kernel, and how it is compiled. dtype: of the products."""
    columns, width = _padded(channels, hidden)
    plain = is_plain(dtype, precision)
    blocks: dict[str, Any] = {
        "CHANNELS": channels,
        "HIDDEN": hidden,
        "GELU": activation == "gelu",
        "LAST": last,
        "PRECISION": precision,
        "PADDED": width,
    }
    options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    if backward:
        few = columns > 64 or x_dtype != dtype or (plain and not last)
        blocks.update({"ROWS": 16 if few else 32, "COLUMNS": columns})
        options["maxnreg"] = 255
    else:
        inner = 16 if plain else min(columns, 128 // dtype.itemsize)
        blocks.update({"ROWS": 64 if plain or width > 64 else 128, "INNER": inner})
        options["num_warps"] = 8 if width > 32 or plain else 4
    return blocks, options


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = x + Wu act(Wd x + bd) + bu; x contiguous, [..., C] or `volumes` [N, C, ...]."""
    y = torch.empty_like(x)
    hidden, channels = down_weight.shape
    rows = x.numel() // channels
    blocks, options = constants(
        channels, hidden, activation, not volumes, x.dtype, dtype, dot_precision(dtype), False
    )
    forward_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        x, _turned(down_weight, dtype), down_bias, _turned(up_weight, dtype), up_bias, y, rows,
        rows // len(x) if volumes else 1, **blocks, **options,
    )  # fmt: skip
    return y


def bottleneck_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x and the gradients of Wd, bd, Wu and bu; grad_y and x contiguous."""
    hidden, channels = down_weight.shape
    rows = x.numel() // channels
    blocks, options = constants(
        channels, hidden, activation, not volumes, x.dtype, dtype, dot_precision(dtype), True
    )
    shares = min(PROGRAMS, triton.cdiv(rows, blocks["ROWS"]))
    grad_x = torch.empty_like(x)
    sizes = ((channels, hidden), (hidden,), (channels, hidden), (channels,))
    parts = [x.new_empty((shares, *size), dtype=torch.float32) for size in sizes]
    backward_kernel[(shares,)](
        grad_y, x, _turned(down_weight, dtype), down_bias, _turned(up_weight, dtype), grad_x,
        *parts, rows, shares, rows // len(x) if volumes else 1, **blocks, **options,
    )  # fmt: skip
    down, down_bias_, up, up_bias = (part.sum(0) for part in parts)
    return (
        grad_x,
        down.t().to(down_weight.dtype).contiguous(),
        down_bias_.to(down_bias.dtype),
        up.to(up_weight.dtype),
        up_bias.to(up_weight.dtype),
    )


def _turned(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W' in the dtype of the products, its rows side by side."""
    return weight.t().to(dtype).contiguous()
