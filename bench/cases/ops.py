"""Suite `ops`: one convolution's step (forward, grad_x, adapter gradients)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from cases.layers import frozen, hf_peft, our_backends, provider, randomise_b
from measure import Provider, compare
from torch import nn

from petite_fast import LoRAConv3d, LoRAConvTranspose3d


class ConvCase(NamedTuple):
    """[batch, inputs, size^3] -> outputs channels, LoRA of rank r."""

    inputs: int
    outputs: int
    size: int
    r: int
    kernel: int = 3
    stride: int = 1
    batch: int = 1
    groups: int = 1
    transposed: bool = False

    @property
    def label(self) -> str:
        kind = "convT" if self.transposed else "depthwise" if self.groups > 1 else "conv"
        text = f"{kind} {self.inputs}->{self.outputs} k{self.kernel}"
        text += f"s{self.stride}" if self.stride > 1 else ""
        return f"{text} @{self.size}^3 b{self.batch} r{self.r}"

    def layer(self) -> nn.Module:
        padding = 0 if self.kernel == self.stride or self.transposed else self.kernel // 2
        cls = nn.ConvTranspose3d if self.transposed else nn.Conv3d
        return cls(self.inputs, self.outputs, self.kernel, self.stride, padding, groups=self.groups)

    def work(self) -> tuple[float, float]:
        """Flops of one full product, and of all products of the low-rank gradient."""
        edge = self.size if self.transposed else math.ceil(self.size / self.stride)
        voxels = self.batch * edge**3
        taps = self.kernel**3 * self.inputs // self.groups
        full = 2.0 * voxels * self.outputs * taps
        low = 4.0 * voxels * self.r * (taps * self.groups + self.outputs)
        return full, low


CASES = [
    ConvCase(32, 32, 32, 4),
    ConvCase(32, 32, 32, 4, batch=2),
    ConvCase(64, 64, 24, 8),
    ConvCase(16, 16, 32, 4),
    ConvCase(128, 128, 16, 8),
    ConvCase(256, 256, 8, 8),
    ConvCase(64, 64, 24, 8, kernel=1),
    ConvCase(32, 64, 32, 8, stride=2),
    ConvCase(64, 64, 16, 8, groups=64),
    ConvCase(64, 32, 16, 8, kernel=2, stride=2, transposed=True),
    ConvCase(64, 32, 24, 8, kernel=2, stride=2, transposed=True),
    ConvCase(1, 96, 64, 8, kernel=16, stride=16),
    ConvCase(1, 32, 48, 4),
]


def run(device: str, quick: bool) -> list[dict[str, Any]]:
    """Measure every case; a list of records."""
    records = []
    for case in CASES:
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("conv", case.layer())
        net.to(device)
        x = torch.randn(case.batch, case.inputs, *[case.size] * 3, device=device)
        x.requires_grad_()
        full, low = case.work()
        providers = [
            provider("full", net, x, 3 * full),
            provider("frozen", frozen(net), x, 2 * full),
        ]
        theirs = hf_peft(net, case.r)
        if isinstance(theirs, str):
            providers.append(Provider("peft", None, None, why_not=theirs))
        else:
            providers.append(provider("peft", randomise_b(theirs), x, 2 * full + low))
        cls = LoRAConvTranspose3d if case.transposed else LoRAConv3d
        ours = nn.Sequential(cls.from_conv(frozen(net).conv, r=case.r, lora_alpha=2 * case.r))
        randomise_b(ours)
        for backend in our_backends(device):
            providers.append(provider(f"ours-{backend}", ours, x, 2 * full + low, backend))
        if case.batch == 1:
            # The fastest plain path: batch 1 may fall into vol2col, half of batch 2 does not.
            pair = torch.cat([x.detach()] * 2).requires_grad_()
            providers.append(provider("frozen-b2", frozen(net), pair, 4 * full))
        figures = compare(providers, device, 7 if quick else 25)
        figures["floor"] = _floor(figures)
        records.append({"case": case.label, "unit_bytes": x.nbytes, "providers": figures})
    return records


def _floor(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The frozen step by the fastest plain PyTorch path."""
    floor = dict(figures["frozen"])
    pair = figures.pop("frozen-b2", None)
    if pair and pair["ms"] / 2 < floor["ms"]:
        floor = {**pair, "ms": pair["ms"] / 2}
        floor["ms_quartiles"] = [t / 2 for t in pair["ms_quartiles"]]
        floor["saved_bytes"] = figures["frozen"]["saved_bytes"]
        floor["peak_bytes"] = figures["frozen"]["peak_bytes"]
    return floor
