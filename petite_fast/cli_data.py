"""The commands about data sets: validate and convert."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from petite_fast.training.options import examples

commands = typer.Typer(rich_markup_mode="rich")
_out = Console(soft_wrap=True, highlight=False, markup=False)
DataSet = Annotated[
    Path, typer.Argument(help="Dataset JSON (decathlon), BIDS-PET tree or nnU-Net raw folder.")
]


class LayoutName(str, Enum):
    """What a data set can be written as."""

    bids = "bids"
    decathlon = "decathlon"
    nnunet = "nnunet"


@commands.command(epilog=examples("validate data/63/dataset.json", "validate bids"))
def validate(data: DataSet) -> None:
    """List everything that is wrong with a data set, before a GPU is held; exit code 1 if it is."""
    from petite_fast.data.validate import validate as run

    collection, problems = run(data)
    for problem in problems:
        _out.print(f"{'problem' if problem.fatal else 'note'}: {problem}")
    fatal = sum(problem.fatal for problem in problems)
    splits = collection.splits
    subjects = {case.subject for case in collection.cases}
    _out.print(
        f"{collection.layout}: {len(collection.cases)} cases of {len(subjects)} subjects,"
        f" {len(splits.folds)} folds, {len(splits.test)} subjects in the test;"
        f" {fatal or 'no'} {'problem' if fatal == 1 else 'problems'}"
    )
    if fatal:
        raise typer.Exit(1)


@commands.command(
    epilog=examples(
        "convert bids data/63 --to decathlon",
        "convert data/63/dataset.json bids --to bids",
        "convert bids nnUNet_raw/Dataset001_PET --to nnunet --seed 1",
    )
)
def convert(
    data: DataSet,
    out: Annotated[Path, typer.Argument(help="Folder, empty or not there.")],
    to: Annotated[LayoutName, typer.Option("--to", help="Layout to write.")],
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Split the subjects anew; default: as they are, else seed 0."),
    ] = None,
) -> None:
    """Write a data set in another layout; what may identify a patient stays behind."""
    from petite_fast.data.convert import convert as run

    for remark in run(data, out, to.value, seed):
        _out.print(remark)
    _out.print(f"{to.value}: {out}")
