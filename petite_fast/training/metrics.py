"""PSNR, SSIM and NRMSE of a reconstructed volume against the standard scan.

What the numbers mean for uptake (SUV in masks, phantoms) is in `quantitation.py`.

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

Volume = Tensor | np.ndarray
Denominator = Literal["range", "mean", "std"]
Window = Literal["uniform", "gaussian"]

SSIM_WINDOW = 7
GAUSSIAN_WINDOW, GAUSSIAN_SIGMA = 11, 1.5


def psnr(pred: Volume, target: Volume, *, data_range: float, mask: Volume | None = None) -> float:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / MSE), in dB; inf for equal volumes.

    Args:
        pred: reconstructed volume, [X, Y, Z] (leading axes of size 1 are allowed).
        target: standard scan, the same shape and units.
        data_range: the peak, in the volumes' units: state it beside the number.
        mask: the voxels that count, of the same shape; None is all of them.

    Raises:
        ValueError: shapes differ, data_range is not positive, or the mask is empty.
    """
    pred, target = _pair(pred, target, mask)
    _check_range(data_range)
    mse = (pred - target).square().mean().item()
    return math.inf if mse == 0.0 else 10.0 * math.log10(data_range**2 / mse)


def ssim(
    pred: Volume,
    target: Volume,
    *,
    data_range: float | None = None,
    window: Window = "uniform",
    parity: bool = False,
) -> float:
    """Structural similarity, mean over all windows inside the volume (Wang et al. 2004).

    SSIM = (2 m_p m_t + c1)(2 s_pt + c2) / ((m_p^2 + m_t^2 + c1)(s_p^2 + s_t^2 + c2)) with
    c1 = (0.01 R)^2, c2 = (0.03 R)^2. A "uniform" window is 7x7x7 with sample (co)variances,
    n / (n - 1) with n = 343; a "gaussian" one is 11x11x11 with sigma 1.5 voxels and weights that
    sum to 1, as in MONAI's SSIMMetric. Windows are counted in voxels: compare numbers of one
    spacing only.

    Args:
        pred: reconstructed volume, [X, Y, Z] (leading axes of size 1 are allowed).
        target: standard scan, the same shape and units.
        data_range: R; default max(target), as published.
        window: "uniform" (published) or "gaussian".
        parity: use the published covariance factor 49/48 (that of a 2-D uniform window) instead.

    Raises:
        ValueError: shapes differ, R is not positive, the window is unknown or longer than a side,
            or parity is asked for with a Gaussian window.
    """
    pred, target = _pair(pred, target)
    if window not in get_args(Window):
        raise ValueError(f"window must be uniform or gaussian, got {window!r}")
    if parity and window != "uniform":
        raise ValueError("parity is of the uniform window, got window='gaussian'")
    weights = _window_weights(window)
    if min(target.shape) < len(weights):
        raise ValueError(
            f"ssim needs sides of at least {len(weights)} voxels, got {tuple(target.shape)}"
        )
    peak = target.max().item() if data_range is None else data_range
    _check_range(peak)
    n = SSIM_WINDOW**2 if parity else SSIM_WINDOW**3
    factor = n / (n - 1) if window == "uniform" else 1.0
    mean_p, mean_t = _window_mean(pred, weights), _window_mean(target, weights)
    var_p = factor * (_window_mean(pred * pred, weights) - mean_p * mean_p)
    var_t = factor * (_window_mean(target * target, weights) - mean_t * mean_t)
    cov = factor * (_window_mean(pred * target, weights) - mean_p * mean_t)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    numerator = (2 * mean_p * mean_t + c1) * (2 * cov + c2)
    denominator = (mean_p.square() + mean_t.square() + c1) * (var_p + var_t + c2)
    return (numerator / denominator).mean().item()


def nrmse(
    pred: Volume,
    target: Volume,
    *,
    denominator: Denominator = "range",
    mask: Volume | None = None,
) -> float:
    """Root mean squared error over a named denominator of the target.

    Args:
        pred: reconstructed volume, [X, Y, Z] (leading axes of size 1 are allowed).
        target: standard scan, the same shape and units.
        denominator: "range" = max - min (published), "mean", or "std" (population), of target.
        mask: the voxels that count, in numerator and denominator, of the same shape; None is all.

    Raises:
        ValueError: shapes differ, the denominator is unknown, it is zero for this target, or the
            mask is empty.
    """
    pred, target = _pair(pred, target, mask)
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


def _pair(pred: Volume, target: Volume, mask: Volume | None = None) -> tuple[Tensor, Tensor]:
    """Both volumes as float64 [X, Y, Z] on one device, or their voxels [N] inside the mask."""
    for name, other in (("pred", pred), ("mask", mask)):
        if other is not None and tuple(other.shape) != tuple(target.shape):
            raise ValueError(
                f"{name} and target must have one shape, got {tuple(other.shape)} "
                f"and {tuple(target.shape)}"
            )
    p, t = _float64(pred), _float64(target)
    if t.dim() < 3 or any(n != 1 for n in t.shape[:-3]):
        raise ValueError(f"metrics are of one 3-D volume, got shape {tuple(t.shape)}")
    t = t.to(p.device)
    if mask is None:
        return p.reshape(p.shape[-3:]), t.reshape(t.shape[-3:])
    inside = _float64(mask).to(p.device) > 0
    if not inside.any():
        raise ValueError("the mask has no voxel; expected at least one")
    return p[inside], t[inside]


def _float64(volume: Volume) -> Tensor:
    if isinstance(volume, Tensor):
        return volume.detach().double()
    # astype also turns a big-endian array, which torch refuses, into a native one
    return torch.from_numpy(np.ascontiguousarray(volume.astype(np.float64)))


def _check_range(data_range: float) -> None:
    if not data_range > 0.0 or math.isinf(data_range):
        raise ValueError(f"data_range must be a positive number, got {data_range!r}")


def _window_weights(window: Window) -> Tensor:
    """Weights [n] along one axis, sum 1; the window is their outer product."""
    if window == "uniform":
        return torch.full((SSIM_WINDOW,), 1.0 / SSIM_WINDOW, dtype=torch.float64)
    half = GAUSSIAN_WINDOW // 2
    offsets = torch.arange(-half, half + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / GAUSSIAN_SIGMA).square())
    return weights / weights.sum()


def _window_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over every window inside x, [X, Y, Z] -> sides less n - 1, axis by axis."""
    for axis in range(3):
        length = x.shape[axis] - len(weights) + 1
        # shifted sums: a convolution in float64 would make n copies of the volume
        total = torch.zeros_like(x.narrow(axis, 0, length))
        for shift, weight in enumerate(weights.tolist()):
            total.add_(x.narrow(axis, shift, length), alpha=weight)
        x = total
    return x
