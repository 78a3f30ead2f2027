"""A data set in any of its layouts: decathlon JSON, BIDS-PET tree, nnU-Net raw folder.

`read_pairs` and `read_inputs` are what training, evaluation and reconstruction ask;
`read_collection` is the whole of it, for conversion and validation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from petite_fast.data import bids, datalist, nnunet
from petite_fast.data.cases import Case, Pair, Problem
from petite_fast.data.splits import Splits, read_splits, split_subjects
from petite_fast.errors import InputError

Layout = Literal["decathlon", "bids", "nnunet"]
LISTING = "dataset.json"
_log = logging.getLogger("petite_fast")


@dataclass(frozen=True)
class Collection:
    """Cases with their splits.

    Attributes:
        root: the folder; of a decathlon JSON, the file.
        layout: what it is.
        cases: every visit.
        splits: by subject; a fold is chosen by its position.
        about: top level of dataset.json ("scanner", "units", "roi"), the same of a BIDS tree.
        problems: what is wrong with names, listings and sidecar files.
        drawn: the splits were drawn here, because the data set says nothing of them.
    """

    root: Path
    layout: Layout
    cases: tuple[Case, ...]
    splits: Splits
    about: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    drawn: bool = False

    def select(self, fold: int | None, split: str) -> list[Case]:
        """Cases of one split; without a fold, "training" is everything but the test.

        Raises:
            InputError: no such fold, or a subject is in two splits.
            ValueError: `split` is none of "training", "validation" and "test".
        """
        if split not in datalist.SPLITS:
            raise ValueError(f"split is {split!r}, wanted one of {datalist.SPLITS}")
        if faults := self.splits.faults():
            raise InputError(f"{self.root}: {faults[0]}")
        folds, test = self.splits.folds, self.splits.test
        if split == "test":
            return [case for case in self.cases if case.subject in test]
        if fold is None:
            if split == "validation":
                expected = f"fold 0 to {len(folds) - 1}" if folds else "at least 3 subjects"
                raise InputError(f"{self.root}: no fold was chosen; expected {expected}")
            return [case for case in self.cases if case.subject not in test]
        if not 0 <= fold < len(folds):
            few = "" if folds else " (fewer than 3 subjects cannot be split)"
            raise InputError(
                f"{self.root}: there is no fold {fold}; expected one of {len(folds)} folds,"
                f" from 0{few}"
            )
        wanted = folds[fold].training if split == "training" else folds[fold].validation
        return [case for case in self.cases if case.subject in wanted]


def find_layout(data: Path) -> Layout | None:
    """What `data` is; None for any other file or folder, such as one of images alone."""
    if data.suffix.lower() == ".json":
        return "decathlon"
    if nnunet.is_raw_folder(data):
        return "nnunet"
    if (data / LISTING).is_file():
        return "decathlon"
    return "bids" if data.is_dir() and bids.is_tree(data) else None


def read_collection(data: Path, seed: int | None = None) -> Collection:
    """Read the whole data set but the voxels.

    Subjects are split as the decathlon JSON says, or ``splits.json`` in the folder of the other
    layouts; nnU-Net's imagesTs/ is the test. Where nothing says it, `split_subjects` does, with
    seed 0, so that training and evaluation agree.

    Args:
        data: a JSON file, or a folder in one of the layouts.
        seed: split anew with this one, whatever the data set says, but keep a test that it has.

    Raises:
        InputError: `data` is none of these, a listing cannot be read, or nothing is in it.
    """
    layout = find_layout(data)
    given: Splits | None
    if layout == "decathlon":
        path = data if data.suffix.lower() == ".json" else data / LISTING
        cases, given, about, problems = datalist.read_cases(path)
        root = path
    elif layout == "nnunet":
        root, about = data, datalist.load_json(data / LISTING)
        cases, test, problems = nnunet.read_raw_folder(data, about)
        given = read_splits(data) or Splits(test=test)
    elif layout == "bids":
        root = data
        cases, problems = bids.read_tree(data)
        about = _description(cases)
        given = read_splits(data)
    else:
        raise InputError(
            f"{data}: no data set; expected a dataset JSON, a BIDS-PET tree (sub-*/pet/) or an"
            f" nnU-Net raw folder ({LISTING}, imagesTr/)"
        )
    given = given or Splits()
    drawn = seed is not None or not given.folds
    if drawn:
        subjects = [case.subject for case in cases if case.pair]
        splits = split_subjects(subjects, seed or 0, given.test)
    else:
        splits = given
    return Collection(root, layout, tuple(cases), splits, about, tuple(problems), drawn)


def read_pairs(data: Path, fold: int | None = None, split: str = "training") -> list[Pair]:
    """Pairs of one split of a data set in any layout.

    Images without a partner are left out, with a warning that says how many; what else is wrong
    is for `petite_fast.data.validate`.

    Args:
        data: a JSON file (see `read_datalist`), or a folder in one of the layouts.
        fold: which fold, from 0; None with "training" gives everything but the test.
        split: "training", "validation" or "test".

    Raises:
        InputError: see `read_datalist` and `read_collection`; the split has no pair.
    """
    if find_layout(data) == "decathlon":
        return datalist.read_datalist(_json(data), fold, split)
    collection = read_collection(data)
    cases = collection.select(fold, split)
    pairs = [pair for case in cases if (pair := case.pair)]
    if not pairs:
        raise InputError(f"{data}: the {split} split is empty; expected at least one pair")
    if collection.drawn:
        _log.info(
            "%s: the data set has no splits; drawn by subject with seed 0: %d folds, %d subjects in"
            " the test",
            data,
            len(collection.splits.folds),
            len(collection.splits.test),
        )
    if len(pairs) < len(cases):
        _log.warning(
            "%s: %d of %d cases of the %s split are no pair and are left out;"
            " petite-fast validate says why",
            data,
            len(cases) - len(pairs),
            len(cases),
            split,
        )
    return pairs


def read_inputs(data: Path, fold: int | None = None, split: str | None = None) -> list[Path]:
    """Short scans of a data set, with or without a standard scan.

    Args:
        data: see `read_pairs`.
        fold: which fold, from 0.
        split: as in `read_pairs`. None is "validation" of the fold, or without a fold every short
            scan of a folder.

    Raises:
        InputError: as `read_pairs`; a JSON's "validation" without a fold is refused.
    """
    if find_layout(data) == "decathlon":
        if split != "test":
            return [pair.image for pair in read_pairs(data, fold, split or "validation")]
    collection = read_collection(data)
    if fold is None and split is None:
        cases = list(collection.cases)
    else:
        cases = collection.select(fold, split or "validation")
    images = [case.image for case in cases if case.image is not None]
    if not images:
        raise InputError(f"{data}: no short scan there; expected at least one")
    return images


def read_about(data: Path) -> Mapping[str, Any]:
    """What a data set says about all of it: "scanner", "units", "roi" where it does.

    Raises:
        InputError: see `read_collection`.
    """
    if find_layout(data) == "decathlon":
        return datalist.load_json(_json(data))
    return read_collection(data).about


def _json(data: Path) -> Path:
    return data if data.suffix.lower() == ".json" else data / LISTING


def _description(cases: list[Case]) -> dict[str, Any]:
    """Scanner and units of a BIDS tree, as its sidecars say."""
    about = {"scanner": ", ".join(sorted({case.scanner for case in cases})) or "unknown"}
    units = {case.units for case in cases if case.units}
    return about | ({"units": units.pop()} if len(units) == 1 else {})
