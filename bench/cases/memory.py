"""Suite `memory`: what a training step keeps, its peak and its time, for whole networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases.layers import frozen, hf_peft, our_backends, provider, randomise_b
from cases.others import checkpointed, memsave, plain
from measure import Provider, compare
from torch import nn

from petite_fast import BitFitConfig, LoraConfig, SSFConfig, get_peft_model, petite_recipe
from petite_fast.models import UNETR, CVTGANGenerator


class Case(NamedTuple):
    """A network, its input, and how it is adapted.

    Attributes:
        label: name in tables.
        build: the network, in the mode that it trains in.
        size: of the input.
        stages: pattern for the names of the modules that torch.utils.checkpoint goes around.
        r: rank of LoRA, which goes on every convolution with a kernel of 3; None is PETITE.
        dropout: of LoRA.
    """

    label: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    stages: str
    r: int | None = 8
    dropout: float = 0.0


class Blocks(nn.Sequential):
    """Four times convolution, norm, LeakyReLU in place."""

    def __init__(self, norm: type[nn.Module], channels: int) -> None:
        super().__init__()
        for k in range(4):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv3d(channels, channels, 3, padding=1))
            block.add_module("norm", norm(channels))
            block.add_module("act", nn.LeakyReLU(0.01, inplace=True))
            self.add_module(f"block{k}", block)


def _blocks(norm: type[nn.Module], dropout: float = 0.0) -> Case:
    name = "eval-BatchNorm" if norm is nn.BatchNorm3d else "InstanceNorm"
    label = f"4 x (conv-{name}-LeakyReLU), 16 ch @24^3 b2, r 4"
    return Case(
        label + (f", lora_dropout {dropout}" if dropout else ""),
        lambda: Blocks(norm, 16).train(norm is not nn.BatchNorm3d),
        (2, 16, 24, 24, 24),
        r"block\d",
        r=4,
        dropout=dropout,
    )


def _unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, 1, (32, 64, 128, 256), (2, 2, 2), num_res_units=2)


def _swin_unetr() -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 1, feature_size=12)


def _dynunet() -> nn.Module:
    from monai.networks.nets import DynUNet

    strides = [1, 2, 2, 2]
    return DynUNet(3, 1, 1, [3] * 4, strides, strides[1:], filters=[16, 32, 64, 128])


CASES = [
    _blocks(nn.InstanceNorm3d),
    _blocks(nn.InstanceNorm3d, 0.1),
    _blocks(nn.BatchNorm3d),
    Case("MONAI UNet, 64^3 b1, r 8", _unet, (1, 1, 64, 64, 64), r"(.*\.)?unit\d|model\..*\.2\.0"),
    Case(
        "UNETR, 64^3 b1, r 8",
        lambda: UNETR(64, feature_size=16),
        (1, 1, 64, 64, 64),
        r"vit\.blocks\.\d+|(encoder|decoder)\d",
    ),
    Case(
        "SwinUNETR, 64^3 b1, r 8",
        _swin_unetr,
        (1, 1, 64, 64, 64),
        r"swinViT\.layers\d\.0\.blocks\.\d+|(encoder|decoder)\d+",
    ),
    Case(
        "DynUNet, 64^3 b1, r 8",
        _dynunet,
        (1, 1, 64, 64, 64),
        r"input_block|bottleneck|downsamples\.\d|upsamples\.\d",
    ),
    Case(
        "CVT-GAN, PETITE, 64^3 b1",
        CVTGANGenerator,
        (1, 1, 64, 64, 64),
        r"(en|de)coder_layer\d(_down|_up)?",
        r=None,
    ),
]


def run(device: str, quick: bool) -> list[dict[str, Any]]:
    """Measure every case; a list of records."""
    records = []
    for case in CASES:
        torch.manual_seed(0)
        net = case.build().to(device)
        small = isinstance(net, Blocks)
        repeats = (5 if small else 2) if quick else (15 if small else 5)
        providers = _providers(case, net, device)
        figures = compare(providers, device, repeats, warmup=0 if quick else 1)
        figures["floor"] = dict(figures["frozen"])
        unit = 4 * math.prod(case.size)
        records.append({"case": case.label, "unit_bytes": unit, "providers": figures})
    return records


def _providers(case: Case, net: nn.Module, device: str) -> list[Provider]:
    """Full fine-tuning, the frozen network, what others do, and ours."""
    x = torch.randn(case.size, device=device)
    with_gradient = x.clone().requires_grad_()
    if isinstance(net, Blocks):  # a piece of a network: its input comes from a layer
        x = with_gradient
    targets = [
        name for name, m in net.named_modules() if type(m) is nn.Conv3d and max(m.kernel_size) == 3
    ]
    # Without grad_x a frozen network has no backward.
    found = [provider("full", net, x), provider("frozen", frozen(net), with_gradient)]
    if case.r is None:
        configs: dict[str, Any] = {"petite": petite_recipe("cvtgan"), "ssf": SSFConfig()}
        reason = "HF PEFT has neither channel prompts nor BitFit"
        found.append(Provider("peft", None, None, why_not=reason))
        theirs: Any = plain(get_peft_model(copy.deepcopy(net), configs["petite"]))
        found.append(provider("plain", randomise_b(copy.deepcopy(theirs)), x))
    else:
        options: dict[str, Any] = {
            "r": case.r, "lora_alpha": 2 * case.r, "lora_dropout": case.dropout,
            "target_modules": targets,
        }  # fmt: skip
        configs = {
            "lora": LoraConfig(**options),
            "lora-fa": LoraConfig(**options, train_a=False),
            "bitfit": BitFitConfig(),
        }
        theirs = hf_peft(net, case.r, case.dropout, targets)
        found.append(provider("peft", randomise_b(copy.deepcopy(theirs)), x))
    for name, change in (
        ("checkpoint", lambda module: checkpointed(module, case.stages)),
        ("memsave", memsave),
    ):
        found.append(provider(name, change(randomise_b(copy.deepcopy(theirs))), x))
    backend = our_backends(device)[-1]
    for name, config in configs.items():
        # Whole networks take seconds per step: one of ours in 8 bits is enough there.
        in_8_bits = isinstance(net, Blocks) or name == next(iter(configs))
        for memory in ("exact", "int8") if in_8_bits else ("exact",):
            ours = randomise_b(get_peft_model(copy.deepcopy(net), config, memory=memory))
            label = f"ours-{name}" + ("" if memory == "exact" else "-int8")
            found.append(provider(label, ours, x, backend=backend))
    return found
