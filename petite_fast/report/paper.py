"""The plots of a report as PNG figures for papers, by Matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from petite_fast.files import atomic_write
from petite_fast.report.run import COLOURS, Run, title_of
from petite_fast.report.svg import agreement, percent_difference
from petite_fast.report.volumes import Shown, panels
from petite_fast.training.figures import comparison_figure

_PICTURES = 3
_METRICS = {
    "psnr": "PSNR [dB]",
    "ssim": "SSIM",
    "nrmse": "NRMSE",
    "mean": "bias of SUVmean [%]",
    "peak": "bias of SUVpeak [%]",
}


def write_figures(run: Run, shown: list[Shown]) -> list[Path]:
    """Write losses.png, metrics.png, bland_altman.png and three subjects' pictures to RUN/figures.

    Raises:
        OSError: a file cannot be written.
    """
    folder = run.folder / "figures"
    written = []
    if run.logs:
        written.append(_save(_losses(run), folder / "losses.png"))
    if run.methods:
        written.append(_save(_metrics(run), folder / "metrics.png"))
        written.append(_save(_bland_altman(run), folder / "bland_altman.png"))
    for position, view in shown[:_PICTURES]:
        path = folder / f"differences_{position + 1:03d}.png"
        comparison_figure(panels(view), view.spacing, path, units=run.units)
        written.append(path)
    return written


def _losses(run: Run) -> Figure:
    figure = Figure(figsize=(3.4 * len(run.logs), 2.7), layout="constrained")
    axes = figure.subplots(1, len(run.logs), squeeze=False)[0]
    for axis, (title, log) in zip(axes, run.logs.items(), strict=True):
        axis.plot(
            range(1, len(log["loss"]) + 1), log["loss"], color=COLOURS["output"], linewidth=0.8
        )
        axis.set(title=title, xlabel="step", ylabel="loss")
    return figure


def _metrics(run: Run) -> Figure:
    figure = Figure(figsize=(2.6 * len(_METRICS), 2.9), layout="constrained")
    for axis, (name, label) in zip(
        figure.subplots(1, len(_METRICS)), _METRICS.items(), strict=True
    ):
        values = [[v for v in run.values(m, name) if v is not None] for m in run.methods]
        boxes = axis.boxplot(values, patch_artist=True, widths=0.55, medianprops={"color": "black"})
        for patch, method in zip(boxes["boxes"], run.methods, strict=True):
            patch.set(facecolor=_colour(method), alpha=0.55)
        axis.set_xticks(
            range(1, len(values) + 1), [title_of(m).replace(" ", "\n") for m in run.methods]
        )
        axis.tick_params(labelsize="small")
        axis.set_ylabel(label)
    return figure


def _bland_altman(run: Run) -> Figure:
    figure = Figure(figsize=(2.9 * len(run.methods), 2.9), layout="constrained")
    axes = figure.subplots(1, len(run.methods), sharey=True, squeeze=False)[0]
    for axis, method in zip(axes, run.methods, strict=True):
        pairs = run.mean_uptake(method)
        bias, spread = agreement(pairs)
        colour = _colour(method)
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.axhline(bias, color=colour)
        for sign in (-1.96, 1.96) if spread is not None else ():
            axis.axhline(bias + sign * (spread or 0.0), color=colour, linestyle="--")
        axis.scatter(
            [(o + t) / 2 for o, t in pairs],
            [percent_difference(o, t) for o, t in pairs],
            color=colour,
            s=14,
        )
        axis.set(title=title_of(method), xlabel=f"mean of output and target\n[{run.units}]")
    axes[0].set_ylabel("output - target [%]")
    return figure


def _colour(method: str) -> str:
    return COLOURS.get(method, COLOURS["output"])


def _save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=200)
    return path
