"""The commands about data sets: pairs, validate and convert."""

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


class SuvKind(str, Enum):
    """What SUV is relative to."""

    bw = "bw"
    lbm = "lbm"
    bsa = "bsa"


@commands.command(
    epilog=examples(
        "pairs bids --out data/63 --short 2 --standard 0-5",
        "pairs dicom/*/pet --out data/63 --dose 6 --suv bw",
        "pairs standard_scans --out data/63 --dose 4 --dose 10 --dose 20 --scanner 63",
    )
)
def pairs(
    scans: Annotated[
        list[Path],
        typer.Argument(help="NIfTI, ECAT or DICOM series, folders of them, BIDS-PET trees."),
    ],
    out: Annotated[Path, typer.Option(help="Folder, empty or not there.")],
    short: Annotated[
        int | None, typer.Option(min=0, help="Frame of dynamic series that is the short scan.")
    ] = None,
    standard: Annotated[
        str | None, typer.Option(help="Frames whose mean is the standard scan; default: all.")
    ] = None,
    dose: Annotated[
        list[int] | None,
        typer.Option(help="Thin the standard scan's counts by this factor; repeat for several."),
    ] = None,
    counts: Annotated[
        float,
        typer.Option(help="With --dose: noise-equivalent counts in a voxel of mean uptake."),
    ] = 100.0,
    suv: Annotated[SuvKind | None, typer.Option(help="Write SUV; default: units as is.")] = None,
    scanner: Annotated[
        str | None, typer.Option(help="Name in the list; default: what BIDS and DICOM say.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of thinning and splits.")] = 0,
) -> None:
    """Make training pairs of frames of dynamic series, or by thinning standard scans."""
    from petite_fast.data.bids import images, is_tree
    from petite_fast.data.frames import parse_frames
    from petite_fast.data.pairs import Recipe, make_pairs
    from petite_fast.training.inference import find_inputs

    recipe = Recipe(
        short,
        None if standard is None else parse_frames(standard),
        tuple(dose or ()),
        counts,
        None if suv is None else suv.value,
        scanner,
        seed,
    )
    found = []
    for scan in scans:
        found += images(scan) if scan.is_dir() and is_tree(scan) else find_inputs(scan)
    _out.print(f"decathlon: {make_pairs(found, out, recipe)}, of {len(found)} scans")


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
