"""No float32 convolution on the CPU goes through PyTorch's column matrix (vol2col).

Batch 1, which is what PyTorch sends there. A kernel of 7 with stride 2 is left out: oneDNN's weight
gradient crashes by itself at batch 2 (torch 2.13, x [2, 1, 5, 7, 6], 8 outputs, padding 3).
"""

from __future__ import annotations

import itertools

import pytest
import torch

from petite_fast.ops import library


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [(1, 8), (8, 1), (8, 8)])
def test_no_geometry_calls_vol2col(transposed: bool, channels: tuple[int, int]) -> None:
    inputs, outputs = channels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for kernel, stride, dilation, size, batch in itertools.product(
            (1, 3, 5), (1, 2), (1, 2), ((5, 7, 6), (12, 12, 12)), (1,)
        ):
            x = torch.randn(batch, inputs, *size)
            w = torch.randn((*channels, *[kernel] * 3) if transposed else
                            (outputs, inputs, *[kernel] * 3))  # fmt: skip
            g = ([stride] * 3, [dilation * (kernel // 2)] * 3, [dilation] * 3)
            y = library.conv(x, w, None, *g, transposed, [0] * 3, 1)
            library.conv_grad_input(y, w, list(x.shape), *g, transposed, [0] * 3, 1)
            grad_y, seen = (x, y) if transposed else (y, x)
            library.conv_grad_weight(grad_y, seen, list(w.shape), *g, 1)
    names = {event.key for event in trace.key_averages()}
    assert "petite_fast::conv" in names
    assert not [name for name in names if "slow_conv" in name or "vol2col" in name], names
