"""ReLU and LeakyReLU that keep a bit per value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from petite_fast.ops import masked_activation, saved_bytes

SLOPES = [0.0, 0.2, -0.5, 1.0]


def volume(size=(2, 3, 5, 6, 7), dtype=torch.float64, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator, dtype=dtype)
    x.view(-1)[::7] = 0.0
    return x.contiguous(memory_format=layout).requires_grad_()


def torchs(x, slope):
    return F.relu(x) if slope == 0 else F.leaky_relu(x, slope)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_to_torch_to_the_last_bit(slope, layout, dtype) -> None:
    x = volume(dtype=dtype, layout=layout)
    y = masked_activation(x, slope)
    wanted = torchs(x, slope)
    assert torch.equal(y, wanted) and y.stride() == wanted.stride()
    grad = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(wanted, x, grad)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bit_per_value_is_kept(dtype) -> None:
    x = volume((1, 2, 4, 4, 8), dtype)
    assert saved_bytes(lambda: masked_activation(x, 0.1)) == x.numel() // 8
    assert saved_bytes(lambda: masked_activation(x.detach(), 0.1)) == 0


def test_odd_sizes_and_none() -> None:
    for size in [(1,), (7,), (3, 3), (0, 2, 1, 1, 1)]:
        x = volume(size)
        (found,) = torch.autograd.grad(masked_activation(x, 0.3).sum(), x)
        assert torch.equal(found, torch.where(x > 0, torch.ones_like(x), 0.3))


def test_strided_input_and_gradient() -> None:
    wide = torch.randn(2, 3, 4, 4, 12, dtype=torch.float64, requires_grad=True)
    x = wide[..., ::2]
    grad = torch.randn(2, 3, 4, 6, 4, dtype=torch.float64).transpose(3, 4)
    found = torch.autograd.grad(masked_activation(x, 0.1), wide, grad)
    wanted = torch.autograd.grad(F.leaky_relu(x, 0.1), wide, grad)
    assert torch.equal(found[0], wanted[0])


def test_gradcheck_compile_and_second_order() -> None:
    x = torch.tensor([-1.5, -0.3, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: masked_activation(t, 0.2), x)
    compiled = torch.compile(masked_activation, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x, 0.2).sum(), x)
    assert torch.equal(found, torch.where(x > 0, torch.ones_like(x), 0.2))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(masked_activation(x, 0.2).sum(), x, create_graph=True)
