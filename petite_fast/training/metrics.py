"""PSNR, SSIM and NRMSE of a reconstructed volume against the standard scan.

Every number is computed in float64, whatever the network ran in: E[x^2] - E[x]^2 of a smooth
volume cancels in half precision and SSIM then comes out above 1.

``published_metrics`` gives the three numbers exactly as the PETITE code defines them; the plain
functions are the correct forms. Report which one was used, with the data range and denominator.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Volume = Tensor | np.ndarray
Denominator = Literal["range", "mean", "std"]

SSIM_WINDOW = 7


def psnr(pred: Volume, target: Volume, *, data_range: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / MSE), in dB; inf for equal volumes.

    Args:
        pred: reconstructed volume, [X, Y, Z] (leading axes of size 1 are allowed).
        target: standard scan, the same shape and units.
        data_range: the peak, in the volumes' units: state it beside the number.

    Raises:
        ValueError: shapes differ or data_range is not positive.
    """
    pred, target = _pair(pred, target)
    _check_range(data_range)
    mse = (pred - target).square().mean().item()
    return math.inf if mse == 0.0 else 10.0 * math.log10(data_range**2 / mse)


def ssim(
    pred: Volume, target: Volume, *, data_range: float | None = None, parity: bool = False
) -> float:
    """Structural similarity, mean over all 7x7x7 uniform windows inside the volume (Wang 2004).

    SSIM = (2 m_p m_t + c1)(2 s_pt + c2) / ((m_p^2 + m_t^2 + c1)(s_p^2 + s_t^2 + c2)) with
    c1 = (0.01 R)^2, c2 = (0.03 R)^2 and sample (co)variances, n / (n - 1) with n = 7^3 = 343.

    Args:
        pred: reconstructed volume, [X, Y, Z] (leading axes of size 1 are allowed).
        target: standard scan, the same shape and units.
        data_range: R; default max(target), as published.
        parity: use the published covariance factor 49/48 (that of a 2-D window) instead.

    Raises:
        ValueError: shapes differ, R is not positive, or a side is shorter than 7 voxels.
    """
    pred, target = _pair(pred, target)
    if min(target.shape) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs sides of at least {SSIM_WINDOW} voxels, got {tuple(target.shape)}"
        )
    peak = target.max().item() if data_range is None else data_range
    _check_range(peak)
    n = SSIM_WINDOW**2 if parity else SSIM_WINDOW**3
    factor = n / (n - 1)
    mean_p, mean_t = _window_mean(pred), _window_mean(target)
    var_p = factor * (_window_mean(pred * pred) - mean_p * mean_p)
    var_t = factor * (_window_mean(target * target) - mean_t * mean_t)
    cov = factor * (_window_mean(pred * target) - mean_p * mean_t)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    numerator = (2 * mean_p * mean_t + c1) * (2 * cov + c2)
    denominator = (mean_p.square() + mean_t.square() + c1) * (var_p + var_t + c2)
    return (numerator / denominator).mean().item()


def nrmse(pred: Volume, target: Volume, *, denominator: Denominator = "range") -> float:
    """Root mean squared error over a named denominator of the target.

    Args:
        pred: reconstructed volume, [X, Y, Z] (leading axes of size 1 are allowed).
        target: standard scan, the same shape and units.
        denominator: "range" = max - min (published), "mean", or "std" (population), of target.

    Raises:
        ValueError: shapes differ, the denominator is unknown, or it is zero for this target.
    """
    pred, target = _pair(pred, target)
    if denominator not in get_args(Denominator):
        raise ValueError(f"denominator must be range, mean or std, got {denominator!r}")
    if denominator == "range":
        scale = (target.max() - target.min()).item()
    elif denominator == "mean":
        scale = target.mean().item()
    else:
        scale = target.std(correction=0).item()
    if scale <= 0.0:
        raise ValueError(f"nrmse: the target's {denominator} is {scale:g}, it must be above 0")
    return math.sqrt((pred - target).square().mean().item()) / scale


def volume_metrics(
    pred: Volume, target: Volume, *, denominator: Denominator = "range"
) -> dict[str, float]:
    """PSNR and SSIM with data range max(target), and NRMSE, of one volume in its own units."""
    peak = float(target.max())
    return {
        "psnr": psnr(pred, target, data_range=peak),
        "ssim": ssim(pred, target, data_range=peak),
        "nrmse": nrmse(pred, target, denominator=denominator),
    }


def published_metrics(pred: Volume, target: Volume) -> dict[str, float]:
    """The three numbers as PETITE's code defines them, for volumes scaled to [0, 1].

    PSNR with peak 1, SSIM with data range max(target) and covariance factor 49/48, NRMSE over
    max - min. Source: arXiv 2407.07517, public code.
    """
    return {
        "psnr": psnr(pred, target, data_range=1.0),
        "ssim": ssim(pred, target, parity=True),
        "nrmse": nrmse(pred, target),
    }


def _pair(pred: Volume, target: Volume) -> tuple[Tensor, Tensor]:
    """Both volumes as float64 [X, Y, Z] on one device."""
    if tuple(pred.shape) != tuple(target.shape):
        raise ValueError(
            f"pred and target must have one shape, got {tuple(pred.shape)} "
            f"and {tuple(target.shape)}"
        )
    p, t = _float64(pred), _float64(target)
    if t.dim() < 3 or any(n != 1 for n in t.shape[:-3]):
        raise ValueError(f"metrics are of one 3-D volume, got shape {tuple(t.shape)}")
    return p.reshape(p.shape[-3:]), t.reshape(t.shape[-3:]).to(p.device)


def _float64(volume: Volume) -> Tensor:
    if isinstance(volume, Tensor):
        return volume.detach().double()
    # astype also turns a big-endian array, which torch refuses, into a native one
    return torch.from_numpy(np.ascontiguousarray(volume.astype(np.float64)))


def _check_range(data_range: float) -> None:
    if not data_range > 0.0 or math.isinf(data_range):
        raise ValueError(f"data_range must be a positive number, got {data_range!r}")


def _window_mean(x: Tensor) -> Tensor:
    """Mean over every 7x7x7 window inside x, [X, Y, Z] -> [X-6, Y-6, Z-6], axis by axis."""
    x = x[None, None]
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = SSIM_WINDOW
        x = F.avg_pool3d(x, kernel, stride=1)
    return x[0, 0]
