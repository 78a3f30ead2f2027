"""The commands that judge reconstructions: evaluate and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from petite_fast.errors import InputError
from petite_fast.training.options import Denominator, Fold, Split, examples

commands = typer.Typer(rich_markup_mode="rich")
_out = Console()


@commands.command(
    epilog=examples(
        "evaluate out --data data/63/dataset.json --fold 0 --out runs/63",
        "evaluate out/scan_desc-petite.nii.gz --target standard.nii.gz --nrmse mean",
        "evaluate out/scan_desc-petite.nii.gz --target standard.nii.gz --mask lesion.nii.gz",
    )
)
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder from reconstruct, or one NIfTI.")],
    data: Annotated[Path | None, typer.Option(help="Data set, with a folder.")] = None,
    target: Annotated[Path | None, typer.Option(help="Standard scan, with one NIfTI.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Region for SUV: a NIfTI, or a folder of them named as the targets."),
    ] = None,
    fold: Fold = None,
    split: Annotated[Split, typer.Option(help="Which subjects.")] = Split.validation,
    nrmse: Annotated[Denominator, typer.Option(help="Denominator.")] = Denominator.range,
    published: Annotated[
        bool, typer.Option("--published", help="The paper's formulas on min-max scaled volumes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder for petite-fast report, or a .json file.")
    ] = None,
) -> None:
    """PSNR, SSIM, NRMSE and SUV bias against the standard scans, per subject and overall."""
    from petite_fast.data import read_pairs
    from petite_fast.files import write_json
    from petite_fast.training.evaluate import Comparison, find_predictions
    from petite_fast.training.evaluate import evaluate as run
    from petite_fast.training.record import INPUT, record
    from petite_fast.training.tables import evaluation_table

    methods = {}
    if target is not None and data is None:
        methods["output"] = [Comparison("scan", predictions, target, mask)]
    elif data is not None and target is None:
        pairs = read_pairs(data, fold, split.value)
        found = find_predictions(pairs, predictions, mask)
        methods[INPUT] = [c._replace(prediction=p.image) for c, p in zip(found, pairs, strict=True)]
        methods["output"] = found
    else:
        raise InputError("evaluate needs either --data (with a folder) or --target (with a file)")
    if out is None or out.suffix == ".json":
        report = run(methods["output"], denominator=nrmse.value, published=published)
        if out is not None:
            write_json(out, report)
    elif published:
        raise InputError(f"--published goes with --out FILE.json; --out is the folder {out}")
    else:
        report = record(out, methods, denominator=nrmse.value)["output"]
    _out.print(evaluation_table(report))


@commands.command(
    epilog=examples("report runs/demo", "report runs/63 --out 63.html", "report runs/63 --keep-ids")
)
def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of demo, pretrain, finetune, evaluate --out.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; default: report.html in the run folder.")
    ] = None,
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids", help="Subjects by the dataset's names, not sub-001 ...")
    ] = False,
) -> None:
    """One HTML file to look at a run: numbers, plots, and a viewer of the volumes."""
    from petite_fast.report import write_report

    path = write_report(run, out, keep_ids=keep_ids)
    _out.print(f"report: {path}", soft_wrap=True, highlight=False, markup=False)
