"""Layers that hold parameters: torch's own layers, frozen or with adapters."""

from petite_fast.nn.adapted import AdaptedLayer
from petite_fast.nn.adapter import BottleneckAdapter
from petite_fast.nn.frozen import FrozenConv3d, FrozenConvTranspose3d
from petite_fast.nn.lora import LoRAConv3d, LoRAConvTranspose3d, LoRALayer, LoRALinear
from petite_fast.nn.norm import FrozenBatchNorm3d
from petite_fast.nn.prompt import ChannelPrompt
from petite_fast.nn.ssf import (
    ScaleShift,
    SSFBatchNorm3d,
    SSFConv3d,
    SSFConvTranspose3d,
    SSFGroupNorm,
    SSFInstanceNorm3d,
    SSFLayer,
    SSFLayerNorm,
    SSFLinear,
)
from petite_fast.nn.token_prompt import TokenPrompt

__all__ = [
    "AdaptedLayer",
    "BottleneckAdapter",
    "ChannelPrompt",
    "FrozenBatchNorm3d",
    "FrozenConv3d",
    "FrozenConvTranspose3d",
    "LoRAConv3d",
    "LoRAConvTranspose3d",
    "LoRALayer",
    "LoRALinear",
    "SSFBatchNorm3d",
    "SSFConv3d",
    "SSFConvTranspose3d",
    "SSFGroupNorm",
    "SSFInstanceNorm3d",
    "SSFLayer",
    "SSFLayerNorm",
    "SSFLinear",
    "ScaleShift",
    "TokenPrompt",
]
