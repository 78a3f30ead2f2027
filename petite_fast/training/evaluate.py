"""Compare reconstructions with standard scans: per subject and overall, in the scans' units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from petite_fast.data import Normaliser, Pair, read_volume
from petite_fast.data.volume import require_static, same_grid
from petite_fast.errors import InputError
from petite_fast.training.inference import output_path
from petite_fast.training.metrics import Denominator, published_metrics, volume_metrics

METRICS = ("psnr", "ssim", "nrmse")


class Comparison(NamedTuple):
    """One reconstruction and the standard scan it should equal; `subject` names it in reports."""

    subject: str
    prediction: Path
    target: Path


def find_predictions(pairs: Sequence[Pair], folder: Path) -> list[Comparison]:
    """The reconstructions in `folder` of the pairs' short scans.

    Raises:
        InputError: some are not there (all are listed).
    """
    found = [Comparison(p.name, output_path(p.image, folder), p.label) for p in pairs]
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
        A JSON-able report: {"definitions", "subjects": [{"subject", "psnr", "ssim", "nrmse"}],
        "overall": {"psnr": {"mean", "std"}, ...}}; an infinite PSNR is None.

    Raises:
        InputError: a volume cannot be read, or prediction and target are on different grids.
    """
    rows: list[dict[str, Any]] = []
    for comparison in comparisons:
        pred, target = (
            require_static(read_volume(path)) for path in (comparison.prediction, comparison.target)
        )
        if not same_grid(pred, target):
            raise InputError(
                f"{comparison.prediction} and {comparison.target} are on different grids "
                f"({pred.array.shape} and {target.array.shape}); expected the same shape and affine"
            )
        if published:
            scale = Normaliser("petite")
            first, second = scale.fit_pair(
                pred.array, target.array, (comparison.prediction, comparison.target)
            )
            values = published_metrics(
                scale.apply(pred.array, first), scale.apply(target.array, second)
            )
        else:
            Normaliser().fit(target.array, comparison.target)  # refuses an empty target
            values = volume_metrics(pred.array, target.array, denominator=denominator)
        rows.append({"subject": comparison.subject, **values})
    return {
        "definitions": _definitions(denominator, published),
        "subjects": [{k: _finite(v) for k, v in row.items()} for row in rows],
        "overall": {name: _summary([row[name] for row in rows]) for name in METRICS},
    }


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
    }


def _summary(values: list[float]) -> dict[str, float | None]:
    mean = statistics.fmean(values)
    std = statistics.pstdev(values) if math.isfinite(mean) else math.nan
    return {"mean": _finite(mean), "std": _finite(std)}


def _finite(value: Any) -> Any:
    """JSON has no infinity: the PSNR of two equal volumes becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
