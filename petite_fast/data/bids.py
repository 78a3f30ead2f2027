"""BIDS-PET trees: which scans there are, what their sidecars say, which two make a pair.

    sub-01[/ses-02]/pet/sub-01[_ses-02][_task-][_trc-][_rec-][_run-]_pet.nii[.gz]  and  .json
    participants.tsv                                    see `petite_fast.data.inheritance`

BIDS knows no pairs. Here two images make one if their names differ in the ``rec`` entity alone:
``rec-short`` and ``rec-standard``, or any two labels of which the sidecars' FrameDuration say that
one scan is the longer; that is the standard scan.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from petite_fast.data.bids_sidecar import PetInfo
from petite_fast.data.cases import Case, Problem
from petite_fast.data.inheritance import body_weights, entities_of, inherited_sidecar

SHORT, STANDARD = "short", "standard"


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


def images(root: Path) -> list[Path]:
    """Every PET image of a tree but somebody's results (``desc``), whatever its name.

    derivatives/, sourcedata/ and code/ are not looked into.
    """
    found = []
    for folder in _pet_folders(root):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not path.name.endswith(("_pet.nii", "_pet.nii.gz")):
                continue
            if "desc" not in (entities_of(path) or {}):
                found.append(path)
    return found


def read_tree(root: Path) -> tuple[list[Case], list[Problem]]:
    """Cases of a BIDS-PET tree, and everything that is wrong with names, sidecars and pairs.

    Of an image that is not one of a pair, the case has no label: it can be reconstructed.
    """
    weights, problems = body_weights(root)
    scans = []
    for path in images(root):
        entities = entities_of(path)
        if entities is None or not _belongs(entities, path.parent.relative_to(root)):
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


def _pet_folders(root: Path) -> list[Path]:
    found = [*root.glob("sub-*/pet"), *root.glob("sub-*/ses-*/pet")]
    return sorted(folder for folder in found if folder.is_dir())


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
