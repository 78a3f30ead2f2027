"""What an evaluation leaves in a run folder for `petite-fast report`.

RUN/evaluation/metrics.json    {"units", "methods": {name: what `evaluate` returns}}
RUN/evaluation/sub-001.npz     one subject's volumes, small: see `View`

Files are numbered in the order of the subjects; no file name or path of a scan gets in.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from petite_fast.data import read_volume
from petite_fast.errors import InputError
from petite_fast.files import atomic_write, write_json
from petite_fast.training.evaluate import Comparison, evaluate
from petite_fast.training.metrics import Denominator

FOLDER = "evaluation"
INPUT, TARGET = "input", "target"

_LONGEST_SIDE = 192  # in-plane, of a stored volume
_WINDOW_PERCENTILE = 99.95


@dataclass(frozen=True)
class View:
    """One subject's volumes as they are shown: shrunk in-plane, relative to one bright value.

    Attributes:
        volumes: name ("input", a method's, "target") to [X, Y, Z] float16, axes to the patient's
            right, anterior, superior; multiply by `top` for the unit.
        spacing: voxel size in mm along X, Y, Z.
        top: value that counts as 1, the 99.95th percentile of the target's positive voxels.
    """

    volumes: dict[str, np.ndarray]
    spacing: tuple[float, float, float]
    top: float

    def shrunk(self, factor: int) -> View:
        """The same with `factor` x `factor` voxels in-plane averaged to one."""
        if factor == 1:
            return self
        x, y, z = self.spacing
        volumes = {name: _shrink(v, factor) for name, v in self.volumes.items()}
        return View(volumes, (factor * x, factor * y, z), self.top)


def record(
    out: Path,
    methods: Mapping[str, Sequence[Comparison]],
    *,
    units: str | None = None,
    denominator: Denominator = "range",
) -> dict[str, dict[str, Any]]:
    """Evaluate methods on the same subjects; keep the numbers and small volumes in `out`.

    Args:
        out: run folder.
        methods: name to comparisons, the same subjects and targets in each; "input" is the short
            scan itself.
        units: of the volumes, for the reader; None: what the first target's file says.
        denominator: of NRMSE.

    Returns:
        Name to what `evaluate` gives.

    Raises:
        InputError: see `evaluate`.
        OSError: a file cannot be written.
    """
    reports = {name: evaluate(c, denominator=denominator) for name, c in methods.items()}
    if units is None:
        first = next(iter(methods.values()))[0]
        units = read_volume(first.target).units or "units of the files"
    folder = out / FOLDER
    for stale in folder.glob("sub-*.npz"):
        stale.unlink()
    for number, each in enumerate(zip(*methods.values(), strict=True), start=1):
        files = {name: c.prediction for name, c in zip(methods, each, strict=True)}
        _save_view(_view(files, each[0].target), view_path(out, number))
    write_json(folder / "metrics.json", {"units": units, "methods": reports})
    return reports


def read_record(run: Path) -> dict[str, Any] | None:
    """What `record` left in metrics.json; None where nothing was evaluated.

    Raises:
        InputError: the file is not what `record` writes.
    """
    path = run / FOLDER / "metrics.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [report["subjects"] for report in content["methods"].values()]
        complete = (
            bool(rows)
            and bool(rows[0])
            and all(len(r) == len(rows[0]) for r in rows)
            and all("uptake" in row for r in rows for row in r)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{path}: not a complete evaluation; expected what evaluate --out writes")
    return content


def view_path(run: Path, number: int) -> Path:
    """Where the volumes of subject `number` (from 1) are."""
    return run / FOLDER / f"sub-{number:03d}.npz"


def read_view(path: Path) -> View:
    """The volumes of one subject.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            volumes = {name: arrays[name] for name in arrays.files if not name.startswith("_")}
            spacing, top = arrays["_spacing"].tolist(), float(arrays["_top"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); run petite-fast evaluate again"
        ) from error
    return View(volumes, tuple(spacing), top)


def _view(files: Mapping[str, Path], target: Path) -> View:
    standard = read_volume(target)
    # of float64: a percentile of float32 is interpolated in float32
    top = float(np.percentile(standard.array[standard.array > 0].astype(float), _WINDOW_PERCENTILE))
    factor = -(-max(standard.array.shape[:2]) // _LONGEST_SIDE)
    volumes = {name: read_volume(path).array for name, path in files.items()}
    small = {
        # far outside the window nothing is seen, and float16 ends at 65504
        name: np.clip(_shrink(v / np.float32(top), factor), -100, 100).astype(np.float16)
        for name, v in {**volumes, TARGET: standard.array}.items()
    }
    x, y, z = standard.spacing
    return View(small, (factor * x, factor * y, z), top)


def _shrink(volume: np.ndarray, factor: int) -> np.ndarray:
    """Mean of factor x factor blocks in-plane; a ragged end is filled with its own last voxel."""
    x, y, z = volume.shape
    more = [(0, -x % factor), (0, -y % factor), (0, 0)]
    padded = np.pad(volume, more, mode="edge").astype(np.float32)
    shape = (padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, z)
    return padded.reshape(shape).mean(axis=(1, 3))


def _save_view(view: View, path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            _spacing=np.array(view.spacing),
            _top=np.array(view.top),
            **view.volumes,  # type: ignore[arg-type]
        )
