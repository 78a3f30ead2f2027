"""Eight signs in a byte: what a kinked activation's backward needs of its input."""

from __future__ import annotations

import torch

from petite_fast.ops import library


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """Bit i of byte j of a row is ``x[..., 8 j + i] > 0``; the last byte is filled with zeros.

    Not differentiable. NaN and both zeros give 0.

    Args:
        x: [..., K], floating-point.

    Returns:
        uint8 [..., ceil(K / 8)].

    Raises:
        TypeError: x is not floating-point.
        ValueError: x has no axis.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, wanted a floating-point dtype")
    if x.dim() == 0:
        raise ValueError("x: got a scalar, wanted [..., K]")
    return library.pack_signs(x.detach().contiguous())


def unpack_signs(bits: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `pack_signs`: whether each of the `size` elements of a row was positive.

    Args:
        bits: uint8 [..., ceil(size / 8)].
        size: K.

    Returns:
        bool [..., size].

    Raises:
        TypeError: bits are not uint8.
        ValueError: rows of another length.
    """
    if bits.dtype != torch.uint8:
        raise TypeError(f"bits: got {bits.dtype}, wanted torch.uint8")
    if bits.dim() == 0 or bits.shape[-1] != (size + 7) // 8:
        raise ValueError(
            f"bits: got shape {tuple(bits.shape)}, wanted [..., {(size + 7) // 8}] for {size} signs"
        )
    return library.unpack_signs(bits.contiguous(), size)
