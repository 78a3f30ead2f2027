"""Reconstruct whole volumes: normalise, slide the network over them, undo the normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from petite_fast.data.derivatives import LABEL, derivative_path, write_provenance
from petite_fast.data.frames import to_static
from petite_fast.data.normalise import Normaliser
from petite_fast.data.volume import is_dicom, read_volume, require_static, write_like
from petite_fast.errors import InputError

SUFFIX = f"_desc-{LABEL}"
_DIVISOR = 16  # the generator halves its grid four times
_WINDOWS_PER_CALL = 4
_ENDINGS = (".nii.gz", ".nii", ".v")


@dataclass(frozen=True)
class Reconstructor:
    """A network with what it needs to know about volumes.

    Attributes:
        network: short scan to standard scan on [N, 1, X, Y, Z].
        patch: sides of the sliding window in voxels, those of training; each is rounded up to a
            multiple of 16.
        normaliser: the one the network was trained with.
        provenance: how results are made, JSON-able; it goes beside the result of a BIDS image.
    """

    network: nn.Module
    patch: tuple[int, int, int]
    normaliser: Normaliser
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def array(self, short: np.ndarray, where: str | Path = "the input") -> np.ndarray:
        """Reconstruct [X, Y, Z] float32, any sides, in the units of `short`.

        Windows of `patch` overlap by half and are averaged with equal weights (as published). A
        volume smaller than the window is padded with zeros and cropped back.

        Args:
            short: the short scan, [X, Y, Z].
            where: names the volume in errors.

        Raises:
            InputError: the volume has no signal or is not finite.
        """
        from monai.inferers import sliding_window_inference

        record = self.normaliser.fit(short, where)
        device = next(self.network.parameters()).device
        x = torch.from_numpy(self.normaliser.apply(short, record).astype(np.float32))[None, None]
        self.network.eval()
        with torch.inference_mode():
            # windows run on the network's device, the volume is put together on the CPU
            y = sliding_window_inference(
                x,
                roi_size=[_DIVISOR * math.ceil(side / _DIVISOR) for side in self.patch],
                sw_batch_size=_WINDOWS_PER_CALL,
                predictor=self.network,
                overlap=0.5,
                mode="constant",
                sw_device=device,
                device="cpu",
            )
        return self.normaliser.inverse(y[0, 0].numpy(), record)  # type: ignore[call-overload]

    def file(
        self,
        path: Path,
        out: Path,
        name: str | None = None,
        *,
        frames: Sequence[int] | None = None,
        dicom: bool = False,
        keep_ids: bool = False,
    ) -> Path:
        """Reconstruct one scan into folder `out`, on its own grid and in its own units.

        With an image of a BIDS name, `out` is a derivative data set; see
        `petite_fast.data.derivatives`.

        Args:
            path: what `read_volume` takes; without `frames`, static.
            out: folder.
            name: of the result, before "_desc-petite"; None: the file's own.
            frames: of a dynamic series, whose mean (`to_static`) is the short scan.
            dicom: write a derived DICOM series (a folder) beside the NIfTI; the input must be one.
            keep_ids: that series keeps the patient's name and IDs; see `write_dicom`.

        Returns:
            The NIfTI.

        Raises:
            InputError: the file cannot be used; see `read_volume` and `write_dicom`.
            OSError: the result cannot be written; nothing is left behind.
        """
        volume = read_volume(path)
        volume = require_static(volume) if frames is None else to_static(volume, frames)
        if dicom and volume.dicom is None:
            raise InputError(
                f"{path}: not one image of a DICOM series; expected one for a result in DICOM"
            )
        target = output_path(path, out, name)
        series = out / f"{_stem(target)}_dicom"
        if dicom and series.exists():  # said before the network runs
            raise InputError(f"{series}: is there already; expected a new folder for the series")
        array = self.array(volume.array, path)
        if dicom:
            from petite_fast.data.dicom_write import write_dicom

            write_dicom(volume, array, series, keep_ids=keep_ids)
        if derivative_path(path, out) is not None:
            # the sidecar first: where there is a result, it says where that came from
            made, timing = dict(self.provenance), None
            if frames is not None:
                made["frames"], timing = list(frames), volume.timing
            write_provenance(path, target, out, made, timing)
        return write_like(volume, array, target)


def output_path(path: Path, out: Path, name: str | None = None) -> Path:
    """Where the reconstruction of `path` goes: its own stem, so nothing from the header leaks.

    A BIDS-PET name gives ``sub-*/[ses-*/]pet/*_desc-petite_pet.nii.gz``.
    """
    return derivative_path(path, out) or out / f"{name or _stem(path)}{SUFFIX}.nii.gz"


def find_inputs(path: Path) -> list[Path]:
    """The scans that `path` stands for; own outputs are left out.

    A file is itself. A folder is the NIfTI and ECAT files in it; without any, the DICOM series in
    it; without that, what its folders stand for (patients of studies of series).

    Raises:
        InputError: nothing there.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = _in_folder(path) if path.is_dir() else [path]
    if not found:
        raise InputError(f"{path}: no NIfTI (.nii, .nii.gz), ECAT (.v) or DICOM file in it")
    return found


def _in_folder(path: Path) -> list[Path]:
    entries = sorted(
        p for p in path.iterdir() if not p.name.startswith(".") and SUFFIX not in p.name
    )
    files = [p for p in entries if p.is_file() and p.name != "DICOMDIR"]
    if found := [p for p in files if p.name.lower().endswith(_ENDINGS)]:
        return found
    folders = [p for p in entries if p.is_dir()]
    if any(map(is_dicom, files)) or (files and not folders):
        return [path]
    return [scan for folder in folders for scan in _in_folder(folder)]


def result_names(inputs: Sequence[Path], keep_ids: bool) -> list[str | None]:
    """Names of results: a DICOM folder is often called after its patient, so those are numbered.

    Raises:
        InputError: two results would have one name.
    """
    check_distinct([p for p in inputs if keep_ids or not p.is_dir()])
    if keep_ids:
        return [None] * len(inputs)
    return [f"series-{k:03d}" if p.is_dir() else None for k, p in enumerate(inputs, start=1)]


def check_distinct(paths: Sequence[Path]) -> None:
    """Refuse inputs whose results would overwrite each other.

    Raises:
        InputError: two paths have one stem.
    """
    first: dict[str, Path] = {}
    for path in paths:
        other = first.setdefault(_stem(path), path)
        if other != path:
            raise InputError(f"{path} and {other} would have one output name; rename one of them")


def _stem(path: Path) -> str:
    name = path.name
    if path.is_dir():
        return name
    for ending in _ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return path.stem
