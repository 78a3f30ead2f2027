"""What the commands print about a training run, an evaluation or recipes, as text and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from petite_fast.ops.dispatch import Decision
from petite_fast.training.loop import TrainReport
from petite_fast.training.memory import MemoryEstimate, readable

_DIGITS = {"psnr": 2, "ssim": 4, "nrmse": 4}


def report_lines(report: TrainReport) -> list[str]:
    """How much was trained, for how long, and where the loss ended."""
    lines = [
        f"trained {report.trainable:,} of {report.parameters:,} parameters "
        f"({report.trainable_percent:.3f} %), {report.steps} steps"
    ]
    if report.rows:
        last = report.rows[-1]
        lines.append(
            f"last loss {last['loss']:.4g} (L1 {last['l1']:.4g}), "
            f"median step {report.step_seconds:.3f} s"
        )
    return lines


def evaluation_table(report: dict[str, Any]) -> Table:
    """Subjects, then their mean and standard deviation; the definitions below."""
    regions = list(report["subjects"][0].get("uptake", {}))
    table = Table(
        *("subject", "PSNR [dB]", "SSIM", "NRMSE"),
        *(f"{region}: mean, max, peak bias [%]" for region in regions),
    )
    for row in report["subjects"]:
        bias = [bias_cell(row["uptake"][region]) for region in regions]
        table.add_row(row["subject"], *metric_cells(row), *bias)
    table.add_section()
    for statistic in ("mean", "std"):
        values = {name: entry[statistic] for name, entry in report["overall"].items()}
        table.add_row(statistic, *metric_cells(values))
    table.caption = "\n".join(f"{k}: {v}" for k, v in report["definitions"].items())
    table.caption_justify = "left"
    return table


def metric_cells(values: dict[str, Any]) -> list[str]:
    """PSNR, SSIM and NRMSE as text; a PSNR that JSON could not hold is infinite."""
    return ["inf" if values[k] is None else f"{values[k]:.{n}f}" for k, n in _DIGITS.items()]


def bias_cell(region: dict[str, Any]) -> str:
    """Bias of mean, maximum and peak in percent, with sign."""
    return ", ".join(f"{region[name]['bias_percent']:+.1f}" for name in ("mean", "max", "peak"))


def recipe_table(network: str, sizes: Sequence[tuple[str, int, float]]) -> Table:
    """Recipes with the number of parameters that train and their share of the network."""
    rows = [[recipe, f"{count:,}", f"{percent:.3f}"] for recipe, count, percent in sizes]
    title = f"Recipes for {network}, full size"
    return text_table(title, ["recipe", "trainable", "% of the network"], rows)


def memory_table(title: str, estimate: MemoryEstimate) -> Table:
    """What a training step takes, part by part, and at its peak."""
    parts = [
        ("parameters", estimate.parameter_bytes),
        ("optimiser", estimate.optimiser_bytes),
        ("gradients", estimate.gradient_bytes),
        ("activations kept for backward", estimate.activation_bytes),
        ("workspace", estimate.workspace_bytes),
    ]
    size = f"patch {'x'.join(map(str, estimate.patch))}, batch {estimate.batch}"
    table = text_table(
        f"{title}: {size}", ["part", "size"], [[name, readable(n)] for name, n in parts]
    )
    table.add_section()
    table.add_row("peak of a step", readable(estimate.total))
    table.caption = "gradients, activations and workspace are not largest at the same time"
    return table


def decision_table(title: str, decisions: Mapping[Decision, int]) -> Table:
    """Which backend ran an op on which arguments, how often, and why no faster one did."""
    table = Table("op", "arguments", "calls", "backend", "why not others", title=title)
    for decision, calls in sorted(decisions.items()):
        why = "; ".join(decision.refusals)
        table.add_row(decision.op, decision.arguments, str(calls), decision.backend, why)
    return table


def text_table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    """A table of ready cells: the first column to the left, the others to the right."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
