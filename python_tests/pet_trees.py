"""Small data sets in the layouts that are read: BIDS-PET tree, nnU-Net raw folder, decathlon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from petite_fast.data import read_volume, thin, write_like, write_volume

SIDECAR: dict[str, Any] = {
    "Manufacturer": "GE MEDICAL SYSTEMS",
    "ManufacturersModelName": "Discovery ST",
    "Units": "Bq/mL",
    "TracerName": "FDG",
    "TracerRadionuclide": "F18",
    "InjectedRadioactivity": 388.8,
    "InjectedRadioactivityUnits": "MBq",
    "InjectedMass": "n/a",
    "InjectedMassUnits": "ug",
    "SpecificRadioactivity": "n/a",
    "SpecificRadioactivityUnits": "Bq/g",
    "ModeOfAdministration": "bolus",
    "TimeZero": "13:04:42",
    "ScanStart": 1800,
    "InjectionStart": 0,
    "FrameTimesStart": [1800],
    "FrameDuration": [1800],
    "AcquisitionMode": "list mode",
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 0,
    "ReconMethodName": "OSEM",
    "ReconMethodParameterLabels": ["subsets", "iterations"],
    "ReconMethodParameterUnits": ["none", "none"],
    "ReconMethodParameterValues": [21, 2],
    "ReconFilterType": "none",
    "AttenuationCorrection": "CT",
}
# What dcm2niix writes since 1.0.20260416: no TimeZero, no AcquisitionTime, no InjectionStart.
NEW_DCM2NIIX: dict[str, Any] = {
    "Modality": "PT",
    "Manufacturer": "Siemens",
    "ManufacturersModelName": "Biograph",
    "Units": "BQML",
    "TracerName": "FDG",
    "SeriesTime": "16:20:16.500000",
    "DecayCorrection": "START",
    "RadionuclideTotalDose": 3.5e8,
    "RadionuclideHalfLife": 6586.2,
    "FrameTimesStart": [3000],
    "FrameDuration": [1200],
}
SPACING = (2.0, 2.0, 3.0)


def scan(number: int, shape: tuple[int, int, int] = (12, 10, 9)) -> np.ndarray:
    """Counts of a bright ball, another noise for each number."""
    axes = np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij")
    ball = np.exp(-sum(axis**2 for axis in axes) / 16) * 9000
    return np.random.default_rng(number).poisson(ball).astype(np.float32)


def save(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> Path:
    return write_volume(array, np.diag([*spacing, 1.0]), path)


def save_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _visits(
    root: Path, sidecar: dict[str, Any], subjects: int, sessions: int
) -> Iterator[tuple[int, Path, str]]:
    """Write what lies at the root; a number, the folder and the stem of names of each visit."""
    save_json(root / "dataset_description.json", {"Name": "Test", "BIDSVersion": "1.10.0"})
    save_json(root / "pet.json", sidecar)
    rows = ["participant_id\tage\tweight"]
    rows += [f"sub-{k:02d}\t50\t{60 + k}" for k in range(1, subjects + 1)]
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    for k in range(1, subjects + 1):
        for s in range(1, sessions + 1):
            visit = f"ses-{s}" if sessions > 1 else ""
            folder = root / f"sub-{k:02d}" / visit / "pet"
            yield 10 * k + s, folder, f"sub-{k:02d}{'_' + visit if visit else ''}_trc-FDG"


def bids_tree(root: Path, subjects: int = 5, sessions: int = 1) -> Path:
    """rec-short and rec-standard of each visit; the sidecar at the root serves them all."""
    for number, folder, stem in _visits(root, SIDECAR, subjects, sessions):
        for kind, factor, seconds in (("short", 1, 300), ("standard", 2, 1800)):
            name = f"{stem}_rec-{kind}_pet"
            save(folder / f"{name}.nii.gz", factor * scan(number))
            save_json(folder / f"{name}.json", {"FrameDuration": [seconds]})
    return root


def dynamic_tree(root: Path, subjects: int = 3, sessions: int = 1) -> Path:
    """One series of six 5-minute frames per visit; times, units and dose stand at the root."""
    times = {"FrameTimesStart": [1800 + 300 * t for t in range(6)], "FrameDuration": [300] * 6}
    for number, folder, stem in _visits(root, SIDECAR | times, subjects, sessions):
        folder.mkdir(parents=True)
        series = np.stack([scan(10 * number + t) for t in range(6)], axis=3)
        image = nib.Nifti1Image(series, np.diag([*SPACING, 1.0]))
        nib.save(image, folder / f"{stem}_pet.nii.gz")
    return root


def nnunet_folder(root: Path, training: int = 5, test: int = 2) -> Path:
    for k in range(training + test):
        part = "Tr" if k < training else "Ts"
        save(root / f"images{part}" / f"MILLER_{k}_0000.nii.gz", scan(k))
        if part == "Tr" or k % 2:
            save(root / f"labels{part}" / f"MILLER_{k}.nii.gz", 2 * scan(k))
    save_json(
        root / "dataset.json",
        {
            "channel_names": {"0": "PET"},
            "labels": {"background": 0},
            "numTraining": training,
            "file_ending": ".nii.gz",
            "units": "SUVbw",
        },
    )
    return root


def thinned_dataset(folder: Path, files: list[Path], training: int) -> Path:
    """A decathlon list of real standard scans and a sixth of their counts, subjects s0, s1, ...

    Args:
        folder: for the short scans and the list; made where it is missing.
        files: standard scans.
        training: how many are trained on; the rest are held out.
    """
    folder.mkdir(exist_ok=True)
    entries = []
    for k, path in enumerate(files):
        volume = read_volume(path)
        short = thin(volume.array, 1 / 6, np.random.default_rng(k), 10.0 * volume.array.size)
        image = write_like(volume, short, folder / f"short-{k}.nii.gz")
        entries.append({"image": image.name, "label": str(path), "subject": f"s{k}"})
    subjects = [entry["subject"] for entry in entries]
    folds = [{"training": subjects[:training], "validation": subjects[training:]}]
    return save_json(folder / "dataset.json", {"training": entries, "folds": folds})
