"""Which scans a training sees, and in what patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petite_fast.data import Normaliser, PatchDataset, read_pairs, read_volume
from petite_fast.data.collection import read_about
from petite_fast.errors import InputError

DEFAULT_PATCH = (64, 64, 64)


@dataclass(frozen=True)
class TrainingData:
    """Which scans to train on, and how to cut and scale them.

    Attributes:
        source: dataset JSON, BIDS-PET tree or nnU-Net raw folder; see `read_pairs`.
        fold: one of its folds (its training half); None takes every pair but the test's.
        patch: sides in voxels, multiples of 16; None is the data set's "roi", else 64 x 64 x 64.
        normalisation: "paired", "petite", or None for the base network's (paired without one).
    """

    source: Path
    fold: int | None = None
    patch: Sequence[int] | None = None
    normalisation: str | None = None

    def description(self) -> Mapping[str, Any]:
        """What the data set says about all of it ("scanner", "roi", ...)."""
        return read_about(self.source)

    def shortest_side(self) -> int:
        """The shortest side of the first scan in voxels: a longer patch is padded with zeros.

        Raises:
            InputError: the data set or the scan cannot be read.
        """
        pairs = read_pairs(self.source, self.fold, "training")
        return min(read_volume(pairs[0].image).shape)

    def open(self, seed: int, normalisation: str) -> PatchDataset:
        """The training patches.

        Raises:
            InputError: the data set or a file in it cannot be used, or the patch does not fit.
        """
        pairs = read_pairs(self.source, self.fold, "training")
        patch = tuple(self.patch or self.description().get("roi") or DEFAULT_PATCH)
        check_patch(patch)
        return PatchDataset(
            pairs,
            patch,
            normaliser=Normaliser(normalisation),  # type: ignore[arg-type]
            seed=seed,
        )


def check_patch(patch: Sequence[int]) -> None:
    """Refuse a patch that the networks cannot take.

    Raises:
        InputError: not three multiples of 16.
    """
    if len(patch) != 3 or any(side < 16 or side % 16 for side in patch):
        raise InputError(
            f"the patch is {'x'.join(map(str, patch))}; expected three multiples of 16"
        )
