"""Torch datasets over pairs of volumes: random patches for training, whole volumes after."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from petite_fast.data.cases import Pair
from petite_fast.data.normalise import Normaliser, ScaleRecord, foreground_threshold
from petite_fast.data.volume import Volume, read_volume, require_static, same_grid
from petite_fast.errors import InputError

_MIXED_VOLUMES = 8


def load_pair(pair: Pair) -> tuple[Volume, Volume]:
    """Read input and target and check that they share one grid.

    Raises:
        InputError: either cannot be read or is a dynamic series, or shapes or affines differ (by
            more than 1e-3 mm anywhere in the volume).
    """
    image, label = (require_static(read_volume(p)) for p in (pair.image, pair.label))
    if not same_grid(image, label):
        raise InputError(
            f"{image.source} and {label.source} are on different grids"
            f" ({grid_text(image)} and {grid_text(label)}); expected the same shape and affine"
        )
    return image, label


def grid_text(volume: Volume) -> str:
    """Shape, voxel size and origin in words, for messages."""
    shape = "x".join(map(str, volume.shape))
    spacing = "x".join(f"{mm:.4g}" for mm in volume.spacing)
    origin = ", ".join(f"{mm:.5g}" for mm in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm at ({origin}) mm"


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What the patch sampler needs of a pair; `foreground` holds flat voxel indices."""

    input: np.ndarray
    target: np.ndarray
    foreground: np.ndarray
    records: tuple[ScaleRecord, ScaleRecord]

    @property
    def nbytes(self) -> int:
        return self.input.nbytes + self.target.nbytes + self.foreground.nbytes


class _Cache:
    """Least-recently-used store of loaded pairs, never more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._items: OrderedDict[int, _Loaded] = OrderedDict()

    def get(self, key: int) -> _Loaded | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: int, item: _Loaded) -> None:
        if item.nbytes > self.limit:
            return
        while self.nbytes + item.nbytes > self.limit:
            self.nbytes -= self._items.popitem(last=False)[1].nbytes
        self._items[key] = item
        self.nbytes += item.nbytes

    def __getstate__(self) -> dict[str, Any]:
        # A worker process starts with an empty cache instead of a pickled copy of this one.
        return {"limit": self.limit, "nbytes": 0, "_items": OrderedDict()}


class PatchDataset(Dataset[dict[str, Any]]):
    """Random patches of scan pairs, normalised.

    Item i is a function of (seed, epoch, i) alone, so a resumed run sees the patches it
    would have seen. The dataset does its own shuffling (use it with ``shuffle=False``):
    each epoch visits the pairs in a new order and mixes the patches of 8 pairs at a time, so
    that a folder larger than the memory is read about once per epoch.

    Every second patch, on average, is centred on a voxel of the input's foreground, the others
    anywhere. A patch never leaves the volume; along an axis on which the volume is shorter, it
    is padded with zeros, equally on both sides.

    Each item is {"input", "target": float32 tensors [1, px, py, pz], "scale": the input's
    ScaleRecord, "subject": str}.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        patch: Sequence[int],
        *,
        patches_per_volume: int = 4,
        normaliser: Normaliser | None = None,
        seed: int = 0,
        cache_bytes: int = 2 << 30,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            pairs: what `read_datalist` returns.
            patch: voxels along X, Y, Z.
            patches_per_volume: patches per pair and epoch.
            normaliser: default ``Normaliser("paired")``.
            seed: of the order and the positions.
            cache_bytes: memory for loaded pairs, per worker process; 0 reads them anew.

        Raises:
            ValueError: no pairs, a patch that is not three positive sizes, or no patches.
        """
        if not pairs:
            raise ValueError("pairs is empty, wanted at least one")
        if len(patch) != 3 or min(patch) < 1:
            raise ValueError(f"patch is {tuple(patch)}, wanted three positive sizes")
        if patches_per_volume < 1:
            raise ValueError(f"patches_per_volume is {patches_per_volume}, wanted at least 1")
        self.pairs = list(pairs)
        self.patch = (int(patch[0]), int(patch[1]), int(patch[2]))
        self.patches_per_volume = patches_per_volume
        self.normaliser = normaliser or Normaliser()
        self.seed = seed
        self._cache = _Cache(cache_bytes)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order and positions; call before iterating (and on resume)."""
        self.epoch = epoch
        rng = np.random.default_rng((self.seed, epoch))
        volumes = rng.permutation(len(self.pairs))
        groups = []
        for start in range(0, len(volumes), _MIXED_VOLUMES):
            group = np.repeat(volumes[start : start + _MIXED_VOLUMES], self.patches_per_volume)
            groups.append(rng.permutation(group))
        self._order = np.concatenate(groups)

    def __len__(self) -> int:
        """Patches per epoch."""
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Patch `index` of the epoch.

        Raises:
            InputError: the pair cannot be read, has no signal, or is on two grids.
            IndexError: `index` is not in [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}, wanted one of {len(self)} patches")
        volume = int(self._order[index])
        loaded = self._load(volume)
        start = self._start(loaded, np.random.default_rng((self.seed, self.epoch, index, 1)))
        return {
            "input": self._crop(loaded.input, start, loaded.records[0]),
            "target": self._crop(loaded.target, start, loaded.records[1]),
            "scale": loaded.records[0],
            "subject": self.pairs[volume].subject,
        }

    def _load(self, volume: int) -> _Loaded:
        loaded = self._cache.get(volume)
        if loaded is None:
            image, label = load_pair(self.pairs[volume])
            records = self.normaliser.fit_pair(
                image.array, label.array, (image.source, label.source)
            )
            foreground = np.flatnonzero(image.array > foreground_threshold(image.array))
            # 32-bit indices: half the memory, and no volume has 2^31 voxels.
            loaded = _Loaded(image.array, label.array, foreground.astype(np.int32), records)
            self._cache.put(volume, loaded)
        return loaded

    def _start(self, loaded: _Loaded, rng: np.random.Generator) -> list[int]:
        """First voxel of a patch along each axis (0 where the patch is longer)."""
        shape = loaded.input.shape
        if rng.random() < 0.5:
            centre = np.unravel_index(
                loaded.foreground[rng.integers(len(loaded.foreground))], shape
            )
        else:
            centre = tuple(rng.integers(shape))
        return [
            min(max(int(c) - p // 2, 0), max(n - p, 0))
            for c, p, n in zip(centre, self.patch, shape, strict=True)
        ]

    def _crop(self, array: np.ndarray, start: list[int], record: ScaleRecord) -> torch.Tensor:
        """Cut, normalise and pad one patch: [1, px, py, pz]."""
        inside = array[tuple(slice(s, s + p) for s, p in zip(start, self.patch, strict=True))]
        out = np.zeros((1, *self.patch), np.float32)
        pad = [(p - n) // 2 for p, n in zip(self.patch, inside.shape, strict=True)]
        place = tuple(slice(b, b + n) for b, n in zip(pad, inside.shape, strict=True))
        out[0][place] = Normaliser.apply(inside, record)
        return torch.from_numpy(out)


class PairDataset(Dataset[dict[str, Any]]):
    """Whole volumes with what is needed to write results back.

    Each item is {"input", "target": normalised float32 tensors [1, X, Y, Z], "scale": the
    input's ScaleRecord, "image", "label": `Volume` in the files' units, "subject": str}. Iterate
    it directly (volumes differ in size, so they are not collated).
    """

    def __init__(self, pairs: Sequence[Pair], normaliser: Normaliser | None = None) -> None:
        """Nothing is read yet; default ``Normaliser("paired")``."""
        self.pairs = list(pairs)
        self.normaliser = normaliser or Normaliser()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pair `index`.

        Raises:
            InputError: the pair cannot be read, has no signal, or is on two grids.
        """
        pair = self.pairs[index]
        image, label = load_pair(pair)
        records = self.normaliser.fit_pair(image.array, label.array, (image.source, label.source))
        return {
            "input": torch.from_numpy(Normaliser.apply(image.array, records[0]))[None],
            "target": torch.from_numpy(Normaliser.apply(label.array, records[1]))[None],
            "scale": records[0],
            "image": image,
            "label": label,
            "subject": pair.subject,
        }
