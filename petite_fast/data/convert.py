"""Write a data set in another layout: decathlon list, BIDS-PET tree, nnU-Net raw folder.

Volumes are written anew on their own grid, as float32, one at a time, so that no free text of a
header comes along; of sidecars only how the image was made does. Subjects keep a name of the form
``sub-<label>``, which BIDS has as a pseudonym. If one has another name, all become "sub-001", ...;
file names of the source never come along.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petite_fast.data.bids import SHORT, STANDARD
from petite_fast.data.bids_sidecar import PetInfo
from petite_fast.data.cases import Case
from petite_fast.data.collection import Collection, Layout, read_collection
from petite_fast.data.derivatives import BIDS_VERSION, DESCRIPTION
from petite_fast.data.inheritance import entities_of
from petite_fast.data.splits import FILE_NAME, Splits
from petite_fast.data.volume import read_volume, write_like
from petite_fast.errors import InputError
from petite_fast.files import atomic_folder, write_json

_KEPT_ENTITIES = ("task", "trc", "run")  # those of a pair that tell its scans from others
_PASSED_ON = ("name", "scanner", "units", "roi", "matrix", "spacing")


@dataclass(frozen=True)
class _Named:
    """A case with the names it gets."""

    case: Case
    subject: str
    session: str
    name: str  # subject, session and whatever else tells it from others


def convert(source: Path, out: Path, layout: Layout, seed: int | None = None) -> list[str]:
    """Write the data set `source` to folder `out` in another layout.

    Args:
        source: a data set that `read_collection` reads.
        out: a folder that is empty or not there; it appears only when complete.
        layout: what to write.
        seed: split the subjects anew with it; None keeps the splits of `source`.

    Returns:
        Remarks: what was left out. Decathlon and nnU-Net take no case without a standard scan
        outside their test, and no standard scan without a short one.

    Raises:
        InputError: `source` cannot be read or has nothing to convert, a volume of it cannot be
            read, a subject is in two splits, or `out` is not empty.
        OSError: a file cannot be written.
    """
    collection = read_collection(source, seed)
    if faults := collection.splits.faults():
        raise InputError(f"{source}: {faults[0]}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; expected one, or a new name")
    named = _names(collection.cases)
    splits = collection.splits.renamed({n.case.subject: n.subject for n in named})
    if layout == "bids":
        kept = named
    else:
        test = splits.test
        kept = [n for n in named if n.case.pair or (n.case.image and n.subject in test)]
    if not kept:
        raise InputError(
            f"{source}: nothing to convert; expected pairs of short and standard scans"
        )
    write: dict[Layout, Callable[[list[_Named], Splits, Path, Collection], None]] = {
        "bids": _write_bids,
        "decathlon": _write_decathlon,
        "nnunet": _write_nnunet,
    }
    with atomic_folder(out) as folder:
        write[layout](kept, splits, folder, collection)
    left_out = len(named) - len(kept)
    return [f"{left_out} of {len(named)} cases are no pair and were left out"] if left_out else []


def _write_decathlon(named: list[_Named], splits: Splits, out: Path, source: Collection) -> None:
    lists: dict[str, list[dict[str, str]]] = {"training": []}
    about = _about(named, source)
    for n in named:
        entry = {"subject": n.subject}
        if n.session:
            entry["session"] = n.session
        for key, folder, kind in (("image", "images", SHORT), ("label", "labels", STANDARD)):
            file = getattr(n.case, key)
            if file is not None:
                entry[key] = f"{folder}/{n.name}_{kind}.nii.gz"
                _copy(file, out / entry[key])
        for key in ("scanner", "units"):
            value = getattr(n.case, key)
            if key not in about and value not in (None, "unknown"):
                entry[key] = value
        key = "test" if n.subject in splits.test else "training"
        lists.setdefault(key, []).append(entry)
    folds = {"folds": splits.to_json()["folds"]} if splits.folds else {}
    write_json(out / "dataset.json", about | lists | folds)


def _write_nnunet(named: list[_Named], splits: Splits, out: Path, source: Collection) -> None:
    about = _about(named, source)
    (out / "imagesTr").mkdir()  # there, even if every subject is in the test
    training = 0
    for n in named:
        part = "Ts" if n.subject in splits.test else "Tr"
        training += part == "Tr"
        if n.case.image is not None:
            _copy(n.case.image, out / f"images{part}" / f"{n.name}_0000.nii.gz")
        if n.case.label is not None:
            _copy(n.case.label, out / f"labels{part}" / f"{n.name}.nii.gz")
    if "scanner" not in about:
        about["scanners"] = {n.name: n.case.scanner for n in named}
    write_json(out / FILE_NAME, splits.to_json())
    write_json(
        out / "dataset.json",
        about
        | {
            # by its channel's name nnU-Net chooses the normalisation, and this one keeps SUV
            "channel_names": {"0": "noNorm"},
            "labels": {"background": 0},
            "numTraining": training,
            "file_ending": ".nii.gz",
        },
    )


def _write_bids(named: list[_Named], splits: Splits, out: Path, source: Collection) -> None:
    weights: dict[str, float] = {}
    for n in named:
        folder = out.joinpath(n.subject, *([n.session] if n.session else []), "pet")
        stem, _, run = n.name.partition("_run-")
        for key, kind in (("image", SHORT), ("label", STANDARD)):
            file = getattr(n.case, key)
            if file is None:
                continue
            # "run" comes behind "rec" in a name
            name = f"{stem}_rec-{kind}{'_run-' + run if run else ''}_pet"
            info = n.case.infos.get(key)
            write_json(folder / f"{name}.json", _sidecar(n.case, info))
            _copy(file, folder / f"{name}.nii.gz")
            if info and info.weight_kg is not None:
                weights[n.subject] = info.weight_kg
    subjects = sorted({n.subject for n in named})
    rows = ["participant_id\tweight", *(f"{s}\t{weights.get(s, 'n/a')}" for s in subjects)]
    (out / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    write_json(out / "participants.json", {"weight": {"Description": "Body weight", "Units": "kg"}})
    (out / "README").write_text("PET scan pairs: rec-short is the short scan of rec-standard.\n")
    (out / ".bidsignore").write_text(f"{FILE_NAME}\n")
    write_json(out / FILE_NAME, splits.to_json())
    name = str(source.about.get("name", "PET scan pairs"))
    write_json(out / DESCRIPTION, {"Name": name, "BIDSVersion": BIDS_VERSION, "DatasetType": "raw"})


def _sidecar(case: Case, info: PetInfo | None) -> dict[str, Any]:
    """What is known of one image; nothing is made up."""
    fields = info.shareable() if info else {}
    if case.units and "Units" not in fields:
        fields["Units"] = case.units
    if info is None and case.scanner != "unknown":
        fields["ManufacturersModelName"] = case.scanner
    return fields


def _about(named: list[_Named], source: Collection) -> dict[str, Any]:
    """The source's own words, and scanner and units where all cases share them."""
    about = {key: source.about[key] for key in _PASSED_ON if key in source.about}
    for key in ("scanner", "units"):
        values = {getattr(n.case, key) for n in named}
        about.pop(key, None)
        if len(values) == 1 and (value := values.pop()) is not None:
            about[key] = value
    return about


def _names(cases: Iterable[Case]) -> list[_Named]:
    """Names that are unique, safe to share, and keep the visits of a subject together."""
    cases = [case for case in cases if case.files]
    subjects = _safe([case.subject for case in cases], "sub")
    sessions = {
        subject: _safe([c.session for c in cases if c.subject == subject and c.session], "ses")
        for subject in subjects
    }
    stems = []
    for case in cases:
        session = sessions[case.subject].get(case.session, "")
        entities = entities_of(case.files[0]) or {}
        others = [f"{key}-{entities[key]}" for key in _KEPT_ENTITIES if key in entities]
        stems.append("_".join(filter(None, [subjects[case.subject], session, *others])))
    total, seen = Counter(stems), Counter[str]()
    named = []
    for case, stem in zip(cases, stems, strict=True):
        seen[stem] += 1
        name = f"{stem}_run-{seen[stem]}" if total[stem] > 1 else stem
        session = sessions[case.subject].get(case.session, "")
        named.append(_Named(case, subjects[case.subject], session, name))
    return named


def _safe(labels: list[str], key: str) -> dict[str, str]:
    """BIDS labels as they are; numbers in their place if one is anything else."""
    unique = list(dict.fromkeys(labels))
    if all(re.fullmatch(rf"{key}-[A-Za-z0-9]+", label) for label in unique):
        return {label: label for label in unique}
    digits = 3 if key == "sub" else 2
    return {label: f"{key}-{k:0{digits}d}" for k, label in enumerate(unique, start=1)}


def _copy(source: Path, target: Path) -> None:
    volume = read_volume(source)
    write_like(volume, volume.array, target)
