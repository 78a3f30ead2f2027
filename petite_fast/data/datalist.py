"""Decathlon-style JSON lists of training pairs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from petite_fast.data.cases import Case, Pair, Problem
from petite_fast.data.splits import Fold, Splits, parse_splits
from petite_fast.errors import InputError

SPLITS = ("training", "validation", "test")


def read_datalist(
    json_path: str | os.PathLike[str], fold: int | None = None, split: str = "training"
) -> list[Pair]:
    """Read one split of a dataset.json.

    Two layouts are read:

    - with folds (what `simulate` and `convert` write): ``{"training": [{"image", "label",
      "subject"}, ...], "test": [...], "folds": [{"training": [subject, ...], "validation":
      [subject, ...]}, ...]}``. `fold` chooses one; fold None with split "training" gives every pair
      that is not in "test", which is the same in every fold.
    - plain decathlon (MONAI): ``{"training": [...], "validation": [...], "test": [...]}``, fold
      None.

    Args:
        json_path: the JSON file; paths in it are relative to its folder.
        fold: which fold, from 0.
        split: "training", "validation" or "test".

    Entries without "subject" are named by split and position, never by file name, because
    subjects appear in reports and file names may identify a patient. "session" names the visit.

    Raises:
        InputError: missing or invalid JSON, wrong keys, no such fold, a subject in two splits, an
            empty split, or files that do not exist (all are listed).
        ValueError: `split` is none of the three.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, wanted one of {SPLITS}")
    path = Path(json_path)
    content = load_json(path)
    folds = content.get("folds")
    if folds is not None and not isinstance(folds, list):
        raise InputError(f'{path}: "folds" is no list; expected a list of subject splits')
    if split == "test":
        pairs = _pairs(content, "test", path)
    elif folds is None:
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
    _check_overlap(content, path)
    files = dict.fromkeys(file for pair in pairs for file in (pair.image, pair.label))
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} files do not exist: {', '.join(missing)};"
            " expected paths relative to the JSON file's folder"
        )
    return pairs


def read_cases(path: Path) -> tuple[list[Case], Splits, dict[str, Any], list[Problem]]:
    """All entries of a dataset.json, the splits in it, its content, and all that is wrong with it.

    An entry of "test" may be a path alone (decathlon's form): a scan without a standard scan.

    Raises:
        InputError: no JSON object, or "folds" is not what `read_datalist` reads.
    """
    content = load_json(path)
    cases: list[Case] = []
    problems: list[Problem] = []
    if "training" not in content:
        problems.append(Problem(str(path), 'no list "training"; expected one'))
    for key in SPLITS:
        entries = content.get(key, [])
        if not isinstance(entries, list):
            problems.append(Problem(str(path), f'"{key}" is no list; expected one of entries'))
            continue
        for number, entry in enumerate(entries, start=1):
            case, wrong = _case(content, key, number, entry, path)
            problems += wrong
            cases += [case] if case.files else []
    if not cases:
        problems.append(Problem(str(path), "no entry names a file; expected at least one"))
    return cases, _splits(content, path), content, problems


def load_json(path: Path) -> dict[str, Any]:
    """The object in a dataset's JSON file.

    Raises:
        InputError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a dataset JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
        pairs.append(
            Pair(
                path.parent / entry["image"],
                path.parent / entry["label"],
                _subject(entry, key, number),
                str(entry.get("session", "")),
            )
        )
    return pairs


def _case(
    content: dict[str, Any], key: str, number: int, entry: object, path: Path
) -> tuple[Case, list[Problem]]:
    """One entry, with what it lacks."""
    fields = {"image": entry} if isinstance(entry, str) and key == "test" else entry
    fields = fields if isinstance(fields, dict) else {}
    problems = []
    files: dict[str, Path | None] = {}
    for name in ("image", "label"):
        value = fields.get(name)
        files[name] = path.parent / value if isinstance(value, str) else None
        if not isinstance(value, str):
            if (key, name) != ("test", "label"):
                text = f'entry {number} of "{key}" has no "{name}"; expected a file path'
                problems.append(Problem(str(path), text))
        elif not (path.parent / value).is_file():
            files[name] = None
            text = "no such file; expected a path relative to the JSON file's folder"
            problems.append(Problem(str(path.parent / value), text))
    units = fields.get("units", content.get("units"))
    scanner = fields.get("scanner", content.get("scanner", "unknown"))
    case = Case(
        files["image"],
        files["label"],
        _subject(fields, key, number),
        str(fields.get("session", "")),
        str(scanner),
        str(units) if units else None,
    )
    return case, problems


def _subject(entry: object, key: str, number: int) -> str:
    named = entry.get("subject") if isinstance(entry, dict) else None
    return f"{key}-{number:03d}" if named is None else str(named)


def _splits(content: dict[str, Any], path: Path) -> Splits:
    """Subjects of the folds, or of the plain lists, and of "test"."""
    fold, test = _lists(content)
    if content.get("folds") is not None:
        return Splits(parse_splits({"folds": content["folds"]}, str(path)).folds, test)
    return Splits((fold,) if fold.validation else (), test)


def _lists(content: dict[str, Any]) -> tuple[Fold, frozenset[str]]:
    """Subjects of "training" and "validation", and of "test"."""
    training, validation, test = (
        frozenset(
            _subject(entry, key, number)
            for number, entry in enumerate(content.get(key) or [], start=1)
        )
        if isinstance(content.get(key) or [], list)
        else frozenset()
        for key in SPLITS
    )
    return Fold(training, validation), test


def _check_overlap(content: dict[str, Any], path: Path) -> None:
    """Refuse lists that share a subject."""
    fold, test = _lists(content)
    if faults := Splits((fold,), test).faults():
        raise InputError(f"{path}: {faults[0].replace(' of fold 0', '')}")


def _fold_subjects(folds: list[Any], fold: int, split: str, path: Path) -> set[str]:
    """Subjects of one half of one fold; the halves must not overlap."""
    if not 0 <= fold < len(folds):
        raise InputError(
            f"{path}: there is no fold {fold}; expected one of {len(folds)} folds, from 0"
        )
    halves = {}
    for name in ("training", "validation"):
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
