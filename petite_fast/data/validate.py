"""Everything that is wrong with a data set, found at once and before a GPU is held."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from petite_fast.data.bids_sidecar import faults
from petite_fast.data.cases import Case, Problem
from petite_fast.data.collection import Collection, read_collection
from petite_fast.data.dataset import grid_text
from petite_fast.data.nifti import read_nifti
from petite_fast.data.normalise import require_signal
from petite_fast.data.volume import Volume, read_volume, require_static, same_grid
from petite_fast.errors import InputError

_SPACING_MM = 1e-3


def validate(data: Path) -> tuple[Collection, list[Problem]]:
    """Read a whole data set, two volumes at a time, and list what is wrong.

    Looked for: halves of pairs that are missing, files that cannot be read, NaN, volumes without
    signal, input and target on different grids or in different units, no units, voxel sizes that
    differ inside a scanner, subjects in two splits, sidecar fields that contradict each other, and
    images that occur twice by content.

    Args:
        data: a data set that `read_collection` reads.

    Returns:
        The data set, and its problems, those first that stop a training (`Problem.fatal`).

    Raises:
        InputError: `data` is no data set, or its listing cannot be read.
    """
    collection = read_collection(data)
    found = [*collection.problems, *_split_problems(collection), *_unit_problems(collection)]
    spacings: dict[str, dict[tuple[float, ...], list[Path]]] = defaultdict(dict)
    contents: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for case in collection.cases:
        volumes = {}
        for key, path in (("image", case.image), ("label", case.label)):
            volume = None
            if path is not None:
                volume, wrong = _volume(path, key in case.infos)
                found += wrong
            if key in case.infos:
                frames = None if volume is None else _frames(volume)
                found += [Problem(*fault) for fault in faults(case.infos[key], frames)]
            if path is None or volume is None:
                continue
            volumes[key] = volume
            files = contents[_digest(volume)]
            if (key, path) not in files or key == "image":  # doses may share a standard scan
                files.append((key, path))
            _group(spacings[case.scanner], volume.spacing, path)
        if len(volumes) == 2 and not same_grid(volumes["image"], volumes["label"]):
            grids = " and ".join(grid_text(volume) for volume in volumes.values())
            text = f"short and standard scan are on different grids ({grids}); expected the same"
            found.append(Problem(str(case.image), text))
    found += [*_spacing_problems(spacings), *_duplicates(contents)]
    return collection, sorted(dict.fromkeys(found), key=lambda problem: not problem.fatal)


def _volume(path: Path, has_info: bool) -> tuple[Volume | None, list[Problem]]:
    """One volume, if it can be read, and what is wrong with it; its sidecar is judged apart."""
    try:
        volume = read_nifti(path, sidecar=False) if has_info else read_volume(path)
        voxels = volume.array  # decodes them
    except InputError as error:
        return None, [_problem(path, error)]
    except OSError as error:
        return None, [Problem(str(path), f"cannot be read ({error.strerror or error})")]
    try:
        require_static(volume)
        require_signal(voxels, path)
    except InputError as error:
        return volume, [_problem(path, error)]
    return volume, []


def _problem(path: Path, error: InputError) -> Problem:
    return Problem(str(path), str(error).removeprefix(f"{path}: "))


def _frames(volume: Volume) -> int:
    return 1 if len(volume.shape) == 3 else volume.shape[0]


def _digest(volume: Volume) -> str:
    """Equal for equal voxels, however they are stored or compressed."""
    digest = hashlib.sha256(str(volume.shape).encode())
    digest.update(np.ascontiguousarray(volume.array).data)
    return digest.hexdigest()


def _group(
    groups: dict[tuple[float, ...], list[Path]], spacing: tuple[float, ...], path: Path
) -> None:
    for known, paths in groups.items():
        if all(abs(a - b) <= _SPACING_MM for a, b in zip(known, spacing, strict=True)):
            paths.append(path)
            return
    groups[spacing] = [path]


def _spacing_problems(
    spacings: dict[str, dict[tuple[float, ...], list[Path]]],
) -> Iterator[Problem]:
    for scanner, groups in spacings.items():
        if len(groups) > 1:
            sizes = ", ".join(
                f"{'x'.join(f'{mm:.4g}' for mm in spacing)} mm ({len(paths)} files, {paths[0]})"
                for spacing, paths in groups.items()
            )
            text = f"voxel sizes differ: {sizes}; expected one per scanner"
            yield Problem(f"scanner {scanner}", text)


def _duplicates(contents: dict[str, list[tuple[str, Path]]]) -> Iterator[Problem]:
    for files in contents.values():
        if len(files) > 1:
            first, *others = (str(path) for _, path in files)
            text = f"the same voxels as in {', '.join(others)}; expected each scan once"
            yield Problem(first, text)


def _split_problems(collection: Collection) -> Iterator[Problem]:
    for text in collection.splits.faults():
        yield Problem(str(collection.root), text)
    unknown = collection.splits.subjects - {case.subject for case in collection.cases}
    if unknown:
        names = ", ".join(sorted(unknown))
        text = f"the splits name {names}, of whom there is no scan; expected subjects of the data"
        yield Problem(str(collection.root), text)


def _unit_problems(collection: Collection) -> Iterator[Problem]:
    without = [case for case in collection.cases if case.units is None and not case.infos]
    if without:
        text = (
            f'"units" is missing ({len(without)} of {len(collection.cases)} cases); expected the'
            ' units of the voxels, such as "units": "Bq/mL"'
        )
        yield Problem(str(collection.root), text)
    yield from filter(None, map(_unlike, collection.cases))


def _unlike(case: Case) -> Problem | None:
    """Image and label in different units."""
    units = [info.units for info in case.infos.values() if info.units]
    if len(set(units)) < 2:
        return None
    text = f"Units differ: {units[0]} and, of the standard scan, {units[1]}; expected the same"
    return Problem(case.infos["image"].file, text)
