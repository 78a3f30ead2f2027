"""Memory formats of what adapted convolutions return, forwards and backwards."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from petite_fast import LoraConfig, LoRAConv3d, LoRAConvTranspose3d, get_peft_model
from petite_fast.backends.eager import has_last_strides
from petite_fast.ops import library
from petite_fast.ops.reference import adapted_conv

LAST, DENSE = torch.channels_last_3d, torch.contiguous_format


def volume(channels: int, layout: torch.memory_format) -> torch.Tensor:
    """A leaf [2, channels, 6, 6, 6] with the strides of `layout`, one channel too."""
    return torch.empty(2, channels, 6, 6, 6, memory_format=layout).normal_().requires_grad_()


def reference_step(
    layer: nn.Module, conv: nn.Module, leaves: list[torch.Tensor], grad_y: torch.Tensor
) -> list[torch.Tensor]:
    """y and the gradients of x, A and B in float64."""
    x, a, b = (leaf.detach().double().requires_grad_() for leaf in leaves)
    assert conv.bias is not None
    y = adapted_conv(
        x, conv.weight.double(), conv.bias.double(), lora_A=a, lora_B=b, scale=layer.scaling,
        stride=conv.stride, transposed=isinstance(conv, nn.ConvTranspose3d),
    )  # fmt: skip
    return [y, *torch.autograd.grad(y, (x, a, b), grad_y.double())]


@pytest.mark.parametrize("weight_layout", [LAST, DENSE])
@pytest.mark.parametrize("x_layout", [LAST, DENSE])
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "transposed"),
    [
        (1, 8, 3, 1, False),
        (8, 1, 3, 1, False),
        (8, 8, 3, 2, False),
        (8, 8, 1, 1, False),
        (8, 4, 2, 2, True),
        (1, 4, 2, 2, True),
        (1, 1, 3, 1, False),
    ],
)
def test_the_output_has_the_layout_of_x_or_the_weight(
    inputs: int, outputs: int, kernel: int, stride: int, transposed: bool,
    x_layout: torch.memory_format, weight_layout: torch.memory_format,
) -> None:  # fmt: skip
    conv = (nn.ConvTranspose3d if transposed else nn.Conv3d)(inputs, outputs, kernel, stride)
    conv.to(memory_format=weight_layout)
    ours = (LoRAConvTranspose3d if transposed else LoRAConv3d).from_conv(conv, r=2)
    with torch.no_grad():
        ours.lora_B.normal_()
    x = volume(inputs, x_layout)
    y = ours(x)
    last = LAST in (x_layout, weight_layout)  # torch's rule, on a CPU only where it takes oneDNN
    assert has_last_strides(y) == last
    whole = torch.empty(len(y), outputs + 2, *y.shape[2:], memory_format=LAST).normal_()
    leaves = [x, ours.lora_A, ours.lora_B]
    exact = reference_step(ours, conv, leaves, whole[:, 1:-1])
    grads_y = (whole[:, 1:-1], *(whole[:, 1:-1].clone(memory_format=f) for f in (LAST, DENSE)))
    for grad_y in grads_y:
        found = torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
        wants_last = last or has_last_strides(grad_y)
        assert has_last_strides(found[0]) == wants_last or inputs == 1  # there the two are the same
        for ours_, wanted in zip((y, *found), exact, strict=True):
            torch.testing.assert_close(ours_.double(), wanted, rtol=1e-4, atol=1e-4)


def test_part_of_the_channels_is_channels_last() -> None:
    """The gradients of a concatenation are such parts."""
    whole = volume(8, LAST).detach()
    assert has_last_strides(whole[:, 2:5]) and not whole[:, 2:5].is_contiguous(memory_format=LAST)
    assert not has_last_strides(volume(8, DENSE).detach()[:, 2:5])
    assert not has_last_strides(torch.zeros(1).expand(2, 8, 6, 6, 6))
    assert not has_last_strides(whole[:0]) and not has_last_strides(torch.zeros(2, 1, 1, 1, 1))


def test_a_network_stays_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stem of one channel, blocks, a concatenation, and everything backwards."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 8, 3, 2, padding=1)
            self.up = nn.ConvTranspose3d(8, 8, 2, 2)
            self.merge, self.last = nn.Conv3d(16, 8, 3, padding=1), nn.Conv3d(8, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            fine = self.stem(x).relu()
            merged = torch.cat([self.up(self.down(fine)), fine], 1)
            return self.last(self.merge(merged))

    config = LoraConfig(r=2, target_modules=["stem", "down", "merge"])
    net = get_peft_model(Net(), config).to(memory_format=LAST)
    seen: Counter[tuple[str, bool]] = Counter()

    def count(op: str) -> None:
        run = getattr(library, op)

        def counted(first: torch.Tensor, *rest: object) -> torch.Tensor:
            if first.shape[1] > 1:
                seen[op, has_last_strides(first)] += 1
            return run(first, *rest)

        monkeypatch.setattr(library, op, counted)

    count("conv")
    count("conv_grad_input")
    net(volume(1, LAST)).sum().backward()
    assert seen == {("conv", True): 4, ("conv_grad_input", True): 4}
