"""Adapter files: adapter_config.json and adapter_model.safetensors, as Hugging Face PEFT has them.

Tensor names are ``base_model.model.<module>.lora_A.weight`` for LoRA and
``base_model.model.<module>.<leaf>`` for the rest. The config carries the sha256 of the base network
that the adapter was trained on, the scanner and the normalisation. A pure LoRA adapter on dense
Conv3d and Linear layers opens in Hugging Face PEFT.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from petite_fast._version import __version__
from petite_fast.errors import InputError
from petite_fast.files import atomic_write
from petite_fast.peft.config import AnyConfig, LoraConfig, MixConfig, PeftConfig

CONFIG_NAME = "adapter_config.json"
MODEL_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_LEAVES = ("lora_A", "lora_B")
_INFORMATION = (
    "base_model_sha256",
    "scanner",
    "normalisation",
    "petite_fast_version",
    "torch_version",
    "metadata",
)
# What Hugging Face PEFT's LoraConfig wants to read beside r, lora_alpha and target_modules.
_HUGGING_FACE: dict[str, Any] = {
    "base_model_name_or_path": None,
    "task_type": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
}


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter directory.

    Attributes:
        directory: where it was read.
        config: how to adapt the base network.
        information: base_model_sha256, scanner, normalisation, versions, metadata.
        tensors: {name in the file: tensor}.
    """

    directory: Path
    config: AnyConfig
    information: dict[str, Any]
    tensors: dict[str, Tensor]


def file_name(name: str) -> str:
    """Name in the file of the tensor called `name` in the network."""
    return _PREFIX + name + (".weight" if name.rpartition(".")[2] in _LORA_LEAVES else "")


def state_sha256(state: Mapping[str, Any]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, sorted by name.

    The batch counters of BatchNorm layers are left out: nothing is computed from them.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor) or name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_adapter(
    directory: str | os.PathLike[str],
    config: AnyConfig,
    lora_modules: list[str],
    base_sha256: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write both files; an interrupted or failed write leaves the old pair.

    Args:
        directory: made if it is not there.
        config: how the network was adapted.
        lora_modules: names of the modules with LoRA, written when the config names none.
        base_sha256: of the base network.
        tensors: {name in the network: tensor}.
        metadata: JSON-able; `scanner` and `normalisation` get fields of their own.

    Raises:
        TypeError: `metadata` is not JSON-able.
        OSError: the disk is full, or the directory cannot be written.
    """
    free = dict(metadata or {})
    record = config.to_dict()
    if isinstance(config, LoraConfig):
        record |= _HUGGING_FACE
        record["target_modules"] = config.target_modules or lora_modules
    record |= {
        "base_model_sha256": base_sha256,
        "scanner": free.pop("scanner", None),
        "normalisation": free.pop("normalisation", None),
        "petite_fast_version": __version__,
        "torch_version": str(torch.__version__),
        "metadata": free,
    }
    text = json.dumps(record, indent=2) + "\n"
    content = safetensors.torch.save(
        {file_name(name): value.detach().cpu().contiguous() for name, value in tensors.items()},
        metadata={"format": "pt"},
    )
    folder = Path(directory)
    # Both complete before the first rename; the model is renamed first, the config last.
    with atomic_write(folder / CONFIG_NAME) as new_config:
        with atomic_write(folder / MODEL_NAME) as new_model:
            new_model.write_bytes(content)
            new_config.write_text(text, encoding="utf-8")


def read_information(directory: str | os.PathLike[str]) -> tuple[AnyConfig, dict[str, Any]]:
    """Config and information of an adapter, without its tensors.

    Raises:
        InputError: the file is missing, is not JSON, or was not written by petite_fast.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise InputError(f"{path} is not JSON, expected an adapter config") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is not a JSON object, expected an adapter config")
    information = {key: record.pop(key, None) for key in _INFORMATION}
    if record.get("peft_type") == LoraConfig.peft_type:
        for key, expected in _HUGGING_FACE.items():
            if (value := record.pop(key, expected)) != expected:
                raise InputError(f"{path}: {key} is {value!r}, expected {expected!r}")
    try:
        config = PeftConfig.from_dict(record)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(information["base_model_sha256"], str):
        raise InputError(f"{path} has no base_model_sha256, expected a file written by petite_fast")
    return config, information


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Both files.

    Raises:
        InputError: one is missing, truncated, or something else.
    """
    config, information = read_information(directory)
    path = Path(directory) / MODEL_NAME
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error})") from None
    return AdapterFile(Path(directory), config, information, tensors)


def check_base(file: AdapterFile, sha256: str) -> None:
    """Refuse an adapter that was trained on another base network.

    Raises:
        InputError: the hashes differ.
    """
    wanted = file.information["base_model_sha256"]
    if wanted != sha256:
        raise InputError(
            f"adapter {file.directory} was trained on another base network "
            f"(sha256 {wanted[:12]}..., this one has {sha256[:12]}...)"
        )


def check_scale(file: AdapterFile, config: AnyConfig) -> None:
    """Refuse an adapter with another rank or scale than the network was adapted with.

    Raises:
        InputError: they differ.
    """
    theirs, ours = _lora_settings(file.config), _lora_settings(config)
    if theirs != ours:
        raise InputError(
            f"adapter {file.directory} has (r, lora_alpha) {theirs or 'none'}, "
            f"expected {ours or 'none'} as in this network"
        )


def _lora_settings(config: AnyConfig | None) -> list[tuple[int, float]]:
    if isinstance(config, MixConfig):
        return _lora_settings(config.encoder) + _lora_settings(config.decoder)
    return [(config.r, config.lora_alpha)] if isinstance(config, LoraConfig) else []


def network_values(file: AdapterFile, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name in the network: tensor}, with the names and shapes of `expected`.

    Raises:
        InputError: missing or extra tensors, or another shape.
    """
    names = {file_name(name): name for name in expected}
    missing = sorted(set(names) - set(file.tensors))
    extra = sorted(set(file.tensors) - set(names))
    if missing or extra:
        raise InputError(
            f"adapter {file.directory} does not fit this network: {len(missing)} tensors missing"
            f"{_first(missing)}, {len(extra)} unexpected{_first(extra)}"
        )
    values = {}
    for key, name in names.items():
        value, shape = file.tensors[key], expected[name].shape
        if value.shape[: len(shape)] == shape and value.numel() == shape.numel():
            value = value.reshape(shape)  # lora_B of a convolution is (O, r, 1, 1, 1) in the file
        if value.shape != shape or not value.is_floating_point():
            raise InputError(
                f"adapter {file.directory}: {key} is {value.dtype} {tuple(value.shape)}, "
                f"expected floating point {tuple(shape)}"
            )
        values[name] = value
    return values


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
