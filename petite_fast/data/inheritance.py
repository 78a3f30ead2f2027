"""What applies to a BIDS-PET image besides its voxels: the sidecars it inherits, the body weight.

Sidecars follow the inheritance principle: a ``*_pet.json`` whose entities all occur in the name of
an image, in the image's folder or above it, applies to it, and the nearer one wins field by field.
The body weight is the column weight (or body_weight) of participants.tsv, in kg.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petite_fast.data.bids_sidecar import PetInfo
from petite_fast.data.cases import Problem
from petite_fast.errors import InputError

_SCAN = re.compile(r"(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*)_pet\.nii(?:\.gz)?")
_SIDECAR = re.compile(r"((?:[a-z]+-[A-Za-z0-9]+_)*)pet\.json")
_WEIGHT_COLUMNS = ("weight", "body_weight")


def entities_of(path: Path) -> dict[str, str] | None:
    """The entities of a BIDS-PET image name, {"sub": "01", "ses": ...}; None for another name."""
    match = _SCAN.fullmatch(path.name)
    return None if match is None else _entities(match[1])


def visit_folders(entities: Mapping[str, str]) -> tuple[str, ...]:
    """The folders of a scan below the root of its tree: ("sub-01", "ses-02", "pet")."""
    return (*(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities), "pet")


def tree_root(image: Path) -> Path:
    """The root of the tree that `image` lies in; its own folder, if that is not one of a tree."""
    folders = visit_folders(entities_of(image) or {})
    if image.parts[-1 - len(folders) : -1] == folders:
        return image.parents[len(folders)]
    return image.parent


def load_sidecar(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON; expected a BIDS-PET sidecar") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: no JSON object; expected a BIDS-PET sidecar")
    return content


def inherited_sidecar(
    root: Path, image: Path, weight_kg: float | None = None
) -> tuple[PetInfo, list[Problem]]:
    """Merge the sidecars that apply to `image`, from the root of the tree down to its folder.

    Args:
        root: of the tree.
        image: a file below it with a BIDS name.
        weight_kg: of the subject, from participants.tsv.

    Returns:
        What they say, and the files that are no JSON object. What the fields hold is looked at by
        `petite_fast.data.bids_sidecar.faults`.
    """
    entities = entities_of(image) or {}
    folders = [root, *reversed([p for p in image.parents if root in p.parents])]
    fields: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems = []
    nearest = image.with_name(f"{image.name.partition('.nii')[0]}.json")
    for folder in folders:
        applicable = []
        for path in folder.glob("*pet.json"):
            match = _SIDECAR.fullmatch(path.name)
            if match and _entities(match[1].rstrip("_")).items() <= entities.items():
                applicable.append(path)
        for path in sorted(applicable, key=lambda p: (p.name.count("-"), p.name)):
            try:
                content = load_sidecar(path)
            except InputError as error:
                problems.append(Problem(str(path), str(error).removeprefix(f"{path}: ")))
                continue
            fields |= content
            origin |= dict.fromkeys(content, str(path))
    if weight_kg is not None:
        fields["PatientWeight"] = weight_kg
        origin["PatientWeight"] = str(root / "participants.tsv")
    return PetInfo(fields, origin, str(nearest)), problems


def body_weights(root: Path) -> tuple[dict[str, float], list[Problem]]:
    """Body weight in kg by ``sub-<label>``, from participants.tsv; "n/a" and no column are none."""
    path = root / "participants.tsv"
    weights: dict[str, float] = {}
    problems: list[Problem] = []
    if not path.is_file():
        return weights, problems
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return weights, [Problem(str(path), f"no table ({error}); expected tab-separated columns")]
    if not rows or "participant_id" not in rows[0]:
        return weights, [Problem(str(path), "no column participant_id; expected one")]
    for row in rows:
        text = next((row[column] for column in _WEIGHT_COLUMNS if row.get(column)), "n/a")
        if text == "n/a":
            continue
        try:
            weights[str(row["participant_id"])] = float(text)
        except ValueError:
            problems.append(
                Problem(str(path), f"weight of {row['participant_id']} is {text!r}; expected kg")
            )
    return weights, problems


def _entities(stem: str) -> dict[str, str]:
    parts = (part.partition("-") for part in stem.split("_") if part)
    return {key: label for key, _, label in parts}
