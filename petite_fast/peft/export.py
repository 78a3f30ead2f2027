"""Handing a merged network to other software: a plain state dict, or a MONAI bundle."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.files import atomic_write
from petite_fast.peft.inject import has_adapter
from petite_fast.peft.model import PeftModel

_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
# All that metadata.json says beside versions and tensors. Nothing else is taken over.
_TEXTS = {
    "version": "1.0.0",
    "task": "Standard-scan PET from a short PET scan",
    "description": "A network adapted with petite_fast to one PET scanner; the adapter is merged.",
    "authors": "not stated",
    "copyright": "not stated",
}
_OPTIONAL = (
    "intended_use", "data_source", "data_type", "references", "scanner", "normalisation"
)  # fmt: skip
# {normalisation: (offset, scale)} of an input x, as `petite_fast.data.Normaliser` has them.
_NORMALISATIONS = {
    "paired": (
        "$lambda x: 0.0",
        "$lambda x: 2 * float((lambda p: p[p > p.mean() / 8].mean())(x.clamp(min=0).double()))",
    ),
    "petite": ("$lambda x: float(x.min())", "$lambda x: float(x.max()) - float(x.min())"),
}


def export_state_dict(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of a merged network, as plain tensors on the CPU.

    Args:
        network: without adapters, as `merge_and_unload` leaves it.
        path: ends in .safetensors, or in .pt for ``torch.load(path, weights_only=True)``.

    Raises:
        InputError: the network has adapters, or `path` another ending.
        OSError: the disk is full, or the file cannot be written; an old one is left as it was.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise InputError(f"{path} ends in {path.suffix!r}, expected .safetensors or .pt")
    tensors = _plain_state(network)
    content = (
        safetensors.torch.save(tensors, metadata={"format": "pt"})
        if path.suffix == ".safetensors"
        else _pickled(tensors)
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def export_bundle(
    network: nn.Module,
    directory: str | os.PathLike[str],
    name: str,
    *,
    network_config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Path:
    """Write a merged network as a MONAI bundle, `directory`/`name`.

    configs/metadata.json, configs/inference.json and models/model.pt. The inference reads every
    NIfTI of `dataset_dir`, normalises it as in training, slides the network over it (windows
    overlap by half, equal weights), undoes the normalisation and writes to `output_dir`; running it
    needs MONAI with Ignite, parsing it MONAI alone.

    Args:
        network: without adapters, as `merge_and_unload` leaves it.
        directory: the bundle is made in it.
        name: of the bundle: letters, digits, and . _ - between them.
        network_config: how MONAI's ConfigParser builds the network: `_target_`, the dotted name of
            its class, and the keyword arguments.
        metadata: `patch`, the window's three sides in voxels; and, as wanted, version, task,
            description, authors, copyright, intended_use, data_source, data_type, references,
            scanner, and normalisation ("paired" or "petite"; without it the network gets the
            volume's own numbers). Nothing else: a bundle must not identify a patient.

    Returns:
        The bundle's directory.

    Raises:
        InputError: the network has adapters, is not what `network_config` describes, or `name` or
            `metadata` is not as above.
        TypeError: `network_config` or `metadata` is not JSON-able.
        ImportError: MONAI is not installed.
        OSError: the disk is full, or the directory cannot be written.

    Source: MONAI Bundle Specification.
    """
    if not re.fullmatch(r"\w([\w.-]*\w)?", name):
        raise InputError(f"name is {name!r}, expected letters, digits, and . _ - between them")
    patch = _check_metadata(metadata)
    tensors = _plain_state(network)
    _check_description(network_config, tensors)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    description = json.dumps(_metadata(name, network_config, metadata, patch, dtype), indent=2)
    inference = json.dumps(_inference(network_config, metadata, patch), indent=2)
    bundle = Path(directory) / name
    with ExitStack() as files:
        # Contexts end in reverse: metadata.json, opened first, is the last to take its name.
        for path, content in (
            ("configs/metadata.json", f"{description}\n".encode()),
            ("configs/inference.json", f"{inference}\n".encode()),
            ("models/model.pt", _pickled(tensors)),
        ):
            files.enter_context(atomic_write(bundle / path)).write_bytes(content)
    return bundle


def _plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict, every tensor with storage of its own."""
    if isinstance(network, PeftModel):
        raise InputError("the network has an adapter, expected it after merge_and_unload")
    for name, module in network.named_modules():
        if has_adapter(module):
            raise InputError(
                f"{name or 'the network'} still has a {type(module).__name__} or prompts, which "
                "cannot be folded into weights, so there is no plain network to export"
            )
    state = network.state_dict()
    return {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()
    }


def _pickled(tensors: Mapping[str, Tensor]) -> bytes:
    # Bytes rather than a file: then it is Python that writes, and a full disk is an OSError.
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def _check_metadata(metadata: Mapping[str, Any]) -> list[int]:
    """The patch; refuses what a bundle does not say."""
    known = {*_TEXTS, *_OPTIONAL, "patch"}
    if unknown := sorted(set(metadata) - known):
        raise InputError(f"metadata has {unknown}, expected only {sorted(known)}")
    patch = metadata.get("patch")
    if (
        not isinstance(patch, (list, tuple))
        or len(patch) != 3
        or not all(isinstance(side, int) and side > 0 for side in patch)
    ):
        raise InputError(f"metadata: patch is {patch!r}, expected three sides in voxels")
    kind = metadata.get("normalisation")
    if kind is not None and kind not in _NORMALISATIONS:
        raise InputError(
            f"metadata: normalisation is {kind!r}, expected one of {sorted(_NORMALISATIONS)}"
        )
    return list(patch)


def _check_description(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Build what `config` says and compare names and shapes."""
    try:
        from monai.bundle import ConfigParser
    except ImportError as error:
        raise ImportError(
            f'bundles need MONAI ({error}): pip install "petite_fast[app]"'
        ) from error
    target = config.get("_target_")
    if not isinstance(target, str):
        raise InputError(f"network_config: _target_ is {target!r}, expected the name of a class")
    try:
        with torch.random.fork_rng(devices=[]):
            parser = ConfigParser({"network_def": dict(config)})
            built = parser.get_parsed_content("network_def")
    except Exception as error:  # a class from elsewhere can fail in any way
        cause = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"network_config does not build {target}: {cause}") from error
    if not isinstance(built, nn.Module):
        raise InputError(f"network_config builds a {type(built).__name__}, expected a network")
    expected = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in (*expected, *got):
        if expected.get(name) != got.get(name):
            raise InputError(
                f"network_config describes another network: {name} is {got.get(name, 'missing')} "
                f"in this one, expected {expected.get(name, 'no such tensor')}"
            )


def _metadata(
    name: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    patch: list[int],
    dtype: str,
) -> dict[str, Any]:
    """The keys that the specification demands, the given ones, and the patch."""
    packages = ["nibabel"]
    package = config["_target_"].partition(".")[0]
    if package not in ("monai", "torch"):
        packages.append(package)
    texts = _TEXTS | {key: metadata[key] for key in (*_TEXTS, *_OPTIONAL) if key in metadata}
    tensor = {
        "type": "image",
        "format": "magnitude",
        "modality": "PT",
        "spatial_shape": patch,
        "dtype": dtype,
        "value_range": [],
        "is_patch_data": True,
    }
    channels = {side: int(config.get(f"{side}_channels", 1)) for side in ("in", "out")}

    def described(side: str, what: str) -> dict[str, Any]:
        count = channels[side]
        names = {str(i): what if count == 1 else f"{what} {i}" for i in range(count)}
        return tensor | {"num_channels": count, "channel_def": names}

    return {
        "schema": _SCHEMA,
        "name": name,
        **texts,
        "changelog": {texts["version"]: "exported by petite_fast"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": {package: _version(package) for package in packages},
        "patch": patch,
        "network_data_format": {
            "inputs": {"image": described("in", "short scan")},
            "outputs": {"pred": described("out", "standard scan")},
        },
    }


def _version(package: str) -> str:
    """Installed version without the local part ("2.13.0" for "2.13.0+cpu")."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _inference(
    config: Mapping[str, Any], metadata: Mapping[str, Any], patch: list[int]
) -> dict[str, Any]:
    """The inference workflow, in MONAI's config syntax."""
    before: list[Any] = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image"},
    ]
    after: list[Any] = [
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "desc-petite",
            "separate_folder": False,
            "resample": False,
        }
    ]
    functions = {}
    if (kind := metadata.get("normalisation")) is not None:
        functions = dict(zip(("offset", "scale"), _NORMALISATIONS[kind], strict=True))
        before += [
            "$lambda d: {**d, 'offset': @offset(d['image']), 'scale': @scale(d['image'])}",
            "$lambda d: {**d, 'image': (d['image'] - d['offset']) / d['scale']}",
        ]
        after.insert(0, "$lambda d: {**d, 'pred': d['pred'] * d['scale'] + d['offset']}")
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))",
        "network_def": dict(config),
        "network": "$@network_def.to(@device)",
        **functions,
        "preprocessing": {"_target_": "Compose", "transforms": before},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": patch,
            "sw_batch_size": 4,
            "overlap": 0.5,
            "mode": "constant",
        },
        "postprocessing": {"_target_": "Compose", "transforms": after},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "@ckpt_path",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }
