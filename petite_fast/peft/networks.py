"""What injection must know of a network and cannot see: its two halves, what it never uses.

A network says so itself, by class attributes (regular expressions, matched at the beginning of a
dotted module or parameter name):

    peft_encoder, peft_decoder   the halves of a Mix
    peft_unused                  parameters that are never in the graph
    peft_ssf                     where SSF goes when its config names no module (the whole name)
    peft_ssf_shared              modules with one SSF pair in common: those of equal first groups

For the networks of MONAI and nnU-Net that people adapt, it is written down here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Parts:
    """Patterns for the names in one kind of network; None where nothing is known."""

    encoder: str | None = None
    decoder: str | None = None
    unused: str | None = None
    ssf: str | None = None
    ssf_shared: str | None = None


_UNET_UP = r"model(\.1\.submodule)*\.2(\.|$)"
_NNUNET = Parts(encoder=r"encoder\.", decoder=r"decoder\.")
_NNUNET_HEADS = r"decoder\.seg_layers\.(?!{last}\.)"  # in the graph with deep supervision only
_CROSS_ATTENTION = r"(.*\.)?norm_cross_attn\."  # in MONAI's blocks, skipped without a context
_ARCHITECTURES = "dynamic_network_architectures.architectures"

_KNOWN: dict[str, Parts] = {
    "monai.networks.nets.unetr.UNETR": Parts(
        # encoder1 to encoder4 are convolutions beside the ViT, which is the published encoder.
        encoder=r"vit(\.|$)",
        decoder=r"(encoder|decoder)\d|out\.",
        unused=_CROSS_ATTENTION,
    ),
    "monai.networks.nets.swin_unetr.SwinUNETR": Parts(
        encoder=r"swinViT|encoder\d", decoder=r"decoder\d|out\."
    ),
    # The nested halves: model.0 goes down, model.2 up, model.1.submodule holds the next pair.
    "monai.networks.nets.unet.UNet": Parts(encoder=rf"(?!{_UNET_UP})model\.", decoder=_UNET_UP),
    "monai.networks.nets.dynunet.DynUNet": Parts(
        encoder=r"input_block|downsamples|bottleneck",
        decoder=r"upsamples|output_block|deep_supervision_heads",
    ),
    "monai.networks.nets.vit.ViT": Parts(unused=_CROSS_ATTENTION),
    f"{_ARCHITECTURES}.unet.PlainConvUNet": _NNUNET,
    f"{_ARCHITECTURES}.unet.ResidualEncoderUNet": _NNUNET,
    f"{_ARCHITECTURES}.unet.ResidualUNet": _NNUNET,
}

# Blocks that a bottleneck adapter is put behind when its config names no module.
_ADAPTER_BLOCKS = {
    "petite_fast.models.cvt.Mlp",
    "monai.networks.blocks.mlp.MLPBlock",
    "monai.networks.blocks.dynunet_block.UnetResBlock",
    "monai.networks.blocks.dynunet_block.UnetBasicBlock",
    "monai.networks.blocks.convolutions.ResidualUnit",
    "dynamic_network_architectures.building_blocks.residual.BasicBlockD",
    "dynamic_network_architectures.building_blocks.residual.BottleneckD",
    "dynamic_network_architectures.building_blocks.simple_conv_blocks.StackedConvBlocks",
}


def parts(net: nn.Module) -> Parts:
    """What is known of `net`: what its class says, else what is written here for that class."""
    known = next((_KNOWN[name] for name in class_names(net) if name in _KNOWN), Parts())

    def of(name: str) -> str | None:
        return getattr(net, f"peft_{name}", None) or getattr(known, name)

    unused = of("unused")
    decoder = getattr(net, "decoder", None)
    if known is _NNUNET and not getattr(decoder, "deep_supervision", True):
        unused = _NNUNET_HEADS.format(last=len(decoder.seg_layers) - 1)  # type: ignore
    return Parts(of("encoder"), of("decoder"), unused, of("ssf"), of("ssf_shared"))


def takes_adapter(module: nn.Module) -> bool:
    """Whether `module` is a block of a kind that adapters are known to go behind."""
    return any(name in _ADAPTER_BLOCKS for name in class_names(module))


def is_monai_vit(module: nn.Module) -> bool:
    """Whether `module` is MONAI's ViT, which takes token prompts."""
    return "monai.networks.nets.vit.ViT" in class_names(module)


def class_names(module: nn.Module) -> list[str]:
    """Full names of the class of `module` and of its bases: nothing is imported to compare."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
