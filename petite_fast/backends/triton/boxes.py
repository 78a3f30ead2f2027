"""3-D convolution of stride 1 for GPUs with a tensor copy engine: implicit GEMM by shifted boxes.

x is described as [N, D, H, W, C]. A program makes a box of output voxels; for each tap it loads the
box of x at the shifted place, which the copy engine fills with zeros where it lies outside x: that
is the padding, and no addresses are made. The tile of y is cut at its edges the same way. grad_x is
the same sum over grad_y, with the shifts turned round.
"""

# mypy: disallow-untyped-defs=False
# (a kernel's arguments are annotated for Triton, which looks the names up)

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from petite_fast.backends.triton.tune import Config, configure

CAPABILITY = (9, 0)  # the oldest with the copy engine
ROWS = 128  # output voxels of a program
LARGEST_KERNEL = 3  # per axis


@triton.jit
def boxes_kernel(
    x,
    weight,
    bias,
    y,
    OUTPUTS,
    OD,
    OH,
    OW,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    ADJOINT: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A box of TILE_D x TILE_H x TILE_W voxels times COLUMNS channels of y.

    x, weight and y are descriptors of [N, D, H, W, CHANNELS], [kD * kH * kW, CHANNELS, OUTPUTS] and
    [N, OD, OH, OW, OUTPUTS]; bias [OUTPUTS] or None.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(OUTPUTS, COLUMNS)
    column = program % column_blocks * COLUMNS
    program = program // column_blocks
    boxes_w = tl.cdiv(OW, TILE_W)
    boxes_h = tl.cdiv(OH, TILE_H)
    boxes_d = tl.cdiv(OD, TILE_D)
    w = program % boxes_w * TILE_W
    h = program // boxes_w % boxes_h * TILE_H
    d = program // (boxes_w * boxes_h) % boxes_d * TILE_D
    n = program // (boxes_w * boxes_h * boxes_d)

    rows: tl.constexpr = TILE_D * TILE_H * TILE_W
    inner_blocks: tl.constexpr = (CHANNELS + INNER - 1) // INNER
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    sign: tl.constexpr = -1 if ADJOINT else 1
    total = tl.zeros([rows, COLUMNS], tl.float32)
    for step in range(taps * inner_blocks):
        inner = step % inner_blocks * INNER
        tap = step // inner_blocks
        shift_d = sign * (tap // (KERNEL[1] * KERNEL[2]) - PADDING[0])
        shift_h = sign * (tap // KERNEL[2] % KERNEL[1] - PADDING[1])
        shift_w = sign * (tap % KERNEL[2] - PADDING[2])
        box = x.load([n, d + shift_d, h + shift_h, w + shift_w, inner])
        factors = weight.load([tap, inner, column])
        total = tl.dot(tl.reshape(box, [rows, INNER]), tl.reshape(factors, [INNER, COLUMNS]), total)

    if bias is not None:
        columns = column + tl.arange(0, COLUMNS)
        total += tl.load(bias + columns, mask=columns < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    box = tl.reshape(total.to(y.dtype), [1, TILE_D, TILE_H, TILE_W, COLUMNS])
    y.store([n, d, h, w, column], box)


def fits(
    x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether `conv` takes these; weight [kD, kH, kW, channels of x, of y] or these exchanged."""
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:  # an older Triton
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return False
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and set(stride) == set(dilation) == {1}
        and max(weight.shape[:3]) <= LARGEST_KERNEL
        and all(n >= 16 and n * x.itemsize % 16 == 0 for n in weight.shape[3:])
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def constants(
    channels: int,
    outputs: int,
    kernel: Sequence[int],
    padding: Sequence[int],
    spatial: Sequence[int],
    adjoint: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `boxes_kernel` for y of size `spatial`; how it is compiled."""
    tile_w = min(16, triton.next_power_of_2(spatial[2]))
    tile_h = min(4, triton.next_power_of_2(spatial[1]))
    columns = min(128, max(16, triton.next_power_of_2(outputs)))
    blocks = {
        "CHANNELS": channels,
        "KERNEL": tuple(kernel),
        "PADDING": tuple(padding),
        "ADJOINT": adjoint,
        "TILE_D": ROWS // (tile_h * tile_w),
        "TILE_H": tile_h,
        "TILE_W": tile_w,
        # 16 where more would multiply over a third of zeros.
        "INNER": next(n for n in (64, 32, 16) if 3 * n * math.ceil(channels / n) <= 4 * channels
                      or n == 16),
        "COLUMNS": columns,
    }  # fmt: skip
    warps = 8 if columns == 128 else 4
    return blocks, {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}


def block_shapes(blocks: dict[str, Any]) -> dict[str, list[int]]:
    """What is loaded and stored at once, of x, weight and y."""
    tile = [blocks[f"TILE_{axis}"] for axis in "DHW"]
    inner, columns = blocks["INNER"], blocks["COLUMNS"]
    return {"x": [1, *tile, inner], "weight": [1, inner, columns], "y": [1, *tile, columns]}


def _describe(tensor: torch.Tensor, shape: Sequence[int], block: list[int]) -> Any:
    """A descriptor of a dense tensor; torch says other strides of an axis of size 1."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return TensorDescriptor(tensor, list(shape), strides, block)


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    padding: Sequence[int],
    adjoint: bool,
    config: Config,
) -> torch.Tensor:
    """Fill and return y; only for what `fits`. x and y channels_last_3d.

    y[i] = bias + sum over taps k of x[i + k - padding] . weight[k], for `adjoint` of
    x[i - k + padding]; weight [kD, kH, kW, channels of x, channels of y], contiguous.
    """
    channels, outputs = weight.shape[3:]
    spatial = y.shape[2:]
    blocks, options = constants(channels, outputs, weight.shape[:3], padding, spatial, adjoint)
    configure(blocks, options, {k: v for k, v in config.items() if k != "BOXES"})
    shapes = block_shapes(blocks)
    tile = shapes["y"][1:4]
    boxes = len(y) * math.prod(triton.cdiv(n, t) for n, t in zip(spatial, tile, strict=True))
    boxes_kernel[(boxes * triton.cdiv(outputs, blocks["COLUMNS"]),)](
        _describe(x, [len(x), *x.shape[2:], channels], shapes["x"]),
        _describe(weight, [math.prod(weight.shape[:3]), channels, outputs], shapes["weight"]),
        bias,
        _describe(y, [len(y), *spatial, outputs], shapes["y"]),
        outputs, *spatial, **blocks, **options,
    )  # fmt: skip
    return y
