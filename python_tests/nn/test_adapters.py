"""ScaleShift and BottleneckAdapter: identity at the start, gradients, what is kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from petite_fast import BottleneckAdapter, ScaleShift
from petite_fast.ops import saved_bytes


@pytest.mark.parametrize(("channel_dim", "shape"), [(1, (2, 4, 3, 5, 2)), (-1, (2, 7, 4))])
def test_scale_shift(channel_dim, shape):
    torch.manual_seed(0)
    layer = ScaleShift(4, channel_dim, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.gamma.normal_()
        layer.beta.normal_()
    view = (1, 4, 1, 1, 1) if channel_dim == 1 else (1, 1, 4)
    expected = x * layer.gamma.view(view) + layer.beta.view(view)
    direction = torch.randn_like(x)
    ours = torch.autograd.grad(layer(x), [x, layer.gamma, layer.beta], direction)
    theirs = torch.autograd.grad(expected, [x, layer.gamma, layer.beta], direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert "4" in repr(layer) and pickle.loads(pickle.dumps(layer)).channel_dim == channel_dim


def test_scale_shift_refuses():
    with pytest.raises(ValueError, match="channel_dim: got 2"):
        ScaleShift(4, 2)
    with pytest.raises(ValueError, match="channels: got 0"):
        ScaleShift(0)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_bottleneck(activation):
    torch.manual_seed(0)
    layer = BottleneckAdapter(16, activation=activation, dtype=torch.float64)
    assert layer.down.out_features == 2 and layer.down.weight.any()
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), x)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    learned = set()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        layer(x).square().mean().backward()
        learned |= {n for n, p in layer.named_parameters() if p.grad.any()}
        optimiser.step()
    assert learned == {"down.weight", "down.bias", "up.weight", "up.bias"}
    hidden = getattr(F, activation)(layer.down(x))
    expected = x + layer.up(hidden)
    torch.testing.assert_close(layer(x), expected)
    names = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), names)
    theirs = torch.autograd.grad(expected.square().sum(), names)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_bottleneck_on_volumes(channels_last):
    torch.manual_seed(0)
    layer = BottleneckAdapter(16, channel_dim=1, dtype=torch.float64)
    assert layer.down.weight.shape == (2, 16) and "channel_dim=1" in repr(layer)
    x = torch.randn(2, 16, 3, 4, 5, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    assert torch.equal(layer(x), x)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    torch.nn.init.normal_(layer.up.weight)
    inner = F.conv3d(x, layer.down.weight[..., None, None, None], layer.down.bias)
    expected = x + F.conv3d(F.gelu(inner), layer.up.weight[..., None, None, None], layer.up.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).stride() == x.stride()
    names = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), names)
    theirs = torch.autograd.grad(expected.square().sum(), names)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_bottleneck_sizes():
    assert BottleneckAdapter(4, reduction=8).down.out_features == 1
    assert BottleneckAdapter(16, hidden=5).up.in_features == 5
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        BottleneckAdapter(16, activation="tanh")
    with pytest.raises(ValueError, match="channel_dim: got 2"):
        BottleneckAdapter(16, channel_dim=2)
    for bad in (dict(channels=0), dict(channels=4, reduction=0), dict(channels=4, hidden=0)):
        with pytest.raises(ValueError, match="wanted a positive int"):
            BottleneckAdapter(**bad)
