"""Training pairs from the scans that there are: frames of dynamic series, or thinned counts.

    OUT/images/sub-001[_ses-01]_short.nii.gz      OUT/labels/sub-001[_ses-01]_standard.nii.gz
    OUT/dataset.json                              decathlon list, folds and test drawn by subject

Each scan is one visit. Visits of one subject are recognised by the ``sub`` of a BIDS tree, or by
equal PatientID in DICOM, which is compared and written nowhere; any other file is a subject.
Subjects of one BIDS tree keep their label, which is a pseudonym; all others are numbered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from petite_fast.data.bids import SHORT, STANDARD
from petite_fast.data.collection import LISTING
from petite_fast.data.frames import frame_pair, to_static
from petite_fast.data.inheritance import entities_of, inherited_sidecar, tree_root
from petite_fast.data.normalise import mean_uptake, require_signal
from petite_fast.data.splits import split_subjects
from petite_fast.data.suv import Kind, to_suv
from petite_fast.data.thinning import thin_nested
from petite_fast.data.volume import Volume, read_volume, write_like
from petite_fast.errors import InputError
from petite_fast.files import atomic_folder, write_json


@dataclass(frozen=True)
class Recipe:
    """How one scan becomes a pair; either `short` or `doses`.

    Attributes:
        short: frame of a dynamic series that is the short scan, from 0.
        standard: ascending frames whose mean is the standard scan; None for all.
        doses: dose reduction factors; a short scan of each, nested, is thinned from the standard.
        counts: for `doses`, the noise-equivalent counts of the standard scan in a voxel of its
            mean uptake: the short scan's noise there is sqrt((d - 1) / counts).
        suv: bring scans into this SUV first; None keeps their units.
        scanner: name in the list; None for what BIDS and DICOM say.
        seed: of thinning and splits, any whole number >= 0.
    """

    short: int | None = None
    standard: tuple[int, ...] | None = None
    doses: tuple[int, ...] = ()
    counts: float = 100.0
    suv: Kind | None = None
    scanner: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no pair.

        Raises:
            InputError: neither frames nor doses, both, or values out of range.
        """
        if (self.short is None) == (not self.doses):
            raise InputError(
                "a pair is made of a short frame or of a dose reduction; expected one of them"
            )
        if self.doses and min(self.doses) < 2:
            raise InputError(f"a dose reduction of {min(self.doses)}; expected 2 or more")
        if not (np.isfinite(self.counts) and self.counts > 0):
            raise InputError(f"{self.counts:g} counts per voxel; expected a positive number")
        if self.short is not None and self.standard is not None and len(self.standard) < 2:
            raise InputError("the standard scan is one frame; expected several, or none named")


@dataclass(frozen=True)
class _Scan:
    """One acquisition; `subject` tells people apart and may identify them."""

    path: Path
    volume: Volume
    subject: tuple[str, str]
    session: str
    scanner: str


def make_pairs(scans: Sequence[Path], out: Path, recipe: Recipe) -> Path:
    """Write the pairs of `scans` to folder `out`, one scan in memory; return its dataset.json.

    Args:
        scans: what `read_volume` takes, one acquisition each; images of BIDS trees too.
        out: a folder that is empty or not there; it appears only when complete.
        recipe: how each scan becomes a pair.

    Raises:
        InputError: a scan cannot be read, lacks what the recipe needs (frames, frame times, for
            SUV the dose and so on), or is in other units than the first; no scan; `out` is not
            empty.
        OSError: a file cannot be written.
    """
    if not scans:
        raise InputError("no scan; expected at least one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; expected one, or a new name")
    found = [_scan(path, recipe) for path in scans]
    for scan in found[1:]:
        if scan.volume.units != found[0].volume.units:
            raise InputError(
                f"{scan.path}: its units are {scan.volume.units or 'not given'}; expected"
                f" {found[0].volume.units or 'none'} as of {found[0].path}, or SUV for all"
            )
    entries = []
    with atomic_folder(out) as folder:
        for k, (scan, subject, session) in enumerate(_named(found)):
            rng = np.random.default_rng([recipe.seed, k])
            for entry in _write(scan, folder, "_".join(filter(None, (subject, session))),
                                recipe, rng):  # fmt: skip
                dose = entry.pop("dose", "")
                visit = f"{session or 'ses-'}{dose}" if dose else session
                named = {"subject": subject} | ({"session": visit} if visit else {})
                entries.append(named | entry | {"scanner": scan.scanner})
        write_json(folder / LISTING, _listing(entries, found[0].volume.units, recipe))
    return out / LISTING


def _scan(path: Path, recipe: Recipe) -> _Scan:
    """Headers of one scan, and whose it is."""
    volume = read_volume(path)
    frames = volume.frame_count
    if recipe.short is not None and frames == 1:
        raise InputError(
            f"{path}: one image, no frames; expected a dynamic series, or a dose reduction"
        )
    if recipe.suv is not None:
        volume = to_suv(volume, recipe.suv)
    entities = entities_of(path)
    subject, session, scanner = (str(path), ""), "", "unknown"
    if entities is not None:
        root = tree_root(path)
        subject, session = (str(root), entities["sub"]), entities.get("ses", "")
        scanner = inherited_sidecar(root, path)[0].scanner
    elif volume.dicom is not None:
        from petite_fast.data.dicom import patient_and_scanner

        patient, scanner = patient_and_scanner(volume.dicom)
        subject = ("PatientID", patient) if patient else subject
    return _Scan(path, volume, subject, session, recipe.scanner or scanner)


def _named(scans: list[_Scan]) -> Iterator[tuple[_Scan, str, str]]:
    """Each scan with names of subject and session that are unique and safe to share."""
    keys = list(dict.fromkeys(scan.subject for scan in scans))
    one_tree = all(entities_of(s.path) for s in scans) and len({key[0] for key in keys}) == 1
    names = {
        key: f"sub-{key[1]}" if one_tree else f"sub-{k:03d}" for k, key in enumerate(keys, start=1)
    }
    sessions = defaultdict(list)
    for scan in scans:
        sessions[scan.subject].append(scan.session)
    seen = Counter[tuple[str, str]]()
    for scan in scans:
        labels = sessions[scan.subject]
        seen[scan.subject] += 1
        label = scan.session
        if len(labels) > 1 and ("" in labels or len(set(labels)) < len(labels)):
            label = f"{seen[scan.subject]:02d}"
        yield scan, names[scan.subject], f"ses-{label}" if label else ""


def _write(
    scan: _Scan, folder: Path, name: str, recipe: Recipe, rng: np.random.Generator
) -> Iterator[dict[str, str]]:
    """Write the standard scan and its short ones; yield their entries in the list."""
    label = f"labels/{name}_{STANDARD}.nii.gz"
    if recipe.short is not None:
        frames = recipe.standard or tuple(range(scan.volume.frame_count))
        short, standard = frame_pair(scan.volume, recipe.short, frames)
        write_like(standard, standard.array, folder / label)
        image = f"images/{name}_{SHORT}.nii.gz"
        write_like(short, short.array, folder / image)
        yield {"image": image, "label": label}
        return
    standard = scan.volume
    if standard.frame_count > 1:
        standard = to_static(standard, recipe.standard)
    (voxels,) = standard.frames()  # not its `array`, which it would keep
    require_signal(voxels, scan.path)
    write_like(standard, voxels, folder / label)
    total = recipe.counts * float(np.maximum(voxels, 0).sum(dtype=np.float64))
    thinned = thin_nested(voxels, rng, total / mean_uptake(voxels), recipe.doses)
    for dose, array in thinned.items():
        tag = f"drf{dose}" if len(thinned) > 1 else ""
        image = f"images/{name}{tag and '_' + tag}_{SHORT}.nii.gz"
        write_like(standard, array, folder / image)
        yield {"image": image, "label": label, "dose": tag}


def _listing(entries: list[dict[str, str]], units: str | None, recipe: Recipe) -> dict[str, Any]:
    """The decathlon list: the test apart, folds of the others, how the pairs were made."""
    about: dict[str, Any] = {} if units is None else {"units": units}
    scanners = {entry["scanner"] for entry in entries}
    if len(scanners) == 1:
        about["scanner"] = scanners.pop()
        for entry in entries:
            del entry["scanner"]
    splits = split_subjects((entry["subject"] for entry in entries), recipe.seed)
    if recipe.doses:
        about["pairs"] = {
            "dose_reduction": sorted(set(recipe.doses)),
            "counts_per_voxel": recipe.counts,
            "seed": recipe.seed,
        }
    else:
        about["pairs"] = {"short_frame": recipe.short}
    if recipe.standard is not None:
        about["pairs"]["standard_frames"] = list(recipe.standard)
    parts: dict[str, list[dict[str, str]]] = {"training": []}
    for entry in entries:
        part = "test" if entry["subject"] in splits.test else "training"
        parts.setdefault(part, []).append(entry)
    folds = {"folds": splits.to_json()["folds"]} if splits.folds else {}
    return about | parts | folds
