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
    AdapterConfig,
    BitFitConfig,
    LayerNormConfig,
    LoraConfig,
    MixConfig,
    PeftModel,
    PromptConfig,
    SSFConfig,
    get_peft_model,
    petite_recipe,
)

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "BottleneckAdapter",
    "FrozenBatchNorm3d",
    "FrozenConv3d",
    "FrozenConvTranspose3d",
    "LoRAConv3d",
    "LoRAConvTranspose3d",
    "LayerNormConfig",
    "LoRALinear",
    "LoraConfig",
    "MixConfig",
    "PeftModel",
    "PromptConfig",
    "SSFConfig",
    "ScaleShift",
    "__version__",
    "get_peft_model",
    "petite_recipe",
]
