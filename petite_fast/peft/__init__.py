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
from petite_fast.peft.export import export_bundle, export_state_dict
from petite_fast.peft.io import read_information
from petite_fast.peft.mix import feasible, petite_recipe, recipe, recipes
from petite_fast.peft.model import PeftModel, get_peft_model
from petite_fast.peft.published import published_adapter

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "LayerNormConfig",
    "LoraConfig",
    "MixConfig",
    "PeftConfig",
    "PeftModel",
    "PromptConfig",
    "SSFConfig",
    "export_bundle",
    "export_state_dict",
    "feasible",
    "get_peft_model",
    "petite_recipe",
    "published_adapter",
    "read_information",
    "recipe",
    "recipes",
]
