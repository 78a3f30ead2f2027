"""Convolution geometry: what the arguments of a 3-D convolution mean, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Triple = tuple[int, int, int]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def triple(name: str, value: int | Sequence[int]) -> Triple:
    """`value` as three ints (one int stands for all axes).

    Raises:
        ValueError: not an int and not three ints.
    """
    if isinstance(value, int):
        return (value, value, value)
    values = tuple(value)
    if len(values) != 3 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name}: got {value!r}, wanted an int or three ints")
    return values


@dataclass(frozen=True)
class ConvGeometry:
    """Where the taps of a 3-D convolution (or transposed convolution) fall.

    `padding` is what the convolution itself applies: zeros, the same on both sides. Padding
    that is not of that kind (reflect, replicate, circular, or "same" with an even extent) is in
    `pad`, the six numbers of ``torch.nn.functional.pad`` (last axis first), with `pad_mode`;
    then `padding` is 0.
    """

    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: Triple = (0, 0, 0)
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"

    @staticmethod
    def of_op(
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> ConvGeometry:
        """Of the numbers behind the tensors of the ops `conv` and `conv_grad_input`, as checked."""
        axes: Any = (tuple(each) for each in (stride, padding, dilation, output_padding))
        strides, pads, dilations, extra = axes
        return ConvGeometry(strides, pads, dilations, groups, transposed, extra)

    @staticmethod
    def of_weight_op(
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] = (1, 1, 1),
        groups: int = 1,
    ) -> ConvGeometry:
        """Of the numbers of the op `conv_grad_weight`; a plain convolution's."""
        return ConvGeometry.of_op(stride, padding, dilation, False, (0, 0, 0), groups)

    def pointwise(self) -> ConvGeometry:
        """The 1x1x1 convolution with the same groups."""
        return ConvGeometry(groups=self.groups)

    def padded_size(self, spatial: Sequence[int]) -> list[int]:
        """Spatial size after the explicit padding."""
        if not self.pad:
            return list(spatial)
        sides = zip(self.pad[4::-2], self.pad[5::-2], strict=True)
        return [n + low + high for n, (low, high) in zip(spatial, sides, strict=True)]

    def output_size(self, spatial: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size for a (padded) spatial input size."""
        if self.transposed:
            return tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + 1 + o
                for n, s, p, d, k, o in zip(
                    spatial, self.stride, self.padding, self.dilation, kernel, self.output_padding,
                    strict=True,
                )
            )  # fmt: skip
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, d, k in zip(
                spatial, self.stride, self.padding, self.dilation, kernel, strict=True
            )
        )


def make_geometry(
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
) -> ConvGeometry:
    """The geometry that ``torch.nn.Conv3d`` / ``ConvTranspose3d`` would use for these arguments.

    Raises:
        ValueError: an argument outside what torch allows; name, got and wanted are in the text.
    """
    strides, dilations = triple("stride", stride), triple("dilation", dilation)
    out_pad = triple("output_padding", output_padding)
    if min(strides) < 1:
        raise ValueError(f"stride: got {stride!r}, wanted positive ints")
    if min(dilations) < 1:
        raise ValueError(f"dilation: got {dilation!r}, wanted positive ints")
    if groups < 1:
        raise ValueError(f"groups: got {groups!r}, wanted a positive int")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: got {padding_mode!r}, wanted one of {PADDING_MODES}")
    if transposed and padding_mode != "zeros":
        raise ValueError(
            f"padding_mode: got {padding_mode!r}, wanted 'zeros' for a transposed convolution"
        )
    if not transposed and any(out_pad):
        raise ValueError(
            f"output_padding: got {output_padding!r}, wanted 0 for a plain convolution"
        )

    if isinstance(padding, str):
        if transposed or padding not in ("same", "valid"):
            raise ValueError(
                f"padding: got {padding!r}, wanted ints"
                + ("" if transposed else ", 'same' or 'valid'")
            )
        if padding == "same" and max(strides) > 1:
            raise ValueError(f"padding: 'same' wants stride 1, got stride {stride!r}")
        extent = 1 if padding == "same" else 0
        total = [extent * d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in triple("padding", padding)]
    if min(min(side) for side in sides) < 0:
        raise ValueError(f"padding: got {padding!r}, wanted non-negative ints")

    even = all(low == high for low, high in sides)
    if even and (padding_mode == "zeros" or not any(low for low, _ in sides)):
        pads = (sides[0][0], sides[1][0], sides[2][0])
        return ConvGeometry(strides, pads, dilations, groups, transposed, out_pad)
    flat = tuple(n for side in reversed(sides) for n in side)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return ConvGeometry(strides, (0, 0, 0), dilations, groups, pad=flat, pad_mode=mode)


def pad_input(x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """x [N, C, D, H, W] with the explicit padding of `geometry`, x itself where there is none."""
    if not geometry.pad:
        return x
    return F.pad(x, list(geometry.pad), mode=geometry.pad_mode)


def unpad_gradient(grad: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """Adjoint of `pad_input`: each border voxel's gradient goes back to where it was copied from.

    Whole border slabs are added one by one in a fixed order, so the result is deterministic on
    every device (an index_add is not, on CUDA).
    """
    if not geometry.pad:
        return grad
    for axis, (low, high) in zip(
        (4, 3, 2), zip(geometry.pad[::2], geometry.pad[1::2], strict=True), strict=True
    ):
        if low == 0 and high == 0:
            continue
        size = grad.shape[axis] - low - high
        inner = grad.narrow(axis, low, size)
        if geometry.pad_mode == "constant":
            grad = inner
            continue
        inner = inner.clone()
        for position in [*range(low), *range(low + size, low + size + high)]:
            source = _source(position - low, size, geometry.pad_mode)
            inner.select(axis, source).add_(grad.select(axis, position))
        grad = inner
    return grad


def _source(index: int, size: int, mode: str) -> int:
    """Which of 0..size-1 the padded `index` (outside that range) is a copy of."""
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    return -index if index < 0 else 2 * (size - 1) - index
