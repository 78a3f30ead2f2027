"""bfloat16 weight gradients on small grids: oneDNN's own read memory that nobody wrote."""

from __future__ import annotations

import pytest
import torch

from petite_fast.ops import adapted_conv


def poison() -> None:
    """Leave NaN in the memory that the next allocations are likely to get."""
    sizes = [2**k for k in range(4, 17)] * 20
    buffers = [torch.full((n,), float("nan")) for n in sizes]
    del buffers


@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("grid", [(2, 2, 1), (1, 1, 1), (3, 3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_gradients_are_those_of_float64(groups, grid, layout) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    x = draw(2, 32, *grid).contiguous(memory_format=layout).requires_grad_()
    weight, a, b = draw(32, 32 // groups, 3, 3, 3), draw(2, 32 // groups, 3, 3, 3), draw(32, 2)
    grad = draw(2, 32, *grid)
    geometry = {"padding": 1, "groups": groups}
    found, exact = [], []
    for dtype, gradients in ((torch.bfloat16, found), (torch.float64, exact)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, a, b)]
        y = adapted_conv(
            leaves[0], weight.to(dtype), lora_A=leaves[1], lora_B=leaves[2], **geometry
        )
        for _ in range(3):
            poison()
            gradients[:] = torch.autograd.grad(y, leaves, grad.to(dtype), retain_graph=True)
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(
            ours.double(), wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max())
        )
