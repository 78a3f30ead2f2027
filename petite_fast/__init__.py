"""Adapt a 3-D network to a new scanner by training under one per cent of it."""

from petite_fast._version import __version__
from petite_fast.nn import (
    BottleneckAdapter,
    FrozenBatchNorm3d,
    FrozenConv3d,
    FrozenConvTranspose3d,
    LoRAConv3d,
    LoRAConvTranspose3d,
    LoRALinear,
    ScaleShift,
)
from petite_fast.peft import (
    BitFitConfig,
    LoraConfig,
    MixConfig,
    PeftModel,
    PromptConfig,
    get_peft_model,
    petite_recipe,
)

__all__ = [
    "BitFitConfig",
    "BottleneckAdapter",
    "FrozenBatchNorm3d",
    "FrozenConv3d",
    "FrozenConvTranspose3d",
    "LoRAConv3d",
    "LoRAConvTranspose3d",
    "LoRALinear",
    "LoraConfig",
    "MixConfig",
    "PeftModel",
    "PromptConfig",
    "ScaleShift",
    "__version__",
    "get_peft_model",
    "petite_recipe",
]
