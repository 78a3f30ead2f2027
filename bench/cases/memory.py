"""Suite `memory`: what a whole forward keeps, and its peak, for blocks and for CVT-GAN."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases.layers import frozen, hf_peft, our_backends, provider, randomise_b
from measure import Provider, compare
from torch import nn

from petite_fast import BitFitConfig, LoraConfig, get_peft_model, petite_recipe
from petite_fast.models import CVTGANGenerator


class Blocks(nn.Sequential):
    """Four times convolution, InstanceNorm, LeakyReLU in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for k in range(4):
            self.add_module(f"conv{k}", nn.Conv3d(channels, channels, 3, padding=1))
            self.add_module(f"norm{k}", nn.InstanceNorm3d(channels))
            self.add_module(f"act{k}", nn.LeakyReLU(0.01, inplace=True))


def _records(
    label: str, providers: list[Provider], x: torch.Tensor, device: str, repeats: int
) -> dict[str, Any]:
    figures = compare(providers, device, repeats)
    figures["floor"] = dict(figures["frozen"])
    return {"case": label, "unit_bytes": x.nbytes, "providers": figures}


def run(device: str, quick: bool) -> list[dict[str, Any]]:
    """Measure every case; a list of records."""
    repeats = 5 if quick else 15
    return [_blocks(device, 0.0, repeats), _blocks(device, 0.1, repeats), _cvtgan(device, repeats)]


def _blocks(device: str, dropout: float, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Blocks(16).to(device)
    x = torch.randn(2, 16, 24, 24, 24, device=device, requires_grad=True)
    providers = [provider("full", net, x), provider("frozen", frozen(net), x)]
    theirs = hf_peft(net, 4, dropout)
    if isinstance(theirs, str):
        providers.append(Provider("peft", None, None, why_not=theirs))
    else:
        providers.append(provider("peft", randomise_b(theirs), x))
    targets = r"conv\d"
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout),
        "lora-fa": LoraConfig(
            r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, train_a=False
        ),
        "bitfit": BitFitConfig(),
    }
    for name, config in configs.items():
        adapted = randomise_b(get_peft_model(copy.deepcopy(net), config))
        for backend in our_backends(device)[-1:]:
            providers.append(provider(f"ours-{name}", adapted, x, backend=backend))
    label = "4 x (conv-InstanceNorm-LeakyReLU), 16 ch @24^3 b2, r 4"
    return _records(
        label + (f", lora_dropout {dropout}" if dropout else ""), providers, x, device, repeats
    )


def _cvtgan(device: str, repeats: int) -> dict[str, Any]:
    """The published generator on one 64^3 patch: all of it trained, none, PETITE."""
    torch.manual_seed(0)
    net = CVTGANGenerator().to(device).train()
    x = torch.randn(1, 1, 64, 64, 64, device=device)
    providers = [
        provider("full", net, x),
        provider("frozen", frozen(net), x.clone().requires_grad_()),
        Provider("peft", None, None, why_not="HF PEFT has neither channel prompts nor BitFit"),
    ]
    adapted = randomise_b(get_peft_model(copy.deepcopy(net), petite_recipe("cvtgan")))
    for backend in our_backends(device)[-1:]:
        providers.append(provider("ours-petite", adapted.train(), x, backend=backend))
    return _records("CVT-GAN generator, 64^3 b1", providers, x, device, max(3, repeats // 3))
