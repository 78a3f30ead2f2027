"""Compare reconstructions with standard scans: per subject and overall, in the scans' units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from petite_fast.data import Normaliser, Pair, read_volume
from petite_fast.data.normalise import foreground_threshold
from petite_fast.data.volume import Volume, require_static, same_grid
from petite_fast.errors import InputError
from petite_fast.training.inference import output_path
from petite_fast.training.metrics import Denominator, published_metrics, volume_metrics
from petite_fast.training.quantitation import isocontour_mask, percent_bias, uptake

METRICS = ("psnr", "ssim", "nrmse")


class Comparison(NamedTuple):
    """One reconstruction and the standard scan it should equal; `subject` names it in reports.

    `mask` is a NIfTI on their grid whose voxels above 0 are a region of interest.
    """

    subject: str
    prediction: Path
    target: Path
    mask: Path | None = None


def find_predictions(
    pairs: Sequence[Pair], folder: Path, masks: Path | None = None
) -> list[Comparison]:
    """The reconstructions in `folder` of the pairs' short scans.

    Args:
        pairs: short and standard scans.
        folder: where `petite-fast reconstruct` wrote.
        masks: folder with a mask per standard scan, under the same file name.

    Raises:
        InputError: some are not there (all are listed).
    """
    found = [
        Comparison(p.name, output_path(p.image, folder), p.label, masks and masks / p.label.name)
        for p in pairs
    ]
    missing = [str(c.prediction) for c in found if not c.prediction.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} reconstructions do not exist: {', '.join(missing)}; "
            "run petite-fast reconstruct first"
        )
    return found


def evaluate(
    comparisons: Sequence[Comparison],
    *,
    denominator: Denominator = "range",
    published: bool = False,
) -> dict[str, Any]:
    """PSNR, SSIM and NRMSE of each subject and their mean and standard deviation.

    Args:
        comparisons: what to compare.
        denominator: of NRMSE.
        published: each volume is first scaled to [0, 1] by its own minimum and maximum and the
            published formulas are used: for comparison with the paper only, since
            a wrong SUV goes unseen.

    Returns:
        A JSON-able report: {"definitions", "subjects": [{"subject", "psnr", "ssim", "nrmse",
        "uptake"}], "overall": {"psnr": {"mean", "std"}, ...}}; an infinite PSNR is None. "uptake"
        (not with `published`) is {region: {"mean" | "max" | "peak": {"output", "target",
        "bias_percent"}}} in the regions body, hot and, where there is a mask, mask.

    Raises:
        InputError: a volume cannot be read, prediction, target and mask are on different grids, or
            a mask is empty or has no uptake.
    """
    rows: list[dict[str, Any]] = []
    for comparison in comparisons:
        pred, target = (
            require_static(read_volume(path)) for path in (comparison.prediction, comparison.target)
        )
        _check_grid(pred, target)
        values: dict[str, Any] = {"subject": comparison.subject}
        if published:
            scale = Normaliser("petite")
            first, second = scale.fit_pair(
                pred.array, target.array, (comparison.prediction, comparison.target)
            )
            values |= published_metrics(
                scale.apply(pred.array, first), scale.apply(target.array, second)
            )
        else:
            Normaliser().fit(target.array, comparison.target)  # refuses an empty target
            values |= volume_metrics(pred.array, target.array, denominator=denominator)
            values["uptake"] = _uptake(pred, target, comparison.mask)
        rows.append(values)
    return {
        "definitions": _definitions(denominator, published),
        "subjects": [{k: _finite(v) for k, v in row.items()} for row in rows],
        "overall": {name: _summary([row[name] for row in rows]) for name in METRICS},
    }


def _check_grid(volume: Volume, target: Volume) -> None:
    if not same_grid(volume, target):
        raise InputError(
            f"{volume.source} and {target.source} are on different grids "
            f"({volume.array.shape} and {target.array.shape}); expected the same shape and affine"
        )


def _uptake(pred: Volume, target: Volume, mask: Path | None) -> dict[str, Any]:
    """Mean, maximum and peak in each region, and how far off they are."""
    regions = {
        "body": target.array > foreground_threshold(target.array),
        "hot": isocontour_mask(target.array),
    }
    if mask is not None:
        drawn = read_volume(mask)
        _check_grid(drawn, target)
        regions["mask"] = drawn.array > 0
    return {name: _region(pred, target, inside, mask) for name, inside in regions.items()}


def _region(pred: Volume, target: Volume, inside: np.ndarray, mask: Path | None) -> dict[str, Any]:
    try:
        found = uptake(pred.array, inside, target.spacing)
        true = uptake(target.array, inside, target.spacing)
        bias = percent_bias(found, true)
    except ValueError as error:
        raise InputError(f"{mask or target.source}: no uptake to compare ({error})") from error
    rows = zip(found._fields, found, true, bias, strict=True)
    return {n: {"output": f, "target": t, "bias_percent": b} for n, f, t, b in rows}


def _definitions(denominator: str, published: bool) -> dict[str, str]:
    if published:
        return {
            "volumes": "each scaled to [0, 1] by its own minimum and maximum (published)",
            "psnr": "data range 1",
            "ssim": "3-D, uniform 7x7x7, data range max(target), covariance factor 49/48",
            "nrmse": "RMSE / (max - min of target)",
        }
    scale = {"range": "(max - min of target)", "mean": "mean of target", "std": "std of target"}
    return {
        "volumes": "whole volume, in the units of the files",
        "psnr": "data range max(target)",
        "ssim": "3-D, uniform 7x7x7, data range max(target), covariance factor 343/342",
        "nrmse": f"RMSE / {scale[denominator]}",
        "uptake": "mean, maximum and peak (1 mL sphere); bias is 100 (output - target) / target; "
        "body: target above half its mean uptake; hot: target above 41 % of its maximum",
    }


def _summary(values: list[float]) -> dict[str, float | None]:
    mean = statistics.fmean(values)
    std = statistics.pstdev(values) if math.isfinite(mean) else math.nan
    return {"mean": _finite(mean), "std": _finite(std)}


def _finite(value: Any) -> Any:
    """JSON has no infinity: the PSNR of two equal volumes becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
