"""The whole job, small enough for two cores: what `petite-fast demo` does.

Two simulated scanners, a base network pretrained on the first, its reconstructions of the second
("none"), PETITE and full fine-tuning on ten subjects or fewer of the second, and the three
compared on subjects that no training saw. Every number is measured in this run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from petite_fast.data import Pair, read_datalist, read_volume
from petite_fast.data.simulate import simulate
from petite_fast.files import write_json
from petite_fast.models import load_network
from petite_fast.ops import saved_bytes
from petite_fast.training import tasks
from petite_fast.training.evaluate import METRICS, Comparison, find_predictions
from petite_fast.training.figures import comparison_figure
from petite_fast.training.inference import output_path
from petite_fast.training.loop import TrainReport, TrainSettings
from petite_fast.training.record import INPUT, record
from petite_fast.training.tables import metric_cells

METHODS = ("none", "petite", "full")
_TITLES = {"none": "no tuning", "petite": "PETITE", "full": "full fine-tuning"}
_FOLD = 0


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of a demo: scanners, coarsening, subjects, steps, network."""

    source: str = "136"
    target: str = "63"
    reduce: int = 2
    source_subjects: int = 9
    target_subjects: int = 9
    pretrain_steps: int = 400
    finetune_steps: int = 200
    batch: int = 8
    patch: tuple[int, int, int] = (32, 32, 32)
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    rank: int = 4
    num_prompts: tuple[int, int, int] = (0, 2, 4)
    seed: int = 7


QUICK = DemoPlan(
    reduce=3, source_subjects=3, target_subjects=3, pretrain_steps=4, finetune_steps=4, batch=2
)


@dataclass
class DemoResult:
    """What the command prints, and `summary.json`'s content."""

    summary: dict[str, dict[str, float]]
    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def run_demo(
    out: Path, *, quick: bool = False, plan: DemoPlan | None = None, say: Callable[[str], None]
) -> DemoResult:
    """Run everything in folder `out`; writes summary.json and demo.png there.

    Args:
        out: gets data/, base/, petite/, full/, reconstructions/, evaluation/ (for `petite-fast
            report`), summary.json and demo.png.
        quick: the smallest run that touches everything; its numbers claim nothing.
        plan: other sizes.
        say: told what happens, a line at a time.

    Raises:
        InputError, OSError: see the steps.
    """
    plan = plan or (QUICK if quick else DemoPlan())
    start = time.perf_counter()

    def tell(text: str) -> None:
        say(f"[{time.perf_counter() - start:5.0f} s] {text}")

    tell(f"simulating scanners {plan.source} and {plan.target}")
    source = _simulated(out, plan, plan.source, plan.source_subjects)
    target = _simulated(out, plan, plan.target, plan.target_subjects)
    held_out = read_datalist(target.source, _FOLD, "validation")

    tell(f"pretraining on scanner {plan.source}, {plan.pretrain_steps} steps")
    base = out / "base"
    settings = TrainSettings(
        base, plan.pretrain_steps, batch=plan.batch, seed=plan.seed, resume="never"
    )
    tasks.pretrain(source, settings, sizes={"widths": plan.widths})

    reports: dict[str, TrainReport] = {}
    for method in ("petite", "full"):
        tell(f"tuning to scanner {plan.target}, {plan.finetune_steps} steps: {_TITLES[method]}")
        reports[method] = tasks.finetune(
            base,
            target,
            replace(settings, out=out / method, steps=plan.finetune_steps),
            recipe=method,
            rank=plan.rank,
            num_prompts=plan.num_prompts,
        )

    tell(f"reconstructing {len(held_out)} held-out subjects of scanner {plan.target}")
    for method in METHODS:
        _reconstruct(out, method, held_out)
    compared = {INPUT: [Comparison(p.subject, p.image, p.label) for p in held_out]} | {
        method: find_predictions(held_out, _reconstructions(out, method)) for method in METHODS
    }
    scores = {
        method: {name: report["overall"][name]["mean"] for name in METRICS}
        for method, report in record(out, compared, units="Bq/mL").items()
    }
    summary = {}
    for method in METHODS:
        report = reports.get(method)
        summary[method] = {
            **scores[method],
            # without tuning nothing trains, no step is taken and nothing is kept for backward
            "trainable_percent": report.trainable_percent if report else 0.0,
            "step_seconds": report.step_seconds if report else 0.0,
            "saved_bytes": _saved(base, method, target, plan) if report else 0,
        }
    write_json(out / "summary.json", summary)
    comparison_figure(*_panels(out, held_out[0]), out / "demo.png", units="Bq/mL")
    tell(f"wrote {out / 'summary.json'} and {out / 'demo.png'}")
    return _result(summary, scores[INPUT])


def _simulated(out: Path, plan: DemoPlan, scanner: str, subjects: int) -> tasks.TrainingData:
    folder = out / "data" / f"scanner-{scanner}"
    path = simulate(folder, scanner, subjects, seed=plan.seed, reduce=plan.reduce)
    return tasks.TrainingData(path, _FOLD, plan.patch)


def _reconstructor(out: Path, method: str) -> Any:
    base, adapter = {
        "none": (out / "base", None),
        "petite": (out / "base", out / "petite"),
        "full": (out / "full", None),
    }[method]
    return tasks.load_reconstructor(base, adapter)


def _reconstructions(out: Path, method: str) -> Path:
    return out / "reconstructions" / method


def _reconstruct(out: Path, method: str, held_out: list[Pair]) -> None:
    reconstructor = _reconstructor(out, method)
    for pair in held_out:
        reconstructor.file(pair.image, _reconstructions(out, method))


def _saved(base: Path, method: str, data: tasks.TrainingData, plan: DemoPlan) -> int:
    """Bytes that autograd keeps in the forward of one training step on one real batch."""
    loaded = load_network(base)
    generator = tasks.adapted(
        loaded.generator,
        loaded.network,
        method,
        rank=plan.rank,
        num_prompts=plan.num_prompts,
    ).train()
    objective = tasks.finetune_objective(loaded)
    samples = data.open(plan.seed, "paired")
    batch = [samples[i] for i in range(min(plan.batch, len(samples)))]
    x = torch.stack([sample["input"] for sample in batch])
    y = torch.stack([sample["target"] for sample in batch])
    return saved_bytes(lambda: objective.generator_losses(x, y, generator(x))["loss"])


def _panels(out: Path, pair: Pair) -> tuple[dict[str, np.ndarray], tuple[float, float, float]]:
    """Volumes of one held-out subject by title, the standard scan last, and their spacing."""
    standard = read_volume(pair.label)
    panels = {"short scan": read_volume(pair.image).array}
    for method in METHODS:
        path = output_path(pair.image, _reconstructions(out, method))
        panels[_TITLES[method]] = read_volume(path).array
    panels["standard scan"] = standard.array
    return panels, standard.spacing


def _result(summary: dict[str, dict[str, float]], short: dict[str, float]) -> DemoResult:
    title = "Held-out subjects of the new scanner, mean"
    headings = [
        "", "PSNR [dB]", "SSIM", "NRMSE", "trainable %", "step [ms]", "kept for backward [MB]"
    ]  # fmt: skip

    rows = [["short scan (input)", *metric_cells(short), "", "", ""]]
    for method, values in summary.items():
        cost = [
            f"{values['trainable_percent']:.2f}",
            f"{1e3 * values['step_seconds']:.0f}",
            f"{values['saved_bytes'] / 1e6:.1f}",
        ]
        if method == "none":
            cost = ["0", "-", "-"]
        rows.append([_TITLES[method], *metric_cells(values), *cost])
    none, petite, full = (summary[m] for m in METHODS)
    shares = [
        f"{name.upper()} {100 * (petite[name] - none[name]) / (full[name] - none[name]):.0f} %"
        for name in METRICS
        if full[name] != none[name]
    ]
    notes = [f"PETITE reaches this share of full fine-tuning's gain: {', '.join(shares)}."]
    return DemoResult(summary, title, headings, rows, notes)
