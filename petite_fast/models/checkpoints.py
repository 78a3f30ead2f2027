"""Checkpoints of CVT-GAN: our directories (safetensors and JSON) and the published .pt files.

A directory written by `save_network` holds

    network.json                 {"network": "cvtgan", "generator": {kwargs},
                                  "discriminator": {kwargs} | null, "metadata": {...}}
    generator.safetensors        the generator's state dict
    discriminator.safetensors    the discriminator's, when there is one

A published file is a pickled dict with one network under "state_dict" and the other under
"state_dict_G". Which is which differs between files, so a network is told by its key names, never
by its slot. Pickles are read with torch's weights-only reader: code in a file is refused, not run.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.files import atomic_write
from petite_fast.models.cvtgan import CVTGANDiscriminator, CVTGANGenerator

Kind = Literal["generator", "discriminator"]

_CLASSES: dict[Kind, type[CVTGANGenerator] | type[CVTGANDiscriminator]] = {
    "generator": CVTGANGenerator,
    "discriminator": CVTGANDiscriminator,
}
_PREFIX: dict[Kind, str] = {"generator": "encoder_layer", "discriminator": "conv0."}
_SUFFIXES = (".pt", ".pth")

# The published trainers keep their best scores beside the weights as NumPy scalars: harmless, but
# unknown to the weights-only reader. The two names are those of NumPy 2 and of NumPy 1.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


@dataclass
class LoadedNetwork:
    """What `load_network` read: networks in eval mode on the CPU, and what was saved with them."""

    generator: CVTGANGenerator
    discriminator: CVTGANDiscriminator | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def identify(state_dict: Mapping[str, Any]) -> Kind:
    """Tell which network a state dict belongs to, by its key names.

    Raises:
        InputError: neither, or both.
    """
    kinds = [kind for kind in _CLASSES if any(_is_of(kind, key) for key in state_dict)]
    if len(kinds) != 1:
        raise InputError(
            "the state dict is not that of a CVT-GAN network: expected names beginning with "
            f"'{_PREFIX['generator']}' or '{_PREFIX['discriminator']}', got {_some(state_dict)}"
        )
    return kinds[0]


def load_published(
    path: str | os.PathLike[str], kind: Kind = "generator"
) -> CVTGANGenerator | CVTGANDiscriminator:
    """Read one network of the published size from a .pt file, strictly.

    It comes in eval mode on the CPU. A file with only one of the two networks is fine.

    Raises:
        ValueError: `kind` is not "generator" or "discriminator".
        InputError: the file is missing, damaged, or holds code; it has no such network; an entry
            is missing, unknown or of another shape.
    """
    if kind not in _CLASSES:
        raise ValueError(f"kind must be 'generator' or 'discriminator', got {kind!r}")
    path = Path(path)
    found = _read_published(path)
    if kind not in found:
        raise InputError(f"{path} holds no {kind}: found {_listed(found)}")
    return _build(kind, {}, found[kind], f"the {kind} in {path}")


def save_network(
    directory: str | os.PathLike[str],
    generator: CVTGANGenerator,
    discriminator: CVTGANDiscriminator | None = None,
    **metadata: Any,
) -> None:
    """Write networks and `metadata` (JSON-able: scanner, normalisation, patch ...) to a directory.

    All files are complete on the disk before the first takes its name: when writing fails, what was
    in the directory before is untouched.

    Raises:
        ValueError: a network still carries adapters (its state dict is not that of its `config`).
        TypeError: `metadata` is not JSON-able.
        InputError: `directory` is a file.
        OSError: the disk is full, or the directory cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: expected a directory to save the network in")
    networks: dict[Kind, nn.Module | None] = {
        "generator": generator,
        "discriminator": discriminator,
    }
    description: dict[str, Any] = {"network": "cvtgan"}
    for kind, network in networks.items():
        description[kind] = None if network is None else network.config
        if network is not None:
            mismatch = _mismatch(_skeleton(kind, description[kind]), network.state_dict())
            if mismatch:
                raise ValueError(f"{kind} cannot be saved as a base network: {mismatch}")
    text = json.dumps(description | {"metadata": metadata}, indent=2) + "\n"
    with ExitStack() as files:
        # Contexts end in reverse: network.json, opened first, is the last to take its name.
        files.enter_context(atomic_write(directory / "network.json")).write_text(
            text, encoding="utf-8"
        )
        for kind, network in networks.items():
            if network is not None:
                temporary = files.enter_context(atomic_write(directory / f"{kind}.safetensors"))
                temporary.write_bytes(_serialised(network))
    if discriminator is None:
        (directory / "discriminator.safetensors").unlink(missing_ok=True)


def load_network(path: str | os.PathLike[str]) -> LoadedNetwork:
    """Read a directory written by `save_network`, or a published .pt file with a generator.

    Raises:
        InputError: nothing is there, a file is damaged or not ours, or an entry is missing,
            unknown or of another shape.
    """
    path = Path(path)
    if path.is_file() or path.suffix in _SUFFIXES:
        return _load_published_pair(path)
    if not path.exists():
        raise InputError(f"no network at {path}: expected a directory or a published .pt file")
    description = _read_description(path / "network.json")
    networks = {}
    for kind in _CLASSES:
        config = description[kind]
        if config is not None:
            file = path / f"{kind}.safetensors"
            networks[kind] = _build(kind, config, _read_tensors(file), str(file))
    return LoadedNetwork(**networks, metadata=description["metadata"])


def _load_published_pair(path: Path) -> LoadedNetwork:
    found = _read_published(path)
    if "generator" not in found:
        raise InputError(f"{path} holds no generator: found {_listed(found)}")
    networks = {
        kind: _build(kind, {}, tensors, f"the {kind} in {path}") for kind, tensors in found.items()
    }
    return LoadedNetwork(**networks)


def _read_published(path: Path) -> dict[Kind, Mapping[str, Any]]:
    """The networks of a .pt file, told by their keys; a bare state dict is also one."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: expected a published .pt file")
    try:
        # torch warns about unusual pickle protocols before it fails; the error below says it all.
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY_SCALARS):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file from elsewhere can fail in any way
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds Python code or objects besides tensors: it is refused, and nothing "
                "in it was run"
            ) from error
        raise InputError(
            f"{path} cannot be read as a PyTorch checkpoint: it is damaged, cut short or of "
            "another format"
        ) from error
    found: dict[Kind, Mapping[str, Any]] = {}
    if isinstance(content, Mapping):
        for entry in (content, *content.values()):
            if isinstance(entry, Mapping):
                for kind in _CLASSES:
                    if any(_is_of(kind, key) for key in entry):
                        found[kind] = entry
    return found


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is not a saved network: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: it is damaged or not ours") from error
    wanted: dict[str, Any] = {
        "generator": dict,
        "discriminator": (dict, type(None)),
        "metadata": dict,
    }
    if not (
        isinstance(description, dict)
        and description.get("network") == "cvtgan"
        and all(k in description and isinstance(description[k], t) for k, t in wanted.items())
    ):
        raise InputError(
            f"{path} does not describe a CVT-GAN: expected 'network': 'cvtgan' with the entries "
            "generator, discriminator and metadata"
        )
    return description


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"the saved network lacks the file {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file") from error


def _serialised(network: nn.Module) -> bytes:
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    # Bytes rather than a file: then it is Python that writes, and a full disk is an OSError.
    return save(tensors, metadata={"format": "pt"})


def _skeleton(kind: Kind, config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):  # no memory, no initialisation, no draw from the random state
        return _CLASSES[kind](**config)


def _build(kind: Kind, config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> Any:
    try:
        network = _skeleton(kind, config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} does not fit its description: {error}") from error
    mismatch = _mismatch(network, tensors)
    if mismatch:
        raise InputError(f"{where} does not fit the network: {mismatch}")
    network.to_empty(device="cpu")
    network.load_state_dict(tensors, strict=True)
    return network.eval()


def _mismatch(network: nn.Module, tensors: Mapping[str, Any]) -> str:
    """What keeps `tensors` from being the state dict of `network`; empty when nothing does."""
    expected = network.state_dict()
    missing = [key for key in expected if key not in tensors]
    if missing:
        return f"{len(missing)} of {len(expected)} entries are missing, the first is '{missing[0]}'"
    unknown = [key for key in tensors if key not in expected]
    if unknown:
        return f"{len(unknown)} entries are not part of it, the first is '{unknown[0]}'"
    for key, value in expected.items():
        got = tensors[key]
        if not isinstance(got, Tensor):
            return f"'{key}' is a {type(got).__name__}, expected a tensor"
        if got.shape != value.shape:
            return f"'{key}' has shape {list(got.shape)}, expected {list(value.shape)}"
    return ""


def _is_of(kind: Kind, key: Any) -> bool:
    return isinstance(key, str) and key.startswith(_PREFIX[kind])


def _listed(found: Mapping[Kind, Any]) -> str:
    return " and ".join(f"a {kind}" for kind in found) if found else "no CVT-GAN network"


def _some(state_dict: Mapping[str, Any]) -> str:
    names = ", ".join(repr(key) for key in list(state_dict)[:3])
    return f"{len(state_dict)} entries ({names} ...)" if names else "an empty dict"
