"""One file per method: where its config puts adapters (`find`), and what happens there (a Site)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from petite_fast.peft.config import (
    AdapterConfig,
    BitFitConfig,
    LayerNormConfig,
    LoraConfig,
    PromptConfig,
    SSFConfig,
)
from petite_fast.peft.match import Scope
from petite_fast.peft.methods import adapter, lora, parameters, prompt, ssf
from petite_fast.peft.methods.site import Site

_FIND: dict[type, Callable[[Any, Scope], list[Site]]] = {
    AdapterConfig: adapter.find,
    BitFitConfig: parameters.find_biases,
    LayerNormConfig: parameters.find_layer_norms,
    LoraConfig: lora.find,
    PromptConfig: prompt.find,
    SSFConfig: ssf.find,
}


def find_sites(config: Any, scope: Scope) -> list[Site]:
    """Where `config` adapts what is in `scope`. Changes nothing.

    Raises:
        InputError: a target that matches nothing, or that the method cannot adapt.
        TypeError: `config` is not the config of a method.
    """
    for cls in type(config).__mro__:
        if cls in _FIND:
            return _FIND[cls](config, scope)
    raise TypeError(f"config: got {type(config).__name__}, wanted a petite_fast config")
