"""The options that several commands share: their types and their help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Recipe(str, Enum):
    """What trains."""

    petite = "petite"
    bitfit = "bitfit"
    full = "full"


class Precision(str, Enum):
    """Arithmetic of the training step."""

    full = "32-true"
    bf16 = "bf16-mixed"
    fp16 = "16-mixed"


class Normalisation(str, Enum):
    """How intensities are scaled."""

    paired = "paired"
    petite = "petite"


class Denominator(str, Enum):
    """Denominators of NRMSE."""

    range = "range"
    mean = "mean"
    std = "std"


class Split(str, Enum):
    """Halves of a fold."""

    training = "training"
    validation = "validation"


Data = Annotated[Path, typer.Option(help="Dataset JSON (decathlon style, as simulate writes).")]
Fold = Annotated[int | None, typer.Option(help="Fold of the JSON; without it every pair.")]
Out = Annotated[Path, typer.Option(help="Run folder.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
Batch = Annotated[int, typer.Option(help="Patches per step.")]
PatchSize = Annotated[
    str | None,
    typer.Option("--patch", metavar="X,Y,Z", help="Patch in voxels, multiples of 16; "
                 "default: the dataset's roi."),
]  # fmt: skip
Rate = Annotated[float, typer.Option("--lr", help="AdamW's learning rate at the start.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Arithmetic.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; the newest two stay.")]
Resume = Annotated[
    str, typer.Option(help="auto (newest checkpoint in --out), never, or a checkpoint folder.")
]
NormalisationOption = Annotated[
    Normalisation | None,
    typer.Option("--normalisation", help="paired keeps units (default); petite is as published."),
]
Base = Annotated[Path, typer.Option(help="Base network: a run folder or a published .pt file.")]
Adapter = Annotated[Path | None, typer.Option(help="Adapter folder, from finetune.")]
