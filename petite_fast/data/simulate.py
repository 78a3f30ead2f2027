"""Paired short and standard brain FDG scans of a modelled scanner, from real anatomy.

Per subject (image-space model; there is no tomography in it):

    a    activity in Bq/mL on the scanner's grid          petite_fast.data.phantom
    l    = a * PSF                                        Gaussian, scanner.psf_fwhm_mm
    n    ~ Poisson(counts * l / sum(l))                   standard scan, 30 min
    k    ~ Binomial(n, 1/6)                               short scan, one 5-min frame of it
    y, x = (n, 6 k) * sum(l) / counts * post-filter       Gaussian, back to Bq/mL

so the short scan's counts are a subset of the standard's, as in a real dynamic series, and
the post-filter correlates the noise over a few millimetres, as reconstruction does. Tomography
amplifies noise: `Scanner.counts` are noise-equivalent counts, about a hundredth of what a
tomograph measures, set so that the short scan's noise looks like a clinical 5-min frame.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from petite_fast.data.phantom import Subject, load_tissue
from petite_fast.data.scanners import Scanner, get_scanner
from petite_fast.data.splits import Splits, deal
from petite_fast.data.thinning import thin
from petite_fast.data.volume import write_volume
from petite_fast.errors import InputError
from petite_fast.files import write_json

SHORT_FRACTION = 1 / 6
FOLDS = 3
_FWHM_PER_SIGMA = 2.3548200450309493  # 2 sqrt(2 ln 2)


def simulate(
    out_dir: str | os.PathLike[str],
    scanner: str | Scanner,
    subjects: int,
    seed: int = 0,
    reduce: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `subjects` scan pairs of one scanner and their dataset.json; return its path.

    Subject k depends on (seed, scanner tag, k) alone: neither on how many subjects there are nor on
    which scanners were simulated before, and no anatomy occurs on two scanners.

    Args:
        out_dir: gets images/, labels/ and dataset.json, which is written last: a folder
            without it is incomplete. Files of an earlier run are replaced.
        scanner: a tag of `SCANNERS`, or a `Scanner`.
        subjects: how many, at least 3 (one per fold).
        seed: any whole number >= 0.
        reduce: voxels this many times coarser, same field of view.
        progress: called as progress(done, subjects) after each subject.

    Raises:
        InputError: unknown tag, fewer than 3 subjects, bad seed or reduce, or nilearn's
            MNI152 files are not installed.
        OSError: a file cannot be written.
    """
    if subjects < FOLDS:
        raise InputError(f"subjects is {subjects}; expected at least {FOLDS}, one per fold")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected a whole number of at least 0")
    model = (get_scanner(scanner) if isinstance(scanner, str) else scanner).reduced(reduce)
    tissue = load_tissue()
    out = Path(out_dir)
    listing = out / "dataset.json"
    listing.unlink(missing_ok=True)

    stem = zlib.crc32(model.tag.encode())  # a number that is the same on every machine
    names = [f"sub-{k:02d}" for k in range(1, subjects + 1)]
    shuffled = np.random.default_rng((seed, stem)).permutation(subjects)
    folds = deal([names[k] for k in shuffled], FOLDS)
    fold_of = {name: number for number, fold in enumerate(folds) for name in fold.validation}
    entries = []
    for k, name in enumerate(names, start=1):
        rng = np.random.default_rng((seed, stem, k))
        short, standard = scan(Subject.draw(tissue, rng).activity(model), model, rng)
        image = f"images/{name}_scanner-{model.tag}_short.nii.gz"
        label = f"labels/{name}_scanner-{model.tag}_standard.nii.gz"
        write_volume(short, grid_affine(model), out / image)
        write_volume(standard, grid_affine(model), out / label)
        entries.append({"image": image, "label": label, "subject": name, "fold": fold_of[name]})
        if progress is not None:
            progress(k, subjects)
    write_json(
        listing,
        {
            "name": f"Simulated brain FDG, scanner {model.tag}",
            "scanner": model.tag,
            "matrix": model.matrix,
            "spacing": model.spacing,
            "roi": model.roi,
            "units": "Bq/mL",
            "seed": seed,
            "reduce": reduce,
            "training": entries,
            "folds": Splits(folds).to_json()["folds"],
        },
    )
    return listing


def scan(
    activity: np.ndarray, scanner: Scanner, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Short and standard scan (float32, Bq/mL) of `activity` [X, Y, Z] on the scanner's grid."""
    seen = gaussian_filter(activity, _sigma(scanner.psf_fwhm_mm, scanner), mode="nearest")
    seen = seen.astype(np.float64)
    unit = seen.sum() / scanner.counts  # Bq/mL per count
    counts = rng.poisson(seen / unit)
    short = thin(counts, SHORT_FRACTION, rng)
    width = _sigma(scanner.post_filter_fwhm_mm, scanner)
    # Filtered in float32, which carries counts exactly and is half the work.
    return tuple(
        gaussian_filter((image * unit).astype(np.float32), width, mode="nearest")
        for image in (short, counts)
    )


def grid_affine(scanner: Scanner) -> np.ndarray:
    """Voxel -> mm, RAS+, the centre of the field of view at 0 mm."""
    affine = np.diag([*scanner.spacing, 1.0])
    affine[:3, 3] = [
        -(n - 1) / 2 * mm for n, mm in zip(scanner.matrix, scanner.spacing, strict=True)
    ]
    return affine


def _sigma(fwhm_mm: float, scanner: Scanner) -> list[float]:
    """Gaussian sigma in voxels along each axis."""
    return [fwhm_mm / _FWHM_PER_SIGMA / mm for mm in scanner.spacing]
