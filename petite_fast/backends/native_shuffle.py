"""Convolutions whose kernel is their stride, as matrix products over blocks that do not overlap.

With `matrix` the blocks of the fine volume (csrc/common/shuffle.h), R and K = C * kD * kH * kW the
weight's two sides, per sample:

    plain y [R, voxels] = W [R, K] matrix        transposed matrix = W' x [R, voxels]
    grad_weight = coarse [R, voxels] matrix'

and each one's grad_x is the other. The rows of blocks are taken in pieces, so that the matrix stays
in L2 between the product (MKL's, through torch) and the shuffle.

Measured on one thread of an EPYC (Zen 4), 64 -> 32 channels, k2s2 at 24^3, contiguous: transposed
7.2 ms (oneDNN 25 to 35, the product alone 5.6), grad_x 7.3 (11, 6.4), grad_weight 7.1 (7.1, 6.0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from petite_fast.backends import native
from petite_fast.backends.eager import conv_layout
from petite_fast.backends.geometry import ConvGeometry

# Codes of csrc/common/shuffle.h.
_COLUMNS, _ROWS, _CHANNELS_LAST = range(3)

PIECE_ELEMENTS = 1 << 18  # of the matrix per thread: the size of a 1 MB L2
LARGE = (1 << 21) + 1  # elements of a volume; LARGE_SHARED with more than one thread
LARGE_SHARED = 1 << 23
FEW_CHANNELS = 2  # of which oneDNN makes 16 for a weight gradient (measured: 0.4 to 0.8)
PIECE_VOXELS = 256  # below that, reading the weight again for every piece costs more
LONG_SEGMENT = 8  # elements of a block's row that are moved together rather than interleaved


def can_run_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv` takes these arguments, and why not."""
    g = ConvGeometry.of_op(*numbers)
    if max(g.output_padding) > 0:
        return False, "output_padding is not 0"
    possible, reason = _can_run((x, weight, bias), weight.shape, g)
    if not possible or g.transposed:
        return possible, reason
    if any(n < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        return False, "the kernel does not fit the volume"
    if conv_layout(x, weight) == torch.channels_last_3d:
        return False, "oneDNN is as fast on channels-last volumes"
    return _is_read_faster(x)


def can_run_conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_input` takes these arguments, and why not."""
    return can_run_conv(grad_y, weight, None, *_adjoint(*numbers))


def can_run_conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> tuple[bool, str]:
    """Whether `conv_grad_weight` takes these arguments, and why not."""
    possible, reason = _can_run((grad_y, x), weight_size, ConvGeometry.of_weight_op(*numbers))
    if not possible or x.shape[1] <= FEW_CHANNELS:
        return possible, reason
    return _is_read_faster(x)


def _is_read_faster(volume: torch.Tensor) -> tuple[bool, str]:
    """Whether reading blocks out of the fine volume beats oneDNN, which reads them well.

    Measured, ours over oneDNN, 8 to 128 channels, k2s2: one thread 0.3 to 0.7 on more than 2^21
    elements, 1.0 to 1.1 below; two threads, which read each other's half of the matrix, 0.8 on
    2^23 and more, 1.1 to 3 below.
    """
    least = LARGE if torch.get_num_threads() == 1 else LARGE_SHARED
    if volume.numel() < least:
        return False, "oneDNN is as fast on small volumes"
    return True, ""


def _adjoint(
    stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int
) -> tuple[Any, ...]:
    """The numbers of grad_x as a convolution of its own."""
    return stride, padding, dilation, not transposed, output_padding, groups


def _can_run(
    tensors: Sequence[torch.Tensor | None], weight_size: Sequence[int], g: ConvGeometry
) -> tuple[bool, str]:
    kernel = tuple(weight_size[2:])
    if kernel != g.stride or max(g.padding) > 0 or g.groups > 1:
        return False, "blocks that do not overlap need kernel = stride, padding 0 and one group"
    if any(k > 1 and d > 1 for k, d in zip(kernel, g.dilation, strict=True)):
        return False, "the kernel is dilated"
    if math.prod(kernel) == 1:
        return False, "pointwise: already a product as it lies"
    return native.takes((torch.float32,), *tensors)


class _Piece(NamedTuple):
    """Some rows of blocks of one sample."""

    sample: int
    first: int  # row of blocks
    rows: int
    voxels: slice  # of the coarse volume


class _Blocks:
    """A fine volume [N, C, D, H, W], contiguous or channels-last, cut into blocks."""

    def __init__(self, volume: torch.Tensor, block: Sequence[int]) -> None:
        self.volume = volume
        self.block = tuple(block)
        self.channels, *self.size = volume.shape[1:]
        if not volume.is_contiguous():
            self.form = _CHANNELS_LAST
        elif self.block[2] >= LONG_SEGMENT:
            self.form = _ROWS
        else:
            self.form = _COLUMNS
        self.taps = self.channels * math.prod(block)
        depth, height, self.width = (n // k for n, k in zip(self.size, block, strict=True))
        self.all_rows = depth * height
        self.threads = torch.get_num_threads()
        wanted = max(PIECE_ELEMENTS * self.threads // self.taps, PIECE_VOXELS)
        self.rows = min(self.all_rows, max(1, wanted // self.width))
        self.memory = volume.new_empty(self.taps * self.rows * self.width)

    def pieces(self) -> Iterator[_Piece]:
        """Every row of blocks of every sample, in order."""
        for sample in range(len(self.volume)):
            for first in range(0, self.all_rows, self.rows):
                rows = min(self.rows, self.all_rows - first)
                voxels = slice(first * self.width, (first + rows) * self.width)
                yield _Piece(sample, first, rows, voxels)

    def matrix(self, piece: _Piece) -> torch.Tensor:
        """Memory for the piece's blocks, [K, voxels]."""
        columns = piece.rows * self.width
        memory = self.memory[: self.taps * columns]
        if self.form == _COLUMNS:
            return memory.view(self.taps, columns)
        return memory.view(columns, self.taps).t()

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [R, C, kD, kH, kW] as [R, K], K in the matrix's order."""
        return (weight.permute(0, 2, 3, 4, 1) if self.form == _CHANNELS_LAST else weight).flatten(1)

    def kernel(self, weight: torch.Tensor) -> torch.Tensor:
        """The way back from `weight`; contiguous."""
        if self.form != _CHANNELS_LAST:
            return weight.view(-1, self.channels, *self.block)
        return weight.view(-1, *self.block, self.channels).permute(0, 4, 1, 2, 3).contiguous()

    def read(self, piece: _Piece) -> torch.Tensor:
        """The piece's blocks, [K, voxels]."""
        matrix = self.matrix(piece)
        self._shuffle(False, piece, matrix, None)
        return matrix

    def write(self, piece: _Piece, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Put the blocks into the volume; `bias` as `tile` gives it."""
        self._shuffle(True, piece, matrix, bias)

    def tile(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """bias [C] as the kernel adds it."""
        if bias is None:
            return None
        return bias.repeat(self.block[2]) if self.form == _CHANNELS_LAST else bias.contiguous()

    def _shuffle(
        self, to_volume: bool, piece: _Piece, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        module, _ = native._load()
        module.shuffle(
            self.form, to_volume, self.channels, self.block, self.size, piece.first, piece.rows,
            native._operand(self.volume[piece.sample]), native._operand(matrix),
            native._operand(bias), self.threads,
        )  # fmt: skip


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> torch.Tensor:
    """y = conv(x, weight, bias); only for what `can_run_conv` accepts."""
    g, layout = ConvGeometry.of_op(*numbers), conv_layout(x, weight)
    x = x.contiguous(memory_format=layout)
    size = g.output_size(x.shape[2:], weight.shape[2:])
    if g.transposed:
        y = torch.empty((len(x), weight.shape[1], *size), memory_format=layout)
        _to_blocks(x, weight, bias, _Blocks(y, g.stride))
        return y
    y = torch.empty((len(x), weight.shape[0], *size), memory_format=layout)
    blocks = _Blocks(x, g.stride)
    product = blocks.weight(weight)
    column = None if bias is None else bias.unsqueeze(1)
    for piece in blocks.pieces():
        out, matrix = columns(y[piece.sample])[:, piece.voxels], blocks.read(piece)
        if column is None:
            torch.mm(product, matrix, out=out)
        else:
            torch.addmm(column, product, matrix, out=out)
    return y


def conv_grad_input(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_x of `conv`; only for what `can_run_conv_grad_input` accepts."""
    g, layout = ConvGeometry.of_op(*numbers), conv_layout(grad_y, weight)
    if g.transposed:
        return conv(grad_y, weight, None, *_adjoint(*numbers))
    whole = all(n % k == 0 for n, k in zip(input_size[2:], g.stride, strict=True))
    grad_x = torch.empty(tuple(input_size), memory_format=layout)
    if not whole:
        grad_x.zero_()
    _to_blocks(grad_y.contiguous(memory_format=layout), weight, None, _Blocks(grad_x, g.stride))
    return grad_x


def conv_grad_weight(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    *numbers: Any,
) -> torch.Tensor:
    """grad_weight of the plain `conv`; only for what `can_run_conv_grad_weight` accepts."""
    layout = conv_layout(x, x)
    blocks = _Blocks(x.contiguous(memory_format=layout), ConvGeometry.of_weight_op(*numbers).stride)
    grad_y = grad_y.contiguous(memory_format=conv_layout(grad_y, grad_y))
    grad = x.new_zeros(weight_size[0], blocks.taps)
    for piece in blocks.pieces():
        rows = columns(grad_y[piece.sample])[:, piece.voxels]
        grad.addmm_(rows, blocks.read(piece).t())
    return blocks.kernel(grad)


def _to_blocks(
    coarse: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, blocks: _Blocks
) -> None:
    """The transposed convolution of `coarse`, into the volume of `blocks`."""
    product, tile = blocks.weight(weight).t(), blocks.tile(bias)
    for piece in blocks.pieces():
        rows = columns(coarse[piece.sample])[:, piece.voxels]
        matrix = blocks.matrix(piece)
        torch.mm(product, rows, out=matrix)
        blocks.write(piece, matrix, tile)


def columns(sample: torch.Tensor) -> torch.Tensor:
    """[R, D, H, W], contiguous or channels-last, as [R, voxels] without a copy."""
    if sample.is_contiguous():
        return sample.flatten(1)
    return sample.permute(1, 2, 3, 0).flatten(0, 2).t()
