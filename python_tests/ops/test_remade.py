"""Tensors that are made again instead of kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from petite_fast.ops import adapted_conv, concatenate, recomputed, saved_bytes

C, SIZE = 4, 6
UNIT = 8 * C * SIZE**3


@pytest.fixture
def parts() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (1, C, SIZE, SIZE, SIZE)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.fixture
def lora() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    return {
        "weight": nn.Parameter(torch.randn(C, 2 * C, 3, 3, 3, **double), requires_grad=False),
        "lora_A": nn.Parameter(torch.randn(2, 2 * C, 3, 3, 3, **double)),
        "lora_B": nn.Parameter(torch.randn(C, 2, **double)),
    }


def conv(x, lora):
    return adapted_conv(x, padding=1, **lora)


def test_a_concatenation_is_kept_as_its_parts(parts, lora) -> None:
    parts = [2 * p for p in parts]
    # exp keeps its result: half of what the convolution reads is kept anyway
    assert saved_bytes(lambda: conv(torch.cat([parts[0].exp(), parts[1]], 1), lora)) == 3 * UNIT
    assert saved_bytes(lambda: conv(concatenate([parts[0].exp(), parts[1]]), lora)) == 2 * UNIT


def test_gradients_through_a_concatenation(parts, lora) -> None:
    leaves = [*parts, lora["lora_A"], lora["lora_B"]]
    grad = torch.randn(1, C, SIZE, SIZE, SIZE, dtype=torch.float64)
    found = torch.autograd.grad(conv(concatenate(parts), lora), leaves, grad)
    wanted = torch.autograd.grad(conv(torch.cat(parts, 1), lora), leaves, grad)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_a_concatenation_that_was_written_to_is_kept_itself(parts, lora) -> None:
    joined = concatenate([p.detach() for p in parts])
    joined.mul_(3)
    y = conv(joined, lora)
    wanted = conv(3 * torch.cat([p.detach() for p in parts], 1), lora)
    leaves = [lora["lora_A"], lora["lora_B"]]
    for a, b in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        assert torch.equal(a, b)


def test_a_part_that_was_written_to_is_an_error(parts, lora) -> None:
    first = parts[0].detach().clone()
    y = conv(concatenate([first, parts[1]]), lora)
    first.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_recomputed_keeps_its_input_alone(parts) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv3d(C, C, 1), nn.InstanceNorm3d(C), nn.GELU()).double()
    x = parts[0]
    trained = list(net.parameters())
    assert saved_bytes(lambda: recomputed(net, x, trained)) == UNIT
    grad = torch.randn_like(x)
    found = torch.autograd.grad(recomputed(net, x, trained), [x, *trained], grad)
    wanted = torch.autograd.grad(net(x), [x, *trained], grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_recomputed_under_autocast() -> None:
    torch.manual_seed(3)
    net = nn.Conv3d(C, C, 1)
    x = torch.randn(1, C, SIZE, SIZE, SIZE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = recomputed(net, x, list(net.parameters())), net(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    found = torch.autograd.grad(y.float().sum(), [x, net.weight])
    wanted = torch.autograd.grad(plain.float().sum(), [x, net.weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused(parts) -> None:
    y = recomputed(torch.exp, parts[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), parts[0], create_graph=True)


def test_frozen_input(parts) -> None:
    layer = nn.Conv3d(C, C, 1).double()
    y = recomputed(layer, parts[0].detach(), list(layer.parameters()))
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((C,), float(SIZE**3), dtype=torch.float64))
    assert not recomputed(torch.exp, parts[0].detach()).requires_grad
