"""Which subjects train, which validate, which are kept for the test: never a subject in two.

Splits are made of subjects, not of files: all visits and all reconstructions of one stay together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from petite_fast.errors import InputError

FILE_NAME = "splits.json"
FOLDS = 5
_TEST_SHARE = 5  # one subject in five


@dataclass(frozen=True)
class Fold:
    """Subjects of the two halves of one fold."""

    training: frozenset[str]
    validation: frozenset[str]


@dataclass(frozen=True)
class Splits:
    """Folds, and the subjects of no fold, which nothing may be chosen on."""

    folds: tuple[Fold, ...] = ()
    test: frozenset[str] = frozenset()

    @property
    def subjects(self) -> frozenset[str]:
        """All that it names."""
        return self.test.union(*(fold.training | fold.validation for fold in self.folds))

    def faults(self) -> list[str]:
        """Every group of subjects that is in two parts, as "...; expected ..."."""
        found = []
        for number, fold in enumerate(self.folds):
            parts = (
                (fold.training & fold.validation, f"training and validation of fold {number}"),
                (fold.training & self.test, f"training of fold {number} and the test"),
                (fold.validation & self.test, f"validation of fold {number} and the test"),
            )
            found += [
                f"{', '.join(sorted(shared))} in {where}; expected each subject in one of them"
                for shared, where in parts
                if shared
            ]
        return found

    def renamed(self, names: dict[str, str]) -> Splits:
        """The same splits with other subject names; subjects without one are left out."""

        def part(subjects: frozenset[str]) -> frozenset[str]:
            return frozenset(names[s] for s in subjects if s in names)

        folds = tuple(Fold(part(fold.training), part(fold.validation)) for fold in self.folds)
        return Splits(folds, part(self.test))

    def to_json(self) -> dict[str, Any]:
        """{"test": [...], "folds": [{"training": [...], "validation": [...]}, ...]}."""
        return {
            "test": sorted(self.test),
            "folds": [
                {"training": sorted(fold.training), "validation": sorted(fold.validation)}
                for fold in self.folds
            ],
        }


def split_subjects(
    subjects: Iterable[str], seed: int = 0, test: frozenset[str] = frozenset()
) -> Splits:
    """Split subjects at random: a fifth for the test, the others dealt to 5 folds.

    A function of the sets of names and the seed alone. With n subjects the test has
    max(1, round(n / 5)), and there are min(5, n - test) folds; each subject that is not in the test
    validates in one of them. Fewer than 3 subjects cannot be split: no folds, no test.

    Args:
        subjects: all, in any order, as often as they have files.
        seed: any whole number >= 0.
        test: subjects that somebody kept for the test already; no others are drawn then.
    """
    names = sorted(set(subjects) - test)
    order = [names[k] for k in np.random.default_rng(seed).permutation(len(names))]
    held_out = 0 if test else max(1, round(len(names) / _TEST_SHARE))
    if len(names) - held_out < 2:
        return Splits(test=test)
    return Splits(deal(order[held_out:], FOLDS), test | frozenset(order[:held_out]))


def deal(order: list[str], folds: int) -> tuple[Fold, ...]:
    """Folds of subjects in random order: subject k validates in fold k mod `folds`."""
    folds = min(folds, len(order))
    halves = [frozenset(order[fold::folds]) for fold in range(folds)]
    return tuple(Fold(frozenset(order) - half, half) for half in halves)


def read_splits(folder: Path) -> Splits | None:
    """The splits in ``splits.json`` of a data set's folder, None without that file.

    Raises:
        InputError: it cannot be read, or is not what `Splits.to_json` gives.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected subject splits") from error
    return parse_splits(content, str(path))


def parse_splits(content: object, where: str) -> Splits:
    """Splits from the keys "folds" and "test" of a JSON object.

    Raises:
        InputError: not lists of subject names under these keys.
    """
    folds = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(folds, list):
        raise InputError(f'{where}: "folds" is no list; expected a list of subject splits')
    return Splits(
        tuple(
            Fold(
                _names(fold, "training", f"{where}: fold {number}"),
                _names(fold, "validation", f"{where}: fold {number}"),
            )
            for number, fold in enumerate(folds)
        ),
        _names({"test": [], **content}, "test", where),  # type: ignore[dict-item]
    )


def _names(content: object, key: str, where: str) -> frozenset[str]:
    names = content.get(key) if isinstance(content, dict) else None
    if not isinstance(names, list):
        raise InputError(f'{where} has no list "{key}"; expected subject names')
    return frozenset(map(str, names))
