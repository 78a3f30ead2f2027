"""Adapter files: adapter_config.json and adapter_model.safetensors, as Hugging Face PEFT has them.

Tensor names are ``base_model.model.<module>.lora_A.weight`` for LoRA and
``base_model.model.<module>.<leaf>`` for the rest. The config carries the class and the sha256 of
the base network that the adapter was trained on, the scanner and the normalisation. A pure LoRA
adapter opens in Hugging Face PEFT, and PEFT's here: see `hugging_face`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from petite_fast._version import __version__
from petite_fast.errors import InputError
from petite_fast.files import atomic_write
from petite_fast.peft import hugging_face
from petite_fast.peft.config import AdapterConfig, AnyConfig, LoraConfig, MixConfig, PeftConfig

CONFIG_NAME = "adapter_config.json"
MODEL_NAME = "adapter_model.safetensors"
_LORA_LEAVES = ("lora_A", "lora_B")
_INFORMATION = (
    "base_model_class",
    "base_model_sha256",
    "scanner",
    "normalisation",
    "petite_fast_version",
    "torch_version",
    "metadata",
)
_log = logging.getLogger("petite_fast")


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter directory.

    Attributes:
        directory: where it was read.
        config: how to adapt the base network.
        information: base_model_class, base_model_sha256, scanner, normalisation, versions,
            metadata; None where the file says nothing (Hugging Face PEFT's say none of it).
        tensors: {name in the file: tensor}.
        record: of a LoRA adapter, what Hugging Face PEFT reads in its config; else empty.
    """

    directory: Path
    config: AnyConfig
    information: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether petite_fast wrote it, rather than Hugging Face PEFT."""
        return not self.record or hugging_face.OWN_KEY in self.record

    def crossing(self, net: nn.Module) -> list[str]:
        """Names of the layers with Hugging Face PEFT's form for grouped convolutions."""
        if not isinstance(self.config, LoraConfig):
            return []
        return hugging_face.crossing(net, self.config, self.tensors)


def file_name(name: str) -> str:
    """Name in the file of the tensor called `name` in the network."""
    ending = ".weight" if name.rpartition(".")[2] in _LORA_LEAVES else ""
    return hugging_face.PREFIX + name + ending


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
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    base: tuple[str, str],
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write both files; an interrupted or failed write leaves the old pair.

    Args:
        directory: made if it is not there.
        config: how the network was adapted.
        net: the adapted network.
        tensors: {name in the network: tensor}.
        base: class name and sha256 of the base network.
        metadata: JSON-able; `scanner` and `normalisation` get fields of their own.

    Raises:
        TypeError: `metadata` is not JSON-able.
        OSError: the disk is full, or the directory cannot be written.
    """
    free = dict(metadata or {})
    record = config.to_dict()
    if isinstance(config, LoraConfig):
        record = hugging_face.write_config(config, net)
        tensors = hugging_face.to_file(tensors, net)
    record |= {
        "base_model_class": base[0],
        "base_model_sha256": base[1],
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
        InputError: the file is missing, is not JSON, or holds no adapter that we know.
    """
    config, information, _ = _read_config(Path(directory) / CONFIG_NAME)
    return config, information


def _read_config(path: Path) -> tuple[AnyConfig, dict[str, Any], dict[str, Any]]:
    """Config, information, and the record of a LoRA adapter for Hugging Face PEFT."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise InputError(f"{path} is not JSON, expected an adapter config") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is not a JSON object, expected an adapter config")
    information = {key: record.pop(key, None) for key in _INFORMATION}
    lora = record.get("peft_type") == LoraConfig.peft_type
    try:
        config = hugging_face.read_config(record) if lora else PeftConfig.from_dict(record)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    ours = not lora or hugging_face.OWN_KEY in record
    if ours and not isinstance(information["base_model_sha256"], str):
        raise InputError(f"{path} has no base_model_sha256, expected a file written by petite_fast")
    return config, information, record if lora else {}


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Both files.

    Raises:
        InputError: one is missing, truncated, or something else.
    """
    config, information, record = _read_config(Path(directory) / CONFIG_NAME)
    path = Path(directory) / MODEL_NAME
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error})") from None
    return AdapterFile(Path(directory), config, information, tensors, record)


def check_base(file: AdapterFile, network: str, sha256: str) -> None:
    """Refuse an adapter that was trained on another base network.

    A file of Hugging Face PEFT's does not say what it was trained on; that is logged.

    Args:
        file: the adapter.
        network: class name of the base network here.
        sha256: its `state_sha256`.

    Raises:
        InputError: the hashes differ.
    """
    wanted = file.information["base_model_sha256"]
    if wanted is None:
        _log.warning(
            "adapter %s was not written by petite_fast and does not say which base network it was "
            "trained on: that it is this one could not be checked", file.directory
        )  # fmt: skip
        return
    if wanted == sha256:
        return
    theirs = file.information["base_model_class"]
    if theirs is not None and theirs != network:
        raise InputError(
            f"adapter {file.directory} was trained on a {theirs}, and this network is a {network}"
        )
    raise InputError(
        f"adapter {file.directory} was trained on another base network, with other weights "
        f"(sha256 {str(wanted)[:12]}..., this {network} has {sha256[:12]}...)"
    )


def check_settings(file: AdapterFile, config: AnyConfig, net: nn.Module) -> None:
    """Refuse an adapter whose tensors would mean something else in this network.

    Args:
        file: the adapter.
        config: how the network was adapted.
        net: the adapted network.

    Raises:
        InputError: another rank, scale, part or activation.
    """
    names = list(hugging_face.lora_layers(net))
    theirs, ours = _settings(file.config, names), _settings(config, names)
    for key in theirs | ours:
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"adapter {file.directory} has {theirs.get(key, 'nothing')} for {key}, "
                f"expected {ours.get(key, 'nothing')} as in this network"
            )


def _settings(config: AnyConfig | None, names: list[str], side: str = "") -> dict[str, str]:
    """What shapes do not tell, {where: words}: of LoRA per layer, of adapters the activation."""
    if isinstance(config, MixConfig):
        return _settings(config.encoder, names, " in the encoder") | _settings(
            config.decoder, names, " in the decoder"
        )
    if isinstance(config, AdapterConfig):
        return {f"the adapters{side}": f"activation {config.activation}"}
    if not isinstance(config, LoraConfig):
        return {}
    words = {}
    for name in names:
        r, alpha = config.settings(name)
        words[f"LoRA{side} on {name!r}"] = (
            f"r={r}, lora_alpha={alpha:g}, use_rslora={config.use_rslora}, "
            f"qkv_parts={config.qkv_parts!r}"
        )
    return words


def network_values(
    file: AdapterFile, net: nn.Module, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{name in the network: tensor}, with the names and shapes of `expected`.

    Raises:
        InputError: missing or extra tensors, another shape, or a LoRA file that means one thing
            here and another in Hugging Face PEFT.
    """
    layers = hugging_face.lora_layers(net)
    names = {file_name(name): name for name in expected}
    missing = sorted(set(names) - set(file.tensors))
    extra = sorted(set(file.tensors) - set(names))
    if missing or extra:
        raise InputError(
            f"adapter {file.directory} does not fit this network: {len(missing)} tensors missing"
            f"{_first(missing)}, {len(extra)} unexpected{_first(extra)}"
        )
    if isinstance(file.config, LoraConfig):
        if file.ours:
            hugging_face.check_agreement(file.record, file.config, net, file.directory)
        else:
            hugging_face.check_form(net, file.directory)
    values = {}
    for key, name in names.items():
        value, shape = file.tensors[key], expected[name].shape
        layer = layers.get(name.removesuffix(".lora_B"))
        if file.record and layer is not None:
            value = hugging_face.from_file(value, layer, f"adapter {file.directory}: {key}")
        if value.shape != shape or not value.is_floating_point():
            raise InputError(
                f"adapter {file.directory}: {key} is {value.dtype} {tuple(value.shape)}, "
                f"expected floating point {tuple(shape)}"
            )
        values[name] = value
    return values


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
