"""BIDS-PET trees: which scans there are, what their sidecars say, which two make a pair.

    sub-01[/ses-02]/pet/sub-01[_ses-02][_task-][_trc-][_rec-][_run-]_pet.nii[.gz]  and  .json
    participants.tsv                                    column weight (or body_weight), in kg

Sidecars follow the inheritance principle: a ``*_pet.json`` whose entities all occur in the name of
an image, in the image's folder or above it, applies to it, and the nearer one wins field by field.

BIDS knows no pairs. Here two images make one if their names differ in the ``rec`` entity alone:
``rec-short`` and ``rec-standard``, or any two labels of which the sidecars' FrameDuration say that
one scan is the longer; that is the standard scan.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petite_fast.data.bids_sidecar import PetInfo
from petite_fast.data.cases import Case, Problem

SHORT, STANDARD = "short", "standard"
_SCAN = re.compile(r"(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*)_pet\.nii(?:\.gz)?")
_SIDECAR = re.compile(r"((?:[a-z]+-[A-Za-z0-9]+_)*)pet\.json")
_WEIGHT_COLUMNS = ("weight", "body_weight")


@dataclass(frozen=True)
class BidsScan:
    """One image of a tree; `entities` are those of its name, in order: {"sub": "01", ...}."""

    path: Path
    entities: dict[str, str]
    info: PetInfo

    @property
    def subject(self) -> str:
        """``sub-<label>``; the label is a pseudonym by the rules of BIDS."""
        return f"sub-{self.entities['sub']}"

    @property
    def session(self) -> str:
        """``ses-<label>``, or "" in a tree without sessions."""
        return f"ses-{self.entities['ses']}" if "ses" in self.entities else ""


def is_tree(folder: Path) -> bool:
    """Whether `folder` is the root of a BIDS tree with PET: it has a ``sub-*/**/pet`` folder."""
    return any(_pet_folders(folder))


def read_tree(root: Path) -> tuple[list[Case], list[Problem]]:
    """Cases of a BIDS-PET tree, and everything that is wrong with names, sidecars and pairs.

    Of an image that is not one of a pair, the case has no label: it can be reconstructed.
    derivatives/, sourcedata/ and code/ are not looked into.
    """
    weights, problems = _weights(root)
    scans = []
    for folder in _pet_folders(root):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not path.name.endswith(("_pet.nii", "_pet.nii.gz")):
                continue
            entities = entities_of(path)
            if entities and "desc" in entities:
                continue  # somebody's result, not an acquisition
            if entities is None or not _belongs(entities, folder.relative_to(root)):
                text = "the name does not fit the folder; expected sub-<label>[_ses-<label>]..._pet"
                problems.append(Problem(str(path), text))
                continue
            info, wrong = inherited_sidecar(root, path, weights.get(f"sub-{entities['sub']}"))
            problems += wrong
            scans.append(BidsScan(path, entities, info))
    groups = defaultdict(list)
    for scan in scans:
        key = tuple((k, v) for k, v in scan.entities.items() if k != "rec")
        groups[key].append(scan)
    cases = []
    for group in groups.values():
        found, wrong = _paired(group)
        cases += found
        problems += wrong
    return cases, problems


def entities_of(path: Path) -> dict[str, str] | None:
    """The entities of a BIDS-PET image name, {"sub": "01", "ses": ...}; None for another name."""
    match = _SCAN.fullmatch(path.name)
    return None if match is None else _entities(match[1])


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
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                text = f"not readable as JSON ({error}); expected a sidecar"
                problems.append(Problem(str(path), text))
                continue
            if not isinstance(content, dict):
                problems.append(Problem(str(path), "not a JSON object; expected a sidecar"))
                continue
            fields |= content
            origin |= dict.fromkeys(content, str(path))
    if weight_kg is not None:
        fields["PatientWeight"] = weight_kg
        origin["PatientWeight"] = str(root / "participants.tsv")
    return PetInfo(fields, origin, str(nearest)), problems


def _pet_folders(root: Path) -> list[Path]:
    found = [*root.glob("sub-*/pet"), *root.glob("sub-*/ses-*/pet")]
    return sorted(folder for folder in found if folder.is_dir())


def _entities(stem: str) -> dict[str, str]:
    parts = (part.partition("-") for part in stem.split("_") if part)
    return {key: label for key, _, label in parts}


def _belongs(entities: dict[str, str], folder: Path) -> bool:
    """Whether sub and ses of a name are those of its folder."""
    named = {f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities}
    return named == set(folder.parts[:-1])


def _paired(group: list[BidsScan]) -> tuple[list[Case], list[Problem]]:
    """Cases of the images whose names differ in ``rec`` alone."""
    labels = {scan.entities.get("rec", ""): scan for scan in group}
    if len(labels) == len(group) and {SHORT, STANDARD} <= labels.keys():
        # other reconstructions beside a named pair are no part of it
        return [_case(labels[SHORT], labels[STANDARD])], []
    ordered = sorted(group, key=_duration_s)
    if len(group) == 2 and 0 < _duration_s(ordered[0]) < _duration_s(ordered[1]):
        return [_case(*ordered)], []
    if len(group) == 1:
        scan = group[0]
        text = (
            "the other half of the pair is missing; expected an image of the same name but for"
            f" rec-{SHORT} and rec-{STANDARD}, or for rec and FrameDuration"
        )
        case = _label_only(scan) if STANDARD in labels else _case(scan)
        return [case], [Problem(str(scan.path), text)]
    names = ", ".join(scan.path.name for scan in group)
    text = (
        f"{names}: which is the short and which the standard scan is not said; expected"
        f" rec-{SHORT} and rec-{STANDARD}, or two images of different FrameDuration"
    )
    return [_case(scan) for scan in group], [Problem(str(group[0].path.parent), text)]


def _duration_s(scan: BidsScan) -> float:
    """Length of all frames together; 0 where it is not said."""
    return sum(scan.info.frame_durations_s or ())


def _case(image: BidsScan, label: BidsScan | None = None) -> Case:
    infos = {"image": image.info} | ({"label": label.info} if label else {})
    return Case(
        image.path,
        label.path if label else None,
        image.subject,
        image.session,
        image.info.scanner,
        image.info.units,
        infos,
    )


def _label_only(scan: BidsScan) -> Case:
    info = scan.info
    return Case(
        None, scan.path, scan.subject, scan.session, info.scanner, info.units, {"label": info}
    )


def _weights(root: Path) -> tuple[dict[str, float], list[Problem]]:
    """Body weight in kg by subject, from participants.tsv; "n/a" and no column are no weight."""
    path = root / "participants.tsv"
    weights: dict[str, float] = {}
    problems: list[Problem] = []
    if not path.is_file():
        return weights, problems
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
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
