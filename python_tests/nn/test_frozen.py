"""Frozen twins: torch's layers, bit for bit in meaning, that keep no activation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from petite_fast import FrozenBatchNorm3d, FrozenConv3d, FrozenConvTranspose3d
from petite_fast.ops import saved_bytes

CONV = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding="same", dilation=2, padding_mode="circular"),
    dict(kernel_size=3, stride=2, groups=4, bias=False),
]
TRANSPOSED = [dict(kernel_size=2, stride=2), dict(kernel_size=3, stride=2, output_padding=1)]
CASES = [(FrozenConv3d, nn.Conv3d, case) for case in CONV]
CASES += [(FrozenConvTranspose3d, nn.ConvTranspose3d, case) for case in TRANSPOSED]


@pytest.mark.parametrize(("cls", "torch_class", "case"), CASES)
def test_is_the_torch_layer_and_keeps_nothing(cls, torch_class, case):
    torch.manual_seed(0)
    base = torch_class(4, 8, **case).double()
    frozen = cls(4, 8, **case).double()
    assert isinstance(frozen, torch_class)
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.load_state_dict(base.state_dict(), strict=True)
    base.load_state_dict(frozen.state_dict(), strict=True)
    x = torch.randn(2, 4, 6, 6, 7, dtype=torch.float64, requires_grad=True)
    y, expected = frozen(x), base(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, direction)
    (theirs,) = torch.autograd.grad(expected, x, direction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert saved_bytes(lambda: frozen(x)) == 0
    if frozen.bias is not None:
        frozen.bias.requires_grad_()
        assert saved_bytes(lambda: frozen(x)) == 0
        frozen(x).backward(direction)
        torch.testing.assert_close(frozen.bias.grad, direction.sum((0, 2, 3, 4)))


@pytest.mark.parametrize(("cls", "torch_class", "case"), CASES)
def test_from_conv_and_convert(cls, torch_class, case):
    conv = torch_class(4, 8, **case)
    frozen = cls.from_conv(conv)
    assert frozen.weight is conv.weight and type(conv) is torch_class
    assert repr(frozen).removeprefix("Frozen") == repr(conv)
    assert cls.convert_(conv) is conv and type(conv) is cls
    with pytest.raises(TypeError, match="wanted a plain torch.nn"):
        cls.convert_(conv)
    x = torch.randn(1, 4, 6, 6, 6)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(twin) is cls and torch.equal(twin(x), frozen(x))
        assert not twin.weight.requires_grad


def test_transposed_output_size():
    layer = FrozenConvTranspose3d(4, 8, 3, stride=2, padding=1)
    base = nn.ConvTranspose3d(4, 8, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 4, 4, 4)
    assert layer(x, output_size=(8, 7, 8)).shape == base(x, output_size=(8, 7, 8)).shape
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=(99, 8, 8))


def test_a_thawed_weight_trains():
    layer = FrozenConv3d(4, 8, 3)
    layer.weight.requires_grad_()
    layer(torch.randn(2, 4, 4, 4, 4)).square().sum().backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(affine):
    torch.manual_seed(0)
    bn = nn.BatchNorm3d(4, affine=affine).double()
    bn(torch.randn(2, 4, 3, 3, 3, dtype=torch.float64))
    bn.eval()
    frozen = FrozenBatchNorm3d.from_bn(bn)
    assert frozen.running_mean is bn.running_mean and isinstance(frozen, nn.BatchNorm3d)
    x = torch.randn(2, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = bn(x)
    statistics = {k: v.clone() for k, v in bn.state_dict().items()}
    frozen.train()
    assert not frozen.training
    torch.testing.assert_close(frozen(x), expected)
    assert all(torch.equal(v, statistics[k]) for k, v in frozen.state_dict().items())
    assert saved_bytes(lambda: frozen(x)) <= 5 * 4 * 8  # per-channel vectors, no activation
    direction = torch.randn_like(x)
    (ours,) = torch.autograd.grad(frozen(x), x, direction)
    (theirs,) = torch.autograd.grad(expected, x, direction)
    torch.testing.assert_close(ours, theirs)
    if affine:
        frozen.bias.requires_grad_()
        frozen(x).backward(direction)
        torch.testing.assert_close(frozen.bias.grad, direction.sum((0, 2, 3, 4)))
    twin = nn.BatchNorm3d(4, affine=affine).double()
    twin.load_state_dict(frozen.state_dict(), strict=True)
    assert FrozenBatchNorm3d.convert_(bn.train()) is bn and not bn.training
    assert not pickle.loads(pickle.dumps(frozen)).training


def test_batch_norm_needs_statistics_and_volumes():
    bn = nn.BatchNorm3d(4, track_running_stats=False)
    for make in (FrozenBatchNorm3d.from_bn, FrozenBatchNorm3d.convert_):
        with pytest.raises(ValueError, match="track_running_stats"):
            make(bn)
    assert type(bn) is nn.BatchNorm3d
    with pytest.raises(TypeError, match="BatchNorm3d"):
        FrozenBatchNorm3d.convert_(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="5D"):
        FrozenBatchNorm3d(4)(torch.randn(2, 4))
