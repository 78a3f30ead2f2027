"""Saved networks: our directories (safetensors and JSON) and the published .pt files.

A directory written by `save_network` holds

    network.json                 {"network": "cvtgan" | "unetr", "generator": {kwargs},
                                  "discriminator": {kwargs} | null, "metadata": {...},
                                  "added": [names]}
    generator.safetensors        the generator's state dict
    discriminator.safetensors    the discriminator's, when there is one

The generator is the network that turns short scans into standard ones; UNETR has no other.
"added" names weights and biases of layers that are built without: SSF folded into a Linear without
bias gives it one. It is left out when there are none.
`petite_fast.models.published` knows the .pt files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.files import atomic_write
from petite_fast.models.cvtgan import CVTGANDiscriminator, CVTGANGenerator
from petite_fast.models.published import (
    Kind,
    Network,
    current_unetr,
    read_published,
    resized_unetr,
    unetr_img_size,
)

if TYPE_CHECKING:
    from petite_fast.models.unetr import UNETR

_KINDS: tuple[Kind, ...] = get_args(Kind)
_SUFFIXES = (".pt", ".pth")


@dataclass
class LoadedNetwork:
    """What `load_network` read: networks in eval mode on the CPU, and what was saved with them.

    Attributes:
        generator: the network short scan -> standard scan.
        discriminator: what judges a CVT-GAN's output; None without one.
        metadata: what `save_network` was given.
        network: "cvtgan" or "unetr".
    """

    generator: CVTGANGenerator | UNETR
    discriminator: CVTGANDiscriminator | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    network: Network = "cvtgan"


def load_published(
    path: str | os.PathLike[str],
    kind: Kind = "generator",
    *,
    img_size: Sequence[int] | None = None,
) -> CVTGANGenerator | CVTGANDiscriminator | UNETR:
    """Read one network of the published size from a .pt file, strictly.

    It comes in eval mode on the CPU. A file with only one of CVT-GAN's two networks is fine. Of
    UNETR the layouts of all MONAI releases are read: 170 entries, 194 with norms that are never
    used, and older ones with unused cross-attention.

    Args:
        path: the file.
        kind: "generator" (CVT-GAN's, or a UNETR) or "discriminator".
        img_size: UNETR only: sides in voxels to have position embeddings for; they are interpolated
            when the file's are for others. None is the file's own.

    Raises:
        ValueError: `kind` is not "generator" or "discriminator".
        InputError: the file is missing, damaged, or holds code; it has no such network; an entry
            is missing, unknown or of another shape; `img_size` is needed, or does not apply.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be 'generator' or 'discriminator', got {kind!r}")
    path = Path(path)
    network, found = read_published(path)
    if kind not in found:
        raise InputError(f"{path} holds no {kind}: found {_listed(found)}")
    return _build_published(path, network, kind, found[kind], img_size)


def save_network(
    directory: str | os.PathLike[str],
    generator: CVTGANGenerator | UNETR,
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
    networks: dict[Kind, Any] = {"generator": generator, "discriminator": discriminator}
    description: dict[str, Any] = {"network": generator.network}
    added = added_parameters(generator)
    for kind, network in networks.items():
        description[kind] = None if network is None else network.config
        if network is not None:
            extra = added if kind == "generator" else ()
            skeleton = _skeleton(generator.network, kind, description[kind], extra)
            mismatch = _mismatch(skeleton, network.state_dict())
            if mismatch:
                raise ValueError(f"{kind} cannot be saved as a base network: {mismatch}")
    description |= {"metadata": metadata, **({"added": added} if added else {})}
    text = json.dumps(description, indent=2) + "\n"
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


def load_network(
    path: str | os.PathLike[str], *, img_size: Sequence[int] | None = None
) -> LoadedNetwork:
    """Read a directory written by `save_network`, or a published .pt file with a generator.

    Args:
        path: directory or file.
        img_size: UNETR only: sides in voxels to have position embeddings for; they are interpolated
            once, here, when those read are for others. None keeps them.

    Raises:
        InputError: nothing is there, a file is damaged or not ours, or an entry is missing,
            unknown or of another shape; `img_size` is needed, or does not apply.
        ImportError: a UNETR, and MONAI is not installed.
    """
    path = Path(path)
    if path.is_file() or path.suffix in _SUFFIXES:
        return _load_published_file(path, img_size)
    if not path.exists():
        raise InputError(f"no network at {path}: expected a directory or a published .pt file")
    description = _read_description(path / "network.json")
    network: Network = description["network"]
    networks = {}
    for kind in _KINDS:
        config = description[kind]
        if config is not None:
            file = path / f"{kind}.safetensors"
            added = description.get("added", []) if kind == "generator" else []
            networks[kind] = _build(network, kind, config, _read_tensors(file), str(file), added)
    if img_size is not None:
        _require_unetr(network, path)
        unetr = networks["generator"]
        tensors = resized_unetr(unetr.state_dict(), unetr.config["img_size"], img_size)
        config = {**unetr.config, "img_size": img_size}
        networks["generator"] = _build(
            network, "generator", config, tensors, str(path), added_parameters(unetr)
        )
    return LoadedNetwork(**networks, metadata=description["metadata"], network=network)


def build_network(network: Network, added: Sequence[str] = (), **config: Any) -> Any:
    """A generator with random weights.

    Args:
        network: "cvtgan" or "unetr".
        added: names of weights and biases that its layers are built without: vectors with a number
            per channel, ones and zeros.
        config: keyword arguments of its class.

    Raises:
        ValueError: a name is not that of a weight or bias which is missing; see also the class.
    """
    module = _class(network, "generator")(**config)
    _add(module, added)
    return module


def bare_copy(generator: CVTGANGenerator | UNETR) -> Any:
    """The network itself, a new one in eval mode, without prompts and adapters that are in it."""
    added = added_parameters(generator)
    state = generator.state_dict()
    names = _skeleton(generator.network, "generator", generator.config, added).state_dict()
    tensors = {name: state[name] for name in names}
    return _build(generator.network, "generator", generator.config, tensors, "the network", added)


def added_parameters(generator: CVTGANGenerator | UNETR) -> list[str]:
    """Names of its weights and biases that its layers are built without."""
    skeleton = _skeleton(generator.network, "generator", generator.config)
    return [name for name in generator.state_dict() if _vacancy(skeleton, name)]


def _load_published_file(path: Path, img_size: Sequence[int] | None) -> LoadedNetwork:
    network, found = read_published(path)
    if "generator" not in found:
        raise InputError(f"{path} holds no generator: found {_listed(found)}")
    networks = {
        kind: _build_published(path, network, kind, tensors, img_size)
        for kind, tensors in found.items()
    }
    return LoadedNetwork(**networks, network=network)


def _build_published(
    path: Path,
    network: Network,
    kind: Kind,
    tensors: Mapping[str, Any],
    img_size: Sequence[int] | None,
) -> Any:
    where = f"the {kind} in {path}"
    if network == "cvtgan":
        if img_size is not None:
            _require_unetr(network, path)
        return _build(network, kind, {}, tensors, where)
    tensors = current_unetr(tensors)
    trained = unetr_img_size(tensors, img_size, where)
    if img_size is not None and trained != tuple(img_size):
        tensors = resized_unetr(tensors, trained, img_size)
    return _build(network, kind, {"img_size": img_size or trained}, tensors, where)


def _require_unetr(network: Network, path: Path) -> None:
    if network != "unetr":
        raise InputError(
            f"img_size is given for {path}, a CVT-GAN, which has no position embeddings and takes "
            "every patch: expected none"
        )


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
        and description.get("network") in get_args(Network)
        and all(k in description and isinstance(description[k], t) for k, t in wanted.items())
        and isinstance(description.get("added", []), list)
    ):
        raise InputError(
            f"{path} does not describe a network: expected 'network': 'cvtgan' or 'unetr' with the "
            "entries generator, discriminator and metadata"
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


def _class(network: Network, kind: Kind) -> Any:
    if network == "unetr":
        from petite_fast.models.unetr import UNETR

        return UNETR
    return CVTGANGenerator if kind == "generator" else CVTGANDiscriminator


def _skeleton(
    network: Network, kind: Kind, config: Mapping[str, Any], added: Sequence[str] = ()
) -> Any:
    cls = _class(network, kind)
    with torch.device("meta"):  # no memory, no initialisation, no draw from the random state
        module = cls(**config)
        _add(module, added)
    return module


def _add(module: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        size = _vacancy(module, name)
        if not size:
            raise ValueError(f"{name!r} is not a weight or bias that its layer is built without")
        path, _, leaf = name.rpartition(".")
        start = torch.ones if leaf == "weight" else torch.zeros
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(start(size)))


def _vacancy(module: nn.Module, name: str) -> int:
    """Channels of the layer whose weight or bias `name` would be, had it one; 0 for others."""
    path, _, leaf = str(name).rpartition(".")
    owner = dict(module.named_modules()).get(path)
    if (
        owner is None
        or leaf not in ("weight", "bias")
        or owner._parameters.get(leaf, 0) is not None
    ):
        return 0
    sizes = ("out_channels", "out_features", "num_features", "num_channels")
    return next((getattr(owner, size) for size in sizes if hasattr(owner, size)), 0)


def _build(
    network: Network,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    where: str,
    added: Sequence[str] = (),
) -> Any:
    try:
        module = _skeleton(network, kind, config, added)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} does not fit its description: {error}") from error
    mismatch = _mismatch(module, tensors)
    if mismatch:
        raise InputError(f"{where} does not fit the network: {mismatch}")
    module.to_empty(device="cpu")
    module.load_state_dict(tensors, strict=True)
    return module.eval()


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


def _listed(found: Mapping[Kind, Any]) -> str:
    return " and ".join(f"a {kind}" for kind in found)
