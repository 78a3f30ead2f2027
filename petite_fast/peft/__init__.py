"""Where adapters go: configs, injection, mixes, files."""

from petite_fast.peft.config import (
    BitFitConfig,
    LoraConfig,
    MixConfig,
    PeftConfig,
    PromptConfig,
)
from petite_fast.peft.io import read_information
from petite_fast.peft.mix import RECIPES, petite_recipe
from petite_fast.peft.model import PeftModel, get_peft_model

__all__ = [
    "RECIPES",
    "BitFitConfig",
    "LoraConfig",
    "MixConfig",
    "PeftConfig",
    "PeftModel",
    "PromptConfig",
    "get_peft_model",
    "petite_recipe",
    "read_information",
]
