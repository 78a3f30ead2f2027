"""The bottleneck adapter on volumes, on the native CPU kernel of csrc/cpu/bottleneck.cpp.

Measured on two threads of an EPYC (Zen 4), C channels, H = C / 4, gelu, milliseconds of forward and
backward (product by product): 32 at 48^3 2.5 and 4.8 (5.4, 12.7); 64 at 24^3 1.1 and 1.6 (1.9,
4.7); 128 at 16^3 0.8 and 1.5 (1.5, 3.5); 256 at 16^3 2.0 and 4.7 (3.5, 8.0), at 8^3 0.6 and 1.3
(0.5, 1.3); 512 at 4^3 1.6 and 4.0 (0.4, 1.1).
"""

from __future__ import annotations

import math

import torch

from petite_fast.backends import native

TILE = 512  # voxels, kBottleneckTile; a tile's rest is computed and thrown away
MOST_CHANNELS = 256
WIDE = 128  # channels, above which few voxels are the library's
WIDE_VOXELS = 2048

_ACTIVATIONS = {"relu": 0, "gelu": 1}  # codes of csrc/common/bottleneck.h


def can_run_bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Whether `bottleneck` takes these arguments, and why not."""
    return _can_run(x, None, down_weight, volumes, dtype)


def can_run_bottleneck_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    activation: str,
    volumes: bool,
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Whether `bottleneck_backward` takes these arguments, and why not."""
    return _can_run(x, grad_y, down_weight, volumes, dtype)


def _can_run(
    x: torch.Tensor,
    grad_y: torch.Tensor | None,
    down_weight: torch.Tensor,
    volumes: bool,
    dtype: torch.dtype,
) -> tuple[bool, str]:
    if not volumes:
        return False, "tokens are a matrix: the library's products are as fast"
    channels, voxels = x.shape[1], math.prod(x.shape[2:])
    if voxels < TILE // 2 * math.ceil(voxels / TILE):
        return False, "most of a tile would be empty"
    if channels > MOST_CHANNELS or (channels > WIDE and voxels < WIDE_VOXELS):
        return False, "the library's products are as fast on that many channels"
    if x.dtype != dtype or (grad_y is not None and grad_y.dtype != dtype):
        return False, f"x is {x.dtype}, products are in {dtype}"
    return native.takes((torch.float32, torch.bfloat16), x, grad_y)


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
    """As `eager_bottleneck.bottleneck`; only for what `can_run_bottleneck` accepts."""
    source = x.contiguous()
    y = torch.empty_like(source)
    _run(source, None, y, (down_weight, down_bias, up_weight, up_bias), None, activation)
    return torch.empty_like(x).copy_(y) if y.stride() != x.stride() else y


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
    """As `eager_bottleneck.bottleneck_backward`; for what `can_run_bottleneck_backward` accepts."""
    source = grad_y.contiguous()
    grad_x = torch.empty_like(source)
    weights = (down_weight, down_bias, up_weight, None)
    sizes = (down_weight.shape, down_bias.shape, up_weight.shape, up_weight.shape[:1])
    grads = torch.empty(sum(size.numel() for size in sizes))
    _run(x.contiguous(), source, grad_x, weights, grads, activation)
    down, down_bias_grad, up, up_bias = (
        part.view(size).to(weight.dtype)
        for part, size, weight in zip(
            grads.split([size.numel() for size in sizes]), sizes,
            (down_weight, down_bias, up_weight, up_weight), strict=True,
        )
    )  # fmt: skip
    if grad_x.stride() != grad_y.stride():
        grad_x = torch.empty_like(grad_y).copy_(grad_x)
    return grad_x, down, down_bias_grad, up, up_bias


def _run(
    x: torch.Tensor,
    grad_y: torch.Tensor | None,
    out: torch.Tensor,
    weights: tuple[torch.Tensor | None, ...],
    grads: torch.Tensor | None,
    activation: str,
) -> None:
    module, _ = native._load()
    threads = torch.get_num_threads()
    down = weights[0]
    assert down is not None
    hidden, channels = down.shape
    sizes = (x.shape[0], channels, hidden, x[0, 0].numel())
    floats = [None if w is None else w.float().contiguous() for w in weights]
    workspace = torch.empty(module.bottleneck_workspace(sizes, threads))
    operands = map(native._operand, (x, grad_y, out, *floats, grads, workspace))
    module.bottleneck(sizes, _ACTIVATIONS[activation], *operands, threads)
