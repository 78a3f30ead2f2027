"""Suite `ops`: one convolution's step (forward, grad_x, adapter gradients)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gpu
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


GPU_CASES = [
    ConvCase(16, 16, 64, 8, batch=2),
    ConvCase(32, 32, 64, 8, batch=2),
    ConvCase(64, 64, 64, 8, batch=2),
    ConvCase(32, 32, 128, 8),
    ConvCase(128, 128, 32, 8, batch=2),
    ConvCase(32, 64, 64, 8, stride=2, batch=2),
    ConvCase(64, 64, 64, 8, kernel=1, batch=2),
    ConvCase(64, 64, 48, 8, groups=64, batch=2),
    ConvCase(64, 32, 32, 8, kernel=2, stride=2, transposed=True, batch=2),
    ConvCase(1, 32, 96, 8, batch=2),
    ConvCase(1, 64, 96, 8, stride=2, batch=2),
    ConvCase(1, 768, 96, 8, kernel=16, stride=16, batch=2),
]


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every case on the CPU, in float32; a record for each."""
    for case in CASES:
        net, x = _net(case), torch.randn(case.batch, case.inputs, *[case.size] * 3)
        x.requires_grad_()
        full, low = case.work()
        providers = _library(case, net, x)
        ours = _ours(case, net)
        for backend in our_backends():
            providers.append(provider(f"ours-{backend}", ours, x, 2 * full + low, backend))
        if case.batch == 1:
            # The fastest plain path: batch 1 may fall into vol2col, half of batch 2 does not.
            pair = torch.cat([x.detach()] * 2).requires_grad_()
            providers.append(provider("frozen-b2", frozen(net), pair, 4 * full))
        figures = compare(providers, "cpu", 7 if quick else 25)
        figures["floor"] = _floor(figures)
        yield {"case": case.label, "unit_bytes": x.nbytes, "providers": figures}


def gpu_run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every case on the GPU, in bfloat16; a record for each."""
    forced = ["eager", *gpu.backends()]
    for case in GPU_CASES:
        yield gpu_record(case, "cuda", torch.bfloat16, gpu.LAST, forced, 7 if quick else 25)


def gpu_record(
    case: ConvCase,
    device: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    forced: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """Torch's own ways in NCDHW and in `layout`; ours in `layout`, by dispatch and forced."""
    net = _net(case).to(device, dtype)
    x = torch.randn(case.batch, case.inputs, *[case.size] * 3, device=device, dtype=dtype)
    providers = _library(case, net, x.requires_grad_())
    x = x.detach().to(memory_format=layout).requires_grad_()
    providers += _library(case, net, x, "-ndhwc", layout)
    ours, (full, low) = _ours(case, net).to(memory_format=layout), case.work()
    for name, backend in (("ours", None), *((f"ours-{each}", each) for each in forced)):
        providers.append(provider(name, ours, x, 2 * full + low, backend))
    figures = gpu.measured(case.label, providers, device, repeats)
    able = [figures[n] for n in ("frozen", "frozen-ndhwc") if "ms" in figures[n]]
    nothing = {"why_not": "no frozen step ran"}
    figures["floor"] = dict(min(able, key=lambda figure: figure["ms"], default=nothing))
    return {"case": case.label, "unit_bytes": x.nbytes, "providers": figures}


def _net(case: ConvCase) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv", case.layer())
    return net


def _library(
    case: ConvCase,
    net: nn.Module,
    x: torch.Tensor,
    suffix: str = "",
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Provider]:
    """Full fine-tuning, the frozen layer and HF PEFT, their weights in `layout`."""
    full, low = case.work()
    found = [
        provider(f"full{suffix}", copy.deepcopy(net).to(memory_format=layout), x, 3 * full),
        provider(f"frozen{suffix}", frozen(net).to(memory_format=layout), x, 2 * full),
    ]
    theirs = hf_peft(net, case.r)
    if isinstance(theirs, str):
        return [*found, Provider(f"peft{suffix}", None, None, why_not=theirs)]
    theirs = randomise_b(theirs).to(memory_format=layout)
    return [*found, provider(f"peft{suffix}", theirs, x, 2 * full + low)]


def _ours(case: ConvCase, net: nn.Module) -> nn.Module:
    """LoRA on the frozen layer."""
    cls = LoRAConvTranspose3d if case.transposed else LoRAConv3d
    layer = cls.from_conv(frozen(net).conv, r=case.r, lora_alpha=2 * case.r)
    return randomise_b(nn.Sequential(layer))


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
