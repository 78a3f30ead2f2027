"""Which way a float32 convolution takes on the CPU: never vol2col, and never into oneDNN's crash.

oneDNN's weight gradient (torch 2.13) reads past the end of a volume smaller than the kernel:
x [2, 1, 5, 7, 6], 8 outputs, a kernel of 7 with stride 2 and padding 3 ends the process.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.backends import eager
from petite_fast.ops import library


def products(ops: Any, x: torch.Tensor, w: torch.Tensor, g: Any, transposed: bool) -> Any:
    """y, grad_x and grad_weight for grad_y = y."""
    y = ops.conv(x, w, None, *g, transposed, [0] * 3, 1)
    grad_x = ops.conv_grad_input(y, w, list(x.shape), *g, transposed, [0] * 3, 1)
    grad_y, seen = (x, y) if transposed else (y, x)
    return y, grad_x, ops.conv_grad_weight(grad_y, seen, list(w.shape), *g, 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [(1, 8), (8, 1), (8, 8)])
def test_no_geometry_calls_vol2col(transposed: bool, channels: tuple[int, int]) -> None:
    inputs, outputs = channels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for kernel, stride, dilation, size, batch in itertools.product(
            (1, 3, 5, 7), (1, 2), (1, 2), ((5, 7, 6), (16, 16, 16)), (1, 2)
        ):
            x = torch.randn(batch, inputs, *size)
            w = torch.randn((*channels, *[kernel] * 3) if transposed else
                            (outputs, inputs, *[kernel] * 3))  # fmt: skip
            g = ([stride] * 3, [dilation * (kernel // 2)] * 3, [dilation] * 3)
            products(library, x, w, g, transposed)
    names = {event.key for event in trace.key_averages()}
    assert "petite_fast::conv" in names
    assert not [name for name in names if "slow_conv" in name or "vol2col" in name], names


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 2, 1), (7, 1, 1), (6, 3, 1),
                                                             (7, 1, 2), (5, 2, 2)])  # fmt: skip
@pytest.mark.parametrize("channels", [(1, 8), (3, 2)])
def test_kernels_larger_than_the_volume(
    channels: tuple[int, int], kernel: int, stride: int, dilation: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    inputs, outputs = channels
    x = torch.randn(2, inputs, 5, 7, 6, dtype=torch.float64)
    size = (inputs, outputs) if transposed else (outputs, inputs)
    w = torch.randn(*size, *[kernel] * 3, dtype=torch.float64)
    g = ([stride] * 3, [dilation * (kernel // 2)] * 3, [dilation] * 3)
    exact = products(eager, x, w, g, transposed)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    call = torch.nn.functional.conv_transpose3d if transposed else torch.nn.functional.conv3d
    torch_y = call(x_leaf, w_leaf, None, stride, g[1][0], dilation=dilation)
    torch_y.backward(exact[0])
    for ours, theirs in zip(exact, (torch_y, x_leaf.grad, w_leaf.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with torch.backends.mkldnn.flags(enabled=False):  # torch's own, without oneDNN
        plain = products(eager, x.float(), w.float(), g, transposed)
    for ours, theirs, wanted in zip(
        products(library, x.float(), w.float(), g, transposed), plain, exact, strict=True
    ):
        assert_twice_torch(ours, theirs, wanted, 3)
