"""Training state on disk: everything a run needs to go on bit for bit, without pickle.

    checkpoints/step-000800/state.safetensors   tensors of the networks, AdamW moments, RNG states
    checkpoints/step-000800/state.json          step, schedules, parameter groups, configuration

A checkpoint is written under a hidden name and renamed when it is complete, so a folder called
``step-*`` is always whole; after Ctrl-C or on a full disk the previous one is untouched.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from petite_fast.errors import InputError

KEEP = 2
Resume = Literal["auto", "never"] | Path
_NAME = re.compile(r"step-(\d+)")


def find_resume(folder: Path, resume: Resume) -> Path | None:
    """The checkpoint to go on from: the newest of `folder` ("auto", None if there is none),
    none ("never"), or the given one.

    Raises:
        InputError: the given checkpoint does not exist.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = _complete(folder)
        return found[-1] if found else None
    path = Path(resume)
    if (path / "state.json").is_file():
        return path
    # a run folder given instead of one of its checkpoints means its newest
    inside = _complete(path / "checkpoints") or _complete(path)
    if not inside:
        raise InputError(f"{path}: no training checkpoint here, expected a folder like step-000100")
    return inside[-1]


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
    """Write checkpoint ``folder/step-{step}`` atomically and keep the newest two.

    Raises:
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    temporary = folder / f".{secrets.token_hex(4)}-{target.name}"
    try:
        temporary.mkdir()
        # plain Python writes, because safetensors' own writer hides the OSError of a full disk
        _write(temporary / "state.safetensors", to_bytes(_own_storage(tensors)))
        _write(temporary / "state.json", json.dumps({"step": step, **record}).encode())
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _complete(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def load_state(checkpoint: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict]:
    """(tensors, record) of a checkpoint of a run with this configuration.

    Raises:
        InputError: the checkpoint cannot be read, or belongs to a run configured differently.
    """
    try:
        record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / "state.safetensors")
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise InputError(
            f"{checkpoint}: not a readable training checkpoint ({error}); "
            "give --resume never to start again"
        ) from error
    wanted = json.loads(json.dumps(config))
    saved = record["config"]
    changed = sorted(k for k in wanted.keys() | saved.keys() if wanted.get(k) != saved.get(k))
    if changed:
        details = ", ".join(f"{k} {saved.get(k)!r} -> {wanted.get(k)!r}" for k in changed)
        raise InputError(
            f"{checkpoint}: the run was started with other settings ({details}); "
            "use those again or give --resume never"
        )
    return tensors, record


def network_tensors(net: nn.Module, skip: frozenset[str], prefix: str) -> dict[str, Tensor]:
    """State-dict entries of `net` but those named in `skip` (frozen, known from the base file)."""
    return {f"{prefix}{k}": v for k, v in net.state_dict().items() if k not in skip}


def restore_network(
    net: nn.Module, tensors: dict[str, Tensor], skip: frozenset[str], prefix: str
) -> None:
    """Inverse of network_tensors, strict: every entry must be there, and no other."""
    saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    state = net.state_dict()
    wanted = {k: v.shape for k, v in state.items() if k not in skip}
    if wanted != {k: v.shape for k, v in saved.items()}:
        raise InputError("the training checkpoint belongs to another network or recipe")
    net.load_state_dict(saved, strict=False)


def optimizer_state(
    optimizer: Optimizer, names: list[str], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON-able rest) of an optimiser whose parameters, in order, are `names`."""
    state = optimizer.state_dict()
    tensors = {
        f"{prefix}{names[index]}/{key}": value
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def restore_optimizer(
    optimizer: Optimizer,
    names: list[str],
    prefix: str,
    tensors: dict[str, Tensor],
    record: dict[str, Any],
) -> None:
    """Inverse of optimizer_state."""
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(names)}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, entry = key.removeprefix(prefix).rsplit("/", 1)
            state.setdefault(index[name], {})[entry] = value
    groups = [
        # JSON has no tuples, AdamW wants its betas as one
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in record["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON-able rest) of the random generators of Python, numpy and torch."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": torch.from_numpy(np.asarray(keys, np.int64)),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    rest = {"python": random.getstate(), "numpy": [position, has_gauss, cached]}
    return tensors, rest


def restore_rng(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Inverse of rng_state."""
    version, internal, gauss = record["python"]
    random.setstate((version, tuple(internal), gauss))
    keys = tensors["rng/numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *record["numpy"]))
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _complete(folder: Path) -> list[Path]:
    """Checkpoints of `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def _own_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses views and shared storages."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()}  # fmt: skip


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
