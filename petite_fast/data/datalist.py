"""Decathlon-style JSON lists of training pairs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petite_fast.errors import InputError

SPLITS = ("training", "validation")


@dataclass(frozen=True)
class Pair:
    """One short scan (`image`), its standard scan (`label`), and a name that is safe to log."""

    image: Path
    label: Path
    subject: str


def read_datalist(
    json_path: str | os.PathLike[str], fold: int | None = None, split: str = "training"
) -> list[Pair]:
    """Read one split of a dataset.json.

    Two layouts are read:

    - with folds (what `simulate` writes): ``{"training": [{"image", "label", "subject"}, ...],
      "folds": [{"training": [subject, ...], "validation": [subject, ...]}, ...]}``. `fold`
      chooses one; fold None with split "training" gives every pair.
    - plain decathlon (MONAI): ``{"training": [...], "validation": [...]}``, fold None.

    Args:
        json_path: the JSON file; paths in it are relative to its folder.
        fold: which fold, from 0.
        split: "training" or "validation".

    Entries without "subject" are named by split and position, never by file name, because
    subjects appear in reports and file names may identify a patient.

    Raises:
        InputError: missing or invalid JSON, wrong keys, no such fold, a subject in both halves
            of a fold, an empty split, or files that do not exist (all are listed).
        ValueError: `split` is neither of the two.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, wanted one of {SPLITS}")
    path = Path(json_path)
    content = _load(path)
    folds = content.get("folds")
    if folds is not None and not isinstance(folds, list):
        raise InputError(f'{path}: "folds" is no list; expected a list of subject splits')
    if folds is None:
        if fold is not None:
            raise InputError(f'{path}: fold {fold} was asked for; expected a file with "folds"')
        pairs = _pairs(content, split, path)
    else:
        pairs = _pairs(content, "training", path)
        if fold is not None:
            wanted = _fold_subjects(folds, fold, split, path)
            unknown = wanted - {pair.subject for pair in pairs}
            if unknown:
                raise InputError(
                    f"{path}: fold {fold} names unknown subjects {sorted(unknown)};"
                    ' expected subjects of "training"'
                )
            pairs = [pair for pair in pairs if pair.subject in wanted]
        elif split == "validation":
            raise InputError(f"{path}: no fold was chosen; expected fold 0 to {len(folds) - 1}")
    if not pairs:
        raise InputError(f"{path}: the {split} split is empty; expected at least one pair")
    files = dict.fromkeys(file for pair in pairs for file in (pair.image, pair.label))
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} files do not exist: {', '.join(missing)};"
            " expected paths relative to the JSON file's folder"
        )
    return pairs


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a dataset JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected a dataset list") from error
    if not isinstance(content, dict):
        raise InputError(f'{path}: the top level is no object; expected the key "training"')
    return content


def _pairs(content: dict[str, Any], key: str, path: Path) -> list[Pair]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise InputError(f'{path}: no list "{key}"; expected one of {{"image", "label"}} objects')
    pairs = []
    for number, entry in enumerate(entries, start=1):
        for name in ("image", "label"):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise InputError(
                    f'{path}: entry {number} of "{key}" has no "{name}"; expected a file path'
                )
        subject = str(entry.get("subject", f"{key}-{number:03d}"))
        pairs.append(Pair(path.parent / entry["image"], path.parent / entry["label"], subject))
    return pairs


def _fold_subjects(folds: list[Any], fold: int, split: str, path: Path) -> set[str]:
    """Subjects of one half of one fold; the halves must not overlap."""
    if not 0 <= fold < len(folds):
        raise InputError(
            f"{path}: there is no fold {fold}; expected one of {len(folds)} folds, from 0"
        )
    halves = {}
    for name in SPLITS:
        subjects = folds[fold].get(name) if isinstance(folds[fold], dict) else None
        if not isinstance(subjects, list):
            raise InputError(f'{path}: fold {fold} has no list "{name}"; expected subject names')
        halves[name] = {str(subject) for subject in subjects}
    shared = halves["training"] & halves["validation"]
    if shared:
        raise InputError(
            f"{path}: fold {fold} has {sorted(shared)} in training and validation;"
            " expected each subject in one of them"
        )
    return halves[split]
