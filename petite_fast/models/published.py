"""Published .pt files: which network is inside, told by its key names, and in what layout.

A file is a pickled dict with a network under "state_dict" (CVT-GAN: another under "state_dict_G").
Which is which differs between files, so a network is told by its key names, never by its slot.
Pickles are read with torch's weights-only reader: code in a file is refused, not run.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.peft import PeftModel, published_adapter

Network = Literal["cvtgan", "unetr"]
Kind = Literal["generator", "discriminator"]

_PREFIX: dict[tuple[Network, Kind], str] = {
    ("cvtgan", "generator"): "encoder_layer",
    ("cvtgan", "discriminator"): "conv0.",
    ("unetr", "generator"): "vit.",
}

# The published trainers keep their best scores beside the weights as NumPy scalars: harmless, but
# unknown to the weights-only reader. The two names are those of NumPy 2 and of NumPy 1.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]

_POSITIONS = "vit.patch_embedding.position_embeddings"
# MONAI before 1.4 had no norm in front of its (never used) cross-attention, later releases had
# the cross-attention itself in every block, whether it was wanted or not.
_UNUSED_NORM = re.compile(r"(vit\.blocks\.\d+\.)norm1(\.\w+)")
_STALE = re.compile(r"vit\.blocks\.\d+\.cross_attn\.")


def identify(state_dict: Mapping[str, Any]) -> tuple[Network, Kind]:
    """Tell which network a state dict belongs to, by its key names.

    Returns:
        ("cvtgan", "generator"), ("cvtgan", "discriminator") or ("unetr", "generator"); a generator
        turns short scans into standard ones.

    Raises:
        InputError: none of them, or more than one.
    """
    found = [entry for entry in _PREFIX if _is_of(entry, state_dict)]
    if len(found) != 1:
        names = ", ".join(repr(key) for key in list(state_dict)[:3])
        got = f"{len(state_dict)} entries ({names} ...)" if names else "an empty dict"
        prefixes = " or ".join(repr(prefix) for prefix in _PREFIX.values())
        raise InputError(
            "the state dict is not that of a CVT-GAN network or a UNETR: expected names beginning "
            f"with {prefixes}, got {got}"
        )
    return found[0]


def read_published(path: Path) -> tuple[Network, dict[Kind, Mapping[str, Any]]]:
    """The state dicts in a .pt file and which network they are of; a bare one is also found.

    Raises:
        InputError: the file is missing, damaged, holds code, or holds no network or both.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: expected a published .pt file")
    content = _unpickle(path)
    found: dict[tuple[Network, Kind], Mapping[str, Any]] = {}
    if isinstance(content, Mapping):
        for entry in (content, *content.values()):
            if isinstance(entry, Mapping):
                found |= {which: entry for which in _PREFIX if _is_of(which, entry)}
    networks = {network for network, _ in found}
    if len(networks) != 1:
        what = "both a CVT-GAN network and a UNETR" if networks else "no CVT-GAN network or UNETR"
        raise InputError(f"{path} holds {what}: expected one of the two")
    return networks.pop(), {kind: tensors for (_, kind), tensors in found.items()}


def load_published_adapter(
    net: nn.Module, path: str | os.PathLike[str], kind: Kind = "generator", lora_alpha: float = 16
) -> PeftModel:
    """Adapt `net` with the fine-tuned tensors of a published .pt file; see `published_adapter`.

    Args:
        net: the base network that the file was tuned from; adapted in place.
        path: the file.
        kind: "generator" (CVT-GAN's, or a UNETR) or "discriminator".
        lora_alpha: of the published run, which the file does not say.

    Raises:
        InputError: the file is missing, damaged, or holds code; it has no tensors of such a
            network, or tensors that have no equivalent here.
    """
    network, found = read_published(Path(path))
    if kind not in found:
        raise InputError(f"{path} holds no {kind} of {network}")
    return published_adapter(net, found[kind], lora_alpha=lora_alpha)


def _unpickle(path: Path) -> Any:
    try:
        # torch warns about unusual pickle protocols before it fails; the error below says it all.
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
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


def current_unetr(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a UNETR of any MONAI from 1.0 on, in the layout of today's.

    The norms in front of cross-attention, which is never used, get the values they start with
    where the file has none; entries of the cross-attention itself are dropped.
    """
    current = {key: value for key, value in tensors.items() if not _STALE.match(str(key))}
    for key, value in tensors.items():
        match = _UNUSED_NORM.fullmatch(str(key))
        if match and isinstance(value, Tensor):
            start = torch.ones_like if match[2] == ".weight" else torch.zeros_like
            current.setdefault(f"{match[1]}norm_cross_attn{match[2]}", start(value))
    return current


def unetr_img_size(
    tensors: Mapping[str, Any], img_size: Sequence[int] | None, where: str
) -> tuple[int, ...]:
    """The `img_size` that a UNETR was trained with, by its number n of position embeddings.

    `img_size`, where it has n patches; else n = g^3 is a cube of 16 g voxels and n = g^3 / 2 half
    of one, as for 64 x 64 x 32. Without position embeddings the answer is the published size: the
    file does not fit that network either, which is what the user is told.

    Raises:
        InputError: n does not tell, and `img_size` is not given or has another number of patches.
    """
    positions = tensors.get(_POSITIONS)
    if not isinstance(positions, Tensor) or positions.dim() != 3 or not positions.shape[1]:
        return 64, 64, 64
    count = positions.shape[1]
    if img_size is not None and np.prod([side // 16 for side in img_size]) == count:
        return tuple(img_size)
    side = round(count ** (1 / 3))
    if side**3 == count:
        return (16 * side,) * 3
    side = round((2 * count) ** (1 / 3))
    if side % 2 == 0 and side**3 == 2 * count:
        return 16 * side, 16 * side, 8 * side
    raise InputError(
        f"{where} has {count} position embeddings, which do not tell the patch it was trained "
        "with: expected img_size, three sides in voxels with that many patches of 16 x 16 x 16"
    )


def resized_unetr(tensors: Mapping[str, Any], old: Sequence[int], new: Sequence[int]) -> Any:
    """`tensors` with the position embeddings of `old` voxels interpolated to `new`."""
    from petite_fast.models.unetr import PATCH, at_grid, sides_of

    grids = [tuple(side // PATCH for side in sides_of(sides)) for sides in (old, new)]
    return {**tensors, _POSITIONS: at_grid(tensors[_POSITIONS], *grids)}  # type: ignore[arg-type]


def _is_of(which: tuple[Network, Kind], state_dict: Mapping[str, Any]) -> bool:
    return any(isinstance(key, str) and key.startswith(_PREFIX[which]) for key in state_dict)
