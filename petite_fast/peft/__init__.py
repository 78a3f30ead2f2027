"""Where adapters go: configs, injection, mixes, files."""

from petite_fast.peft.config import (
    AdapterConfig,
    BitFitConfig,
    LayerNormConfig,
    LoraConfig,
    MixConfig,
    PeftConfig,
    PromptConfig,
    SSFConfig,
)
from petite_fast.peft.io import read_information
from petite_fast.peft.mix import RECIPES, petite_recipe
from petite_fast.peft.model import PeftModel, get_peft_model

__all__ = [
    "RECIPES",
    "AdapterConfig",
    "BitFitConfig",
    "LayerNormConfig",
    "LoraConfig",
    "MixConfig",
    "PeftConfig",
    "PeftModel",
    "PromptConfig",
    "SSFConfig",
    "get_peft_model",
    "petite_recipe",
    "read_information",
]
