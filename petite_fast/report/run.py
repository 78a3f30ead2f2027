"""Everything a report shows of a run folder, under names that identify nobody."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petite_fast.errors import InputError
from petite_fast.training.record import INPUT, TARGET, View, read_record, read_view, view_path

TITLES = {
    INPUT: "input",
    "output": "output",
    "none": "no tuning",
    "petite": "PETITE",
    "full": "full fine-tuning",
    TARGET: "target",
}
# Okabe and Ito's palette: told apart by the colour-blind too.
COLOURS = {
    INPUT: "#6b7280",
    "output": "#0072b2",
    "none": "#b97c00",
    "petite": "#0072b2",
    "full": "#00805e",
}
# A run folder's own log, and those of the trainings in it.
_LOGS = {".": "training", "base": "base network", "petite": "PETITE", "full": "full fine-tuning"}
_FACTS = ("scanner", "normalisation", "patch")


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: the run folder.
        logs: title to column to one value per step, of each training in the folder.
        facts: what was trained and how, for the head of the page.
        units: of the volumes.
        methods: method to what `evaluate` gives, the short scan first; empty without evaluation.
        subjects: what subjects are called, in the order of every list of subjects.
    """

    folder: Path
    logs: dict[str, dict[str, list[float]]]
    facts: dict[str, str]
    units: str
    methods: dict[str, dict[str, Any]]
    subjects: list[str]

    @property
    def region(self) -> str:
        """Where mean uptake is compared: in the given masks, else in the whole body."""
        first = next(iter(self.methods.values()))["subjects"]
        return "mask" if all("mask" in row["uptake"] for row in first) else "body"

    def values(self, method: str, name: str) -> list[float | None]:
        """One value per subject: psnr, ssim, nrmse, mean, max or peak (the last three in %).

        The mean's bias is in `region`, those of maximum and peak are in the masks or, without any,
        in the hot voxels. A PSNR of equal volumes is None.
        """
        rows = self.methods[method]["subjects"]
        if name in ("mean", "max", "peak"):
            region = self.region
            if region == "body" and name != "mean":
                region = "hot"
            return [row["uptake"][region][name]["bias_percent"] for row in rows]
        return [row[name] for row in rows]

    def mean_uptake(self, method: str) -> list[tuple[float, float]]:
        """(output, target) of mean uptake in `region`, per subject."""
        rows = [row["uptake"][self.region]["mean"] for row in self.methods[method]["subjects"]]
        return [(row["output"], row["target"]) for row in rows]

    def worst_first(self) -> list[int]:
        """Positions of the subjects, by NRMSE of the last method, largest first."""
        errors = self.values(list(self.methods)[-1], "nrmse")
        return sorted(range(len(errors)), key=lambda i: -(errors[i] or 0.0))

    def view(self, position: int) -> View:
        """Volumes of the subject at `position`.

        Raises:
            InputError: the file is missing or damaged.
        """
        return read_view(view_path(self.folder, position + 1))


def title_of(method: str) -> str:
    """What the page calls a method."""
    return TITLES.get(method, method)


def read_run(folder: Path, *, keep_ids: bool = False) -> Run:
    """Read what trainings and evaluations left in a run folder.

    Args:
        folder: what `demo`, `pretrain`, `finetune` or `evaluate --out` wrote to.
        keep_ids: call subjects what the dataset does; else sub-001, sub-002, ...

    Raises:
        InputError: no such folder, nothing to report in it, or a damaged file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run of petite-fast")
    logs = {
        title: _read_log(folder / name / "log.csv")
        for name, title in _LOGS.items()
        if (folder / name / "log.csv").is_file()
    }
    evaluation = read_record(folder)
    if not logs and evaluation is None:
        raise InputError(
            f"{folder}: nothing to report; expected log.csv of a training or what "
            "petite-fast evaluate --out FOLDER writes"
        )
    methods = evaluation["methods"] if evaluation else {}
    subjects = (
        [row["subject"] for row in next(iter(methods.values()))["subjects"]] if methods else []
    )
    if not keep_ids:
        subjects = [f"sub-{number:03d}" for number in range(1, len(subjects) + 1)]
    return Run(
        folder,
        {title: log for title, log in logs.items() if log.get("loss")},
        _facts(folder, logs),
        evaluation["units"] if evaluation else "",
        methods,
        subjects,
    )


def _read_log(path: Path) -> dict[str, list[float]]:
    """Columns of a log.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else [])}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a training log ({error}); expected columns of numbers"
        ) from error


def _facts(folder: Path, logs: dict[str, Any]) -> dict[str, str]:
    """Scanner, normalisation, patch and steps, as far as the folder says."""
    said: dict[str, Any] = {}
    for name in ("network.json", "adapter_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            said |= {key: content.get(key) for key in _FACTS} | (content.get("metadata") or {})
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{path}: not valid JSON of a network ({error})") from error
    facts = {key: said[key] for key in _FACTS if said.get(key) is not None}
    if "patch" in facts:
        facts["patch"] = " x ".join(map(str, facts["patch"])) + " voxels"
    steps = {title: len(log.get("loss", [])) for title, log in logs.items()}
    if steps:
        facts["training steps"] = ", ".join(
            str(n) if title == "training" else f"{title} {n}" for title, n in steps.items()
        )
    return {key: str(value) for key, value in facts.items()}
