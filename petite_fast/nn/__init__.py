"""Layers that hold parameters: torch's own layers, frozen or with adapters."""

from petite_fast.nn.adapter import BottleneckAdapter
from petite_fast.nn.frozen import FrozenConv3d, FrozenConvTranspose3d
from petite_fast.nn.lora import LoRAConv3d, LoRAConvTranspose3d, LoRALayer, LoRALinear
from petite_fast.nn.norm import FrozenBatchNorm3d
from petite_fast.nn.prompt import ChannelPrompt
from petite_fast.nn.ssf import ScaleShift

__all__ = [
    "BottleneckAdapter",
    "ChannelPrompt",
    "FrozenBatchNorm3d",
    "FrozenConv3d",
    "FrozenConvTranspose3d",
    "LoRAConv3d",
    "LoRAConvTranspose3d",
    "LoRALayer",
    "LoRALinear",
    "ScaleShift",
]
