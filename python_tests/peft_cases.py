"""The table (network, config) that every method goes through, and the small networks in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from petite_fast import (
    AdapterConfig,
    BitFitConfig,
    LayerNormConfig,
    LoraConfig,
    MixConfig,
    PromptConfig,
    SSFConfig,
)
from petite_fast.models import CVTGANGenerator
from petite_fast.peft.mix import recipe


class Network(NamedTuple):
    """How to build one, and the size of an input it takes."""

    build: Callable[[], nn.Module]
    size: tuple[int, int, int]


def _unetr() -> nn.Module:
    from petite_fast.models import UNETR

    return UNETR((32, 32, 16), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2)


def _monai_unetr() -> nn.Module:
    from monai.networks.nets import UNETR

    return UNETR(1, 1, (32, 32, 16), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2)


def _swin() -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 1, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))


def _dynunet() -> nn.Module:
    from monai.networks.nets import DynUNet

    return DynUNet(
        3, 1, 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], res_block=True,
        norm_name=("INSTANCE", {"affine": True}),
    )  # fmt: skip


def _unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, 1, channels=(4, 8, 16), strides=(2, 2), num_res_units=2)


def _plain_conv_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        1, 3, (4, 8, 8), nn.Conv3d, 3, (1, 2, 2), 1, 1, 1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip


NETWORKS = {
    "cvtgan": Network(lambda: CVTGANGenerator(widths=(4, 8, 16, 32)), (32, 32, 16)),
    "unetr": Network(_unetr, (32, 32, 16)),
    "monai-unetr": Network(_monai_unetr, (32, 32, 16)),
    "swin": Network(_swin, (64, 32, 32)),
    "dynunet": Network(_dynunet, (8, 8, 8)),
    "unet": Network(_unet, (8, 8, 8)),
    "plain-conv-unet": Network(_plain_conv_unet, (8, 8, 8)),
}

# What any network takes.
GENERIC: dict[str, Any] = {
    "lora": LoraConfig(r=2),
    "lora-fa": LoraConfig(r=2, train_a=False),
    "rslora": LoraConfig(r=4, lora_alpha=3, use_rslora=True),
    "bitfit": BitFitConfig(),
    "ssf": SSFConfig(),
    "adapter": AdapterConfig(reduction=2),
    "mix": MixConfig(encoder=LoraConfig(r=2), decoder=SSFConfig(), bitfit=True),
    "mix-adapter": MixConfig(encoder=SSFConfig(), decoder=AdapterConfig(reduction=2)),
}

CASES: dict[str, tuple[str, Any]] = {
    **{
        f"cvtgan-{name}": ("cvtgan", recipe("cvtgan", name, r=2, num_prompts=prompts))
        for name, prompts in {
            "petite": (0, 2, 3), "ln": None, "bitfit": None, "adapter": None, "lora": None,
            "lora-linear": None, "vpt": (1, 2, 3), "vpt-deep": (1, 2, 3), "ssf": None,
            "lora+vpt": None, "ssf+lora": None,
        }.items()
    },
    **{
        f"unetr-{name}": ("unetr", recipe("unetr", name, r=2, num_prompts=prompts))
        for name, prompts in {
            "petite": None, "ln": None, "bitfit": None, "adapter": None, "lora": None,
            "vpt": (3,), "vpt-deep": (3,), "ssf": None, "adapter+lora": None, "vpt+adapter": (3,),
        }.items()
    },
    "monai-unetr-lora": ("monai-unetr", GENERIC["lora"]),
    "monai-unetr-ln": ("monai-unetr", LayerNormConfig()),
    "monai-unetr-vpt": ("monai-unetr", PromptConfig({"vit": 3})),
    "monai-unetr-ssf": ("monai-unetr", GENERIC["ssf"]),
    "monai-unetr-qv": (
        "monai-unetr", LoraConfig(r=2, target_modules=["qkv"], qkv_parts="qv")
    ),
    "dynunet-lora-fa": ("dynunet", GENERIC["lora-fa"]),
    "dynunet-rslora": ("dynunet", GENERIC["rslora"]),
    "dynunet-mix": ("dynunet", GENERIC["mix"]),
    "dynunet-adapter": ("dynunet", GENERIC["adapter"]),
    "unet-lora": ("unet", GENERIC["lora"]),
    "unet-ssf": ("unet", GENERIC["ssf"]),
    "unet-mix-adapter": ("unet", GENERIC["mix-adapter"]),
    "plain-conv-unet-lora": ("plain-conv-unet", GENERIC["lora"]),
    "plain-conv-unet-bitfit": ("plain-conv-unet", GENERIC["bitfit"]),
    "plain-conv-unet-mix": ("plain-conv-unet", GENERIC["mix"]),
    "plain-conv-unet-adapter": ("plain-conv-unet", GENERIC["adapter"]),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network, the same every time, statistics of its norms away from 0 and 1, in eval mode."""
    torch.manual_seed(0)
    net = NETWORKS[name].build().to(dtype)
    with torch.no_grad():
        for norm in net.modules():
            if getattr(norm, "running_mean", None) is not None:
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 1.5)
            weight = getattr(norm, "weight", None)
            if isinstance(norm, (nn.LayerNorm, nn.InstanceNorm3d)) and weight is not None:
                weight.uniform_(0.8, 1.2)
                norm.bias.normal_(std=0.1)
    return net.eval()


def inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """x [batch, 1, D, H, W], the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 1, *NETWORKS[name].size, generator=generator, dtype=dtype)


def scramble(model: nn.Module, seed: int = 0) -> Any:
    """Move every trainable parameter, as training would; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output without a graph."""
    with torch.no_grad():
        return net(x)
