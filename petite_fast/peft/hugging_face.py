"""A LoRA adapter in the form of Hugging Face PEFT: its config, its tensors, and back.

In adapter_config.json the fields of PEFT's LoraConfig describe the adapter as PEFT sees it; the
key `petite_fast` holds our own config, which alone says what we read back. PEFT sees

- a convolution's lora_B as a 1x1x1 convolution (O, r, 1, 1, 1);
- n parts of a fused query, key and value as one adapter of rank n r, with lora_B (3D, n r) that is
  zero outside the parts' blocks, and lora_alpha such that the scale is the same.

Transposed convolutions, grouped convolutions in our form (lora_A (r, C/groups, k..)), dilation and
padding that is not zeros have no such form. PEFT refuses a file with one of these, by the kind of
layer or by a shape: of such layers lora_B is written as it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.nn.lora import LoRAConv3d, LoRALayer, LoRALinear
from petite_fast.peft.config import LoraConfig, PeftConfig

OWN_KEY = "petite_fast"
PREFIX = "base_model.model."
"""What PEFT puts in front of every tensor's name."""

_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)  # all that a LoRA's function depends on, beside its targets
# What else PEFT wants to read, for us always the same.
_CONSTANTS: dict[str, Any] = {
    "base_model_name_or_path": None,
    "task_type": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_dora": False,
    "modules_to_save": None,
}
# PEFT's fields that change nothing for an adapter that is trained already.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# How A and B may have started; PEFT's other starts change the base network's weights as well.
_STARTS = ("true", "false", "gaussian", "eva", "orthogonal")
_REASONS = {
    "alora_invocation_tokens": "activated LoRA is not supported",
    "bias": "trained biases beside LoRA are not supported",
    "exclude_modules": "name the adapted modules in target_modules instead",
    "fan_in_fan_out": "layers with a transposed weight are not supported",
    "layer_replication": "replicated layers are not supported",
    "layers_to_transform": "name the adapted modules in target_modules instead",
    "lora_bias": "a bias in lora_B is not supported",
    "megatron_config": "Megatron layers are not supported",
    "modules_to_save": "fully trained modules beside LoRA are not supported",
    "target_parameters": "LoRA on single parameters is not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "use_dora": "DoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}


def lora_layers(net: nn.Module) -> dict[str, LoRALayer]:
    """{dotted name: layer with LoRA}."""
    return {name: m for name, m in net.named_modules() if isinstance(m, LoRALayer)}


def write_config(config: LoraConfig, net: nn.Module) -> dict[str, Any]:
    """The record for adapter_config.json: PEFT's fields, and `config` itself under `petite_fast`.

    Modules are named in full, so that PEFT adapts exactly those that have LoRA in `net`.
    """
    layers = lora_layers(net)
    seen = {name: _rank_and_alpha(layer) for name, layer in layers.items()}
    r, alpha = Counter(seen.values()).most_common(1)[0][0]
    # PEFT takes a pattern for an ending too; the anchor makes it the whole name.
    return {
        "peft_type": LoraConfig.peft_type,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _targets(list(layers), [name for name, _ in net.named_modules()]),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": {f"^{re.escape(n)}": rank for n, (rank, _) in seen.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, (_, a) in seen.items() if a != alpha},
        **_CONSTANTS,
        OWN_KEY: config.to_dict(),
    }


def read_config(record: Mapping[str, Any]) -> LoraConfig:
    """The config of a record that `write_config` or PEFT wrote.

    Raises:
        InputError: PEFT would compute something that we do not, or a value is out of range.
    """
    record = dict(record)
    own = record.pop(OWN_KEY, None)
    _refuse_options(record)
    if own is not None:
        config = PeftConfig.from_dict(own) if isinstance(own, Mapping) else own
        if not isinstance(config, LoraConfig):
            raise InputError(f"{OWN_KEY} is {own!r}, expected the fields of a LORA config")
        return config
    if not record.get("target_modules"):
        raise InputError(
            f"target_modules is {record.get('target_modules')!r}, expected names of modules"
        )
    return LoraConfig(
        r=record.get("r", 8),
        lora_alpha=record.get("lora_alpha", 8),  # PEFT's default, not ours
        target_modules=record["target_modules"],
        lora_dropout=record.get("lora_dropout", 0.0),
        use_rslora=record.get("use_rslora", False),
        rank_pattern=record.get("rank_pattern") or {},
        alpha_pattern=record.get("alpha_pattern") or {},
    )


def check_agreement(
    record: Mapping[str, Any], config: LoraConfig, net: nn.Module, where: str | Path
) -> None:
    """Refuse a file whose two parts differ: PEFT would compute something else than we.

    Raises:
        InputError: PEFT's fields in `record` are not those that belong to `config`.
    """
    expected = write_config(config, net)
    for key in _SETTINGS:
        if record.get(key) != expected[key]:
            raise InputError(
                f"adapter {where}: {key} is {record.get(key)!r} for Hugging Face PEFT, expected "
                f"{expected[key]!r} as under {OWN_KEY!r}"
            )


def crossing(net: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the grouped convolutions of `net` that have PEFT's grouped form in `tensors`.

    There lora_A is a dense convolution (r, C, k..) whose r channels every group draws on.
    """
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv3d)
        and module.groups > 1
        and (value := tensors.get(f"{PREFIX}{name}.lora_A.weight")) is not None
        and value.shape[:2] == (config.settings(name)[0], module.in_channels)
        and value.shape[0] % module.groups == 0
    ]


def to_file(tensors: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """The adapter's `tensors`, {name in `net`: tensor}, with the shapes that PEFT wants."""
    tensors = dict(tensors)
    for name, layer in lora_layers(net).items():
        key = f"{name}.lora_B"
        if isinstance(layer, LoRAConv3d) and _no_form(layer) is None:
            tensors[key] = tensors[key][..., None, None, None]
        elif _parts(layer):
            tensors[key] = layer.factors()[1]
    return tensors


def from_file(value: Tensor, layer: LoRALayer, where: str) -> Tensor:
    """The layer's lora_B from PEFT's: the inverse of `to_file`; other shapes come back as they are.

    Raises:
        InputError: numbers outside the blocks of a fused layer's parts.
    """
    if isinstance(layer, LoRAConv3d) and value.ndim == 5 and value.shape[2:] == (1, 1, 1):
        return value.flatten(1)
    parts = _parts(layer)
    depth = layer.weight.shape[0] // 3
    if not parts or value.shape != (3 * depth, len(parts) * layer.r):
        return value
    blocks = torch.cat(
        [
            value[part * depth : (part + 1) * depth, i * layer.r : (i + 1) * layer.r]
            for i, part in enumerate(parts)
        ]
    )
    if value.count_nonzero() != blocks.count_nonzero():
        raise InputError(
            f"{where} is not zero outside its blocks, expected an adapter of some parts of a fused "
            "query, key and value alone"
        )
    return blocks


def check_form(net: nn.Module, where: str | Path) -> None:
    """Refuse a file of PEFT's for layers where it computes something else than we.

    Raises:
        InputError: naming the layer.
    """
    for name, layer in lora_layers(net).items():
        if (reason := _no_form(layer)) is not None:
            raise InputError(
                f"adapter {where} was written by Hugging Face PEFT, whose LoRA knows no {reason}, "
                f"as {name!r} has"
            )


def _parts(layer: Any) -> list[int]:
    """Positions in (query, key, value) of the adapted parts; empty for any other layer."""
    if not isinstance(layer, LoRALinear) or layer.qkv_parts == "qkv":
        return []
    return ["qkv".index(part) for part in layer.qkv_parts]


def _rank_and_alpha(layer: Any) -> tuple[int, float]:
    """r and lora_alpha as PEFT has to have them: n parts of rank r are one adapter of rank n r."""
    n = len(_parts(layer)) or 1
    if n == 1:
        return layer.r, layer.lora_alpha
    return n * layer.r, layer.lora_alpha * (math.sqrt(n) if layer.use_rslora else n)


def _no_form(layer: Any) -> str | None:
    """What keeps PEFT from computing what `layer` does; None where it can."""
    if isinstance(layer, nn.ConvTranspose3d):
        return "transposed convolutions"
    if isinstance(layer, LoRAConv3d):
        # PEFT's lora_A has the stride and the padding of the base layer and nothing else of it.
        if layer.groups > 1 and not layer.crossing:
            return "single lora_A for all groups"
        if layer.padding_mode != "zeros":
            return f"padding_mode {layer.padding_mode!r}"
        if any(step != 1 for step in layer.dilation):
            return "dilation"
    return None


def _targets(chosen: list[str], every: list[str]) -> list[str] | str:
    """`chosen` for PEFT, which takes an entry of a list for an ending of other names too."""
    endings = tuple(f".{name}" for name in chosen)
    if any(name.endswith(endings) for name in set(every) - set(chosen)):
        return "|".join(re.escape(name) for name in chosen)
    return chosen


def _refuse_options(record: Mapping[str, Any]) -> None:
    known = {"peft_type", "target_modules", *_SETTINGS, *_HARMLESS}
    for key, value in record.items():
        off = value is None or value is False or value in ({}, [])
        if off or key in known or (key == "bias" and value == "none"):
            continue
        if key == "init_lora_weights":
            if str(value).lower() in _STARTS:
                continue
            reason = "it changes the base network; convert the adapter to plain LoRA in PEFT first"
        else:
            reason = _REASONS.get(key, "this option is unknown here and not at its default")
        raise InputError(f"{key} is {value!r}: {reason}")
