"""Suite `memory`: what a training step keeps, its peak and its time, for whole networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu
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
        small: a piece of a network, which is measured more often; its input wants a gradient.
    """

    label: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    stages: str
    r: int | None = 8
    dropout: float = 0.0
    small: bool = False


class Setting(NamedTuple):
    """Where and how the networks run.

    Attributes:
        device: of the network and its input.
        autocast: dtype that the forward is under torch.autocast with; None is float32 without.
        layout: of volumes and weights.
        backend: of ours; None is what dispatch chooses.
        more: backends that are forced for the first of ours once more.
    """

    device: str = "cpu"
    autocast: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format
    backend: str | None = None
    more: tuple[str, ...] = ()


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
        small=True,
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


UNETR_STAGES = r"vit\.blocks\.\d+|(encoder|decoder)\d"
DYNUNET = Case(
    "DynUNet, 64^3 b1, r 8",
    _dynunet,
    (1, 1, 64, 64, 64),
    r"input_block|bottleneck|downsamples\.\d|upsamples\.\d",
)
CVTGAN = Case(
    "CVT-GAN, PETITE, 64^3 b1",
    CVTGANGenerator,
    (1, 1, 64, 64, 64),
    r"(en|de)coder_layer\d(_down|_up)?",
    r=None,
)
CASES = [
    _blocks(nn.InstanceNorm3d),
    _blocks(nn.InstanceNorm3d, 0.1),
    _blocks(nn.BatchNorm3d),
    Case("MONAI UNet, 64^3 b1, r 8", _unet, (1, 1, 64, 64, 64), r"(.*\.)?unit\d|model\..*\.2\.0"),
    Case(
        "UNETR, 64^3 b1, r 8",
        lambda: UNETR(64, feature_size=16),
        (1, 1, 64, 64, 64),
        UNETR_STAGES,
    ),
    Case(
        "SwinUNETR, 64^3 b1, r 8",
        _swin_unetr,
        (1, 1, 64, 64, 64),
        r"swinViT\.layers\d\.0\.blocks\.\d+|(encoder|decoder)\d+",
    ),
    DYNUNET,
    CVTGAN,
]
# What a GPU is bought for.
GPU_CASES = [
    CVTGAN._replace(label="CVT-GAN, PETITE, 64^3 b8", size=(8, 1, 64, 64, 64)),
    Case(
        "UNETR, 96^3 b2, r 8",
        lambda: UNETR(96, feature_size=16),
        (2, 1, 96, 96, 96),
        UNETR_STAGES,
    ),
    DYNUNET._replace(label="DynUNet, 96^3 b2, r 8", size=(2, 1, 96, 96, 96)),
]


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every case on the CPU, in float32; a record for each."""
    for case in CASES:
        providers = _providers(case, Setting(backend=our_backends()[-1]))
        figures = compare(providers, "cpu", _repeats(case, quick), warmup=0 if quick else 1)
        yield _record(case, figures)


def gpu_run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every case on the GPU, under autocast to bfloat16; a record for each."""
    more = tuple(name for name in gpu.backends() if name == "triton")
    for case in [*GPU_CASES, *CASES]:
        yield gpu_record(
            case, Setting("cuda", torch.bfloat16, gpu.LAST, more=more), _repeats(case, quick)
        )


def gpu_record(case: Case, setting: Setting, repeats: int) -> dict[str, Any]:
    """The record of a case, in which a provider may fail."""
    providers = _providers(case, setting)
    return _record(case, gpu.measured(case.label, providers, setting.device, repeats, warmup=1))


def _repeats(case: Case, quick: bool) -> int:
    if case.small:
        return 5 if quick else 15
    return 2 if quick else 5


def _record(case: Case, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    figures["floor"] = dict(figures["frozen"])
    return {"case": case.label, "unit_bytes": 4 * math.prod(case.size), "providers": figures}


def _providers(case: Case, setting: Setting) -> list[Provider]:
    """Full fine-tuning, the frozen network, what others do, and ours."""
    torch.manual_seed(0)
    net = case.build().to(setting.device)
    x = torch.randn(case.size, device=setting.device).to(memory_format=setting.layout)
    with_gradient = x.clone().requires_grad_()
    if case.small:  # its input comes from a layer
        x = with_gradient
    targets = [
        name for name, m in net.named_modules() if type(m) is nn.Conv3d and max(m.kernel_size) == 3
    ]
    found: list[Provider] = []

    def add(name: str, module: nn.Module, x: torch.Tensor, backend: str | None = None) -> None:
        if setting.layout != torch.contiguous_format:
            module.to(memory_format=setting.layout)
        found.append(provider(name, module, x, backend=backend, autocast=setting.autocast))

    add("full", net, x)
    add("frozen", frozen(net), with_gradient)  # without grad_x it has no backward
    if case.r is None:
        configs: dict[str, Any] = {"petite": petite_recipe("cvtgan"), "ssf": SSFConfig()}
        reason = "HF PEFT has neither channel prompts nor BitFit"
        found.append(Provider("peft", None, None, why_not=reason))
        theirs: Any = plain(get_peft_model(copy.deepcopy(net), configs["petite"]))
        add("plain", randomise_b(copy.deepcopy(theirs)), x)
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
        add("peft", randomise_b(copy.deepcopy(theirs)), x)
    for name, change in (
        ("checkpoint", lambda module: checkpointed(module, case.stages)),
        ("memsave", memsave),
    ):
        add(name, change(randomise_b(copy.deepcopy(theirs))), x)
    for name, config in configs.items():
        # Whole networks take seconds per step: one of ours in 8 bits is enough there.
        in_8_bits = case.small or name == next(iter(configs))
        for memory in ("exact", "int8") if in_8_bits else ("exact",):
            ours = randomise_b(get_peft_model(copy.deepcopy(net), config, memory=memory))
            label = f"ours-{name}" + ("" if memory == "exact" else "-int8")
            add(label, ours, x, setting.backend)
    first = f"ours-{next(iter(configs))}"
    for backend in setting.more:
        again = next(step for step in found if step.name == first)
        found.append(again._replace(name=f"{first}-{backend}", backend=backend))
    return found
