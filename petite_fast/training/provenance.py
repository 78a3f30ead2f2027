"""What made a result: said beside it, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from petite_fast._version import __version__
from petite_fast.peft import PeftModel
from petite_fast.peft.io import state_sha256


def provenance(network: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Version, hashes and training of a network, JSON-able; nothing in it is about a patient.

    Args:
        network: a base network, or one with an adapter.
        metadata: what the files say of the training: scanner, normalisation, patch, recipe.

    Returns:
        {"version", "network_sha256": of all tensors, "base_sha256": of those without the adapter,
        "adapter": {"type", "recipe", "scanner"} or None, "normalisation", "patch"}.
    """
    adapter = None
    base = network_hash = state_sha256(network.state_dict())
    if isinstance(network, PeftModel):
        base = network.base_sha256()
        config = network.peft_config[network.active_adapter]
        adapter = {
            "type": config.peft_type,
            "recipe": metadata.get("recipe"),
            "scanner": metadata.get("scanner"),
        }
    return {
        "version": __version__,
        "network_sha256": network_hash,
        "base_sha256": base,
        "adapter": adapter,
        "normalisation": metadata.get("normalisation", "paired"),
        "patch": metadata.get("patch"),
    }
