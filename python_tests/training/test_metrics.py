"""PSNR, SSIM, NRMSE: published golden values, brute force, MONAI."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from petite_fast.training.metrics import nrmse, psnr, published_metrics, ssim, volume_metrics

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {"0": (1, 1, 24, 20, 22), "1": (1, 1, 33, 40, 17)}


def golden_pair(case: str) -> tuple[np.ndarray, np.ndarray]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("formula", GOLDEN / "formula.py")
    assert spec is not None and spec.loader is not None
    formula = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formula)
    target = formula.volume(f"metric_t{case}", CASES[case])
    noise = formula.volume(f"metric_p{case}", CASES[case])
    return np.maximum(target + 0.07 * noise, 0), target


def random_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.gamma(2.0, 3.0, shape)
    return target + rng.normal(0, 0.5, shape), target


@pytest.mark.parametrize("case", CASES)
def test_published_metrics_equal_the_golden_values(case: str) -> None:
    metrics = published_metrics(*golden_pair(case))
    golden = np.load(GOLDEN / "metrics.npz")[f"case{case}"]
    np.testing.assert_allclose(list(metrics.values()), golden, rtol=1e-5)


def test_default_ssim_differs_from_the_published_factor() -> None:
    pred, target = golden_pair("0")
    assert ssim(pred, target) != ssim(pred, target, parity=True)


def test_ssim_equals_its_formula_window_by_window() -> None:
    pred, target = random_pair((9, 8, 10))
    peak = target.max()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for i, j, k in np.ndindex(3, 2, 4):
        p = pred[i : i + 7, j : j + 7, k : k + 7].ravel()
        t = target[i : i + 7, j : j + 7, k : k + 7].ravel()
        cov = np.cov(p, t)  # n - 1
        numerator = (2 * p.mean() * t.mean() + c1) * (2 * cov[0, 1] + c2)
        denominator = (p.mean() ** 2 + t.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)
        values.append(numerator / denominator)
    assert ssim(pred, target) == pytest.approx(np.mean(values), rel=1e-10)


def test_ssim_of_a_smooth_half_precision_volume_stays_below_one() -> None:
    axis = torch.linspace(0, 1, 24)
    target = (axis[:, None, None] + axis[None, :, None] + axis[None, None]) / 3 + 1
    pred = (target + 1e-3 * torch.rand(target.shape)).half()
    assert 0.9 < ssim(pred, target.half()) <= 1.0


def test_psnr_agrees_with_monai_for_a_named_range() -> None:
    monai_metrics = pytest.importorskip("monai.metrics")
    pred, target = random_pair((12, 10, 9))
    metric = monai_metrics.PSNRMetric(max_val=7.5)
    metric(y_pred=torch.tensor(pred)[None, None], y=torch.tensor(target)[None, None])
    assert psnr(pred, target, data_range=7.5) == pytest.approx(metric.aggregate().item(), abs=1e-5)


@pytest.mark.parametrize("data_range", [7.5, 40.0])
def test_gaussian_ssim_agrees_with_monai(data_range: float) -> None:
    monai_metrics = pytest.importorskip("monai.metrics")
    pred, target = random_pair((14, 13, 12))
    pred = target + 8 * (pred - target)  # far enough for the two windows to disagree
    metric = monai_metrics.SSIMMetric(spatial_dims=3, data_range=data_range)
    metric(y_pred=torch.tensor(pred)[None, None], y=torch.tensor(target)[None, None])
    ours = ssim(pred, target, data_range=data_range, window="gaussian")
    assert ours == pytest.approx(metric.aggregate().item(), abs=1e-5)
    assert ours != pytest.approx(ssim(pred, target, data_range=data_range), abs=1e-3)


def test_nrmse_agrees_with_monai() -> None:
    monai_metrics = pytest.importorskip("monai.metrics")
    pred, target = random_pair((12, 10, 9))
    metric = monai_metrics.RMSEMetric()
    metric(y_pred=torch.tensor(pred)[None, None], y=torch.tensor(target)[None, None])
    expected = metric.aggregate().item() / target.mean()
    assert nrmse(pred, target, denominator="mean") == pytest.approx(expected, rel=1e-6)


def test_a_mask_chooses_the_voxels() -> None:
    pred, target = random_pair((9, 9, 9))
    mask = np.zeros(target.shape)
    mask[2:7, 3:8, 1:6] = 1
    inner = np.s_[2:7, 3:8, 1:6]
    assert nrmse(pred, target, mask=mask) == nrmse(pred[inner], target[inner])
    assert psnr(pred, target, data_range=9.0, mask=mask) == pytest.approx(
        psnr(pred[inner], target[inner], data_range=9.0), rel=1e-12
    )
    with pytest.raises(ValueError, match="no voxel"):
        nrmse(pred, target, mask=0 * mask)
    with pytest.raises(ValueError, match="mask and target"):
        nrmse(pred, target, mask=mask[1:])


def test_equal_volumes_are_perfect() -> None:
    _, target = random_pair((8, 8, 8))
    assert volume_metrics(target, target) == {"psnr": math.inf, "ssim": 1.0, "nrmse": 0.0}


@pytest.mark.parametrize(
    ("denominator", "scale"),
    [("range", lambda t: np.ptp(t)), ("mean", np.mean), ("std", np.std)],
)
def test_nrmse_names_its_denominator(denominator: str, scale) -> None:
    pred, target = random_pair((7, 8, 9))
    rmse = np.sqrt(np.mean((pred - target) ** 2))
    value = nrmse(pred, target, denominator=denominator)  # type: ignore[arg-type]
    assert value == pytest.approx(rmse / scale(target), rel=1e-12)


def test_metrics_do_not_depend_on_the_unit() -> None:
    pred, target = random_pair((10, 10, 10))
    small, large = volume_metrics(pred, target), volume_metrics(2e4 * pred, 2e4 * target)
    assert large == pytest.approx(small, rel=1e-9)


def test_misuse_is_named() -> None:
    pred, target = random_pair((8, 8, 8))
    with pytest.raises(ValueError, match="one shape"):
        psnr(pred[1:], target, data_range=1.0)
    with pytest.raises(ValueError, match="data_range"):
        psnr(pred, target, data_range=0.0)
    with pytest.raises(ValueError, match="7 voxels"):
        ssim(pred[:6], target[:6])
    with pytest.raises(ValueError, match="11 voxels"):
        ssim(pred, target, window="gaussian")
    with pytest.raises(ValueError, match="uniform or gaussian"):
        ssim(pred, target, window="box")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parity"):
        ssim(pred, target, window="gaussian", parity=True)
    with pytest.raises(ValueError, match="range, mean or std"):
        nrmse(pred, target, denominator="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3-D"):
        ssim(np.zeros((2, 8, 8, 8)), np.zeros((2, 8, 8, 8)))
