"""nnU-Net's raw folders, in which the standard scan is the "label".

    dataset.json                       channel_names, file_ending, numTraining
    imagesTr/CASE_0000.nii.gz          short scan, one channel
    labelsTr/CASE.nii.gz               standard scan
    imagesTs/, labelsTs/               the same of the test; the labels may be missing

Of dataset.json's other keys, "scanner", "units" and "roi" mean what they mean in a dataset list;
"scanners" names the scanner of each case where there are several. A case called
``sub-<label>[_ses-<label>]`` is a visit of that subject. Any other name may identify a patient, so
those cases are subjects "case-001", ... by their sorted names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petite_fast.data.cases import Case, Problem

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_BIDS_NAME = re.compile(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?(?:_[a-z]+-[A-Za-z0-9]+)*")


def is_raw_folder(folder: Path) -> bool:
    """Whether `folder` holds dataset.json and imagesTr/."""
    return (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()


def read_raw_folder(
    root: Path, about: Mapping[str, Any]
) -> tuple[list[Case], frozenset[str], list[Problem]]:
    """Cases of a raw folder, the subjects of imagesTs/, and what is wrong with files and names.

    Args:
        root: the folder.
        about: its dataset.json.
    """
    ending = str(about.get("file_ending", ".nii.gz"))
    problems = []
    listing = str(root / "dataset.json")
    channels = about.get("channel_names")
    if not isinstance(channels, dict) or len(channels) != 1:
        text = f"channel_names is {channels!r}; expected one channel, the short scan"
        problems.append(Problem(listing, text))
    found = []
    for part in ("Tr", "Ts"):
        images, wrong = _images(root / f"images{part}", ending)
        problems += wrong
        labels = {
            path.name.removesuffix(ending): path for path in _files(root / f"labels{part}", ending)
        }
        found += [(part, name, images.get(name), labels.get(name)) for name in images | labels]
        for name in sorted(images.keys() ^ labels.keys()):
            if part == "Ts" and name in images:
                continue  # a test case may have no standard scan
            what = "short" if name in labels else "standard"
            text = (
                f"the {what} scan of this case is missing; expected one file in images{part} and"
                f" one in labels{part}"
            )
            problems.append(Problem(str(images.get(name) or labels[name]), text))
    training = sum(1 for part, _, image, _ in found if part == "Tr" and image)
    if about.get("numTraining") != training:
        text = f"numTraining is {about.get('numTraining')!r}; expected {training}, as in imagesTr"
        problems.append(Problem(listing, text))
    numbered = _subjects([name for _, name, _, _ in found])
    scanners, units = about.get("scanners"), about.get("units")
    named = scanners if isinstance(scanners, dict) else {}
    scanner = str(about.get("scanner", "unknown"))
    cases = [
        Case(
            image,
            label,
            *numbered[name],
            scanner=str(named.get(name, scanner)),
            units=str(units) if units else None,
        )
        for _, name, image, label in sorted(found, key=lambda entry: entry[:2])
    ]
    test = frozenset(numbered[name][0] for part, name, _, _ in found if part == "Ts")
    return cases, test, problems


def _images(folder: Path, ending: str) -> tuple[dict[str, Path], list[Problem]]:
    """Channel 0 of each case; other channels and other names are problems."""
    images, problems = {}, []
    for path in _files(folder, ending):
        match = _CHANNEL.fullmatch(path.name.removesuffix(ending))
        if match and int(match[2]) == 0:
            images[match[1]] = path
        else:
            text = f"not the first channel of a case; expected CASE_0000{ending}"
            problems.append(Problem(str(path), text))
    return images, problems


def _files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(ending) and not path.name.startswith(".")
    )


def _subjects(names: list[str]) -> dict[str, tuple[str, str]]:
    """(subject, session) by case name."""
    known = {}
    for number, name in enumerate(sorted(set(names)), start=1):
        match = _BIDS_NAME.fullmatch(name)
        known[name] = (match[1], match[2] or "") if match else (f"case-{number:03d}", "")
    return known
