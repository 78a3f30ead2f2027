"""Twenty steps with our layers and with the same method written in plain PyTorch: equal losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft_cases import CASES, build, inputs
from torch import nn
from torch.nn.utils import parametrize

from petite_fast import get_peft_model
from petite_fast.peft.methods.adapter import AdapterSite
from petite_fast.peft.methods.lora import LoraSite
from petite_fast.peft.methods.parameters import ParameterSite
from petite_fast.peft.methods.ssf import SSFSite

pytest.importorskip("monai")
pytest.importorskip("dynamic_network_architectures")

NAMES = [
    "cvtgan-lora", "cvtgan-ssf", "cvtgan-adapter", "cvtgan-bitfit", "unetr-petite", "unet-lora",
    "unet-ssf", "unet-mix-adapter", "dynunet-rslora", "dynunet-mix", "dynunet-lora-fa",
]  # fmt: skip


class LowRank(nn.Module):
    """W -> W + scaling * B.A, as a parametrization."""

    def __init__(self, layer) -> None:
        super().__init__()
        a, b = layer.factors()
        self.scaling, self.transposed = layer.scaling, isinstance(layer, nn.ConvTranspose3d)
        self.a = nn.Parameter(a.detach().clone(), requires_grad=layer.train_a)
        self.b = nn.Parameter(b.detach().clone())
        ones = copy.deepcopy(layer)
        nn.init.ones_(ones.lora_B)
        self.where = ones.factors()[1].detach()  # a fused projection adapts some of its rows

    def forward(self, weight):
        a, b = self.a.flatten(1), (self.b * self.where).flatten(1)
        product = a.t() @ b if self.transposed else b @ a
        return weight + self.scaling * product.view_as(weight)


class Behind(nn.Module):
    """Scale and shift, or a bottleneck adapter, as a forward hook."""

    def __init__(self, tensors, axis) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(t.detach().clone()) for t in tensors)
        self.axis = axis

    def forward(self, module, args, y):
        y = y.movedim(self.axis, -1)
        if len(self.values) == 2:
            y = y * self.values[0] + self.values[1]
        else:
            down, down_bias, up, up_bias = self.values
            y = y + F.linear(F.gelu(F.linear(y, down, down_bias)), up, up_bias)
        return y.movedim(-1, self.axis)


def plain(base: nn.Module, model) -> tuple[nn.Module, list[nn.Parameter]]:
    """`base` with the adapters of `model` in plain PyTorch, and what trains."""
    net = base.requires_grad_(False)
    trained = []
    for site in model._peft.injection.sites:
        if isinstance(site, ParameterSite):
            trained.append(net.get_parameter(site.name).requires_grad_(True))
            continue
        module = net.get_submodule(site.name)
        if isinstance(site, LoraSite):
            term = LowRank(model.get_submodule(site.name))
            parametrize.register_parametrization(module, "weight", term)
            trained += [p for p in term.parameters() if p.requires_grad]
            continue
        if isinstance(site, SSFSite):
            tensors = [model.get_parameter(name) for name in site.tensors(model)]
            channels = isinstance(module, (nn.Linear, nn.LayerNorm))
            hook = Behind(tensors, -1 if channels else 1)
            for name in (site.name, *site.others):
                net.get_submodule(name).register_forward_hook(hook)
        else:
            assert isinstance(site, AdapterSite)
            adapter = model.get_submodule(f"{site.name}.adapter")
            parts = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
            hook = Behind(parts, adapter.channel_dim)
            module.register_forward_hook(hook)
        trained += list(hook.parameters())
    return net, trained


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps(name) -> None:
    network, config = CASES[name]
    base = build(network)
    model = get_peft_model(copy.deepcopy(base), config)
    theirs, trained = plain(base, model)
    ours = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in ours) <= sum(p.numel() for p in trained)
    x = inputs(network)
    target = torch.tanh(x)
    losses = []
    for net, parameters in ((model, ours), (theirs, trained)):
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    for step, (a, b) in enumerate(zip(*losses, strict=True)):
        assert math.isclose(a, b, rel_tol=1e-7), f"step {step}: ours {a}, plain {b}"
