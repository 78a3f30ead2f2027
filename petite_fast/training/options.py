"""The options that several commands share: their types, their help, and what they mean."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petite_fast.errors import InputError

if TYPE_CHECKING:
    from petite_fast.training.loop import TrainSettings
    from petite_fast.training.memory import Budget
    from petite_fast.training.scans import TrainingData


class NetworkName(str, Enum):
    """The networks."""

    cvtgan = "cvtgan"
    unetr = "unetr"


class ExportFormat(str, Enum):
    """What a network can be handed over as."""

    state_dict = "state-dict"
    monai_bundle = "monai-bundle"


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


class MemoryMode(str, Enum):
    """How activations are kept for the backward pass; see `get_peft_model`."""

    exact = "exact"
    int8 = "int8"
    checkpoint = "checkpoint"


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
Recipe = Annotated[
    str,
    typer.Option(
        help="What trains: petite, full, one method, or ENCODER+DECODER; "
        "petite-fast info --recipes lists them."
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="Prompts of the encoder's stages; default: 0,8,32 (CVT-GAN) or 50 (UNETR).",
    ),
]
Widths = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C,D",
        help="CVT-GAN: channels of the four resolutions; default: 64,128,256,512.",
    ),
]
DemoOut = Annotated[
    Path, typer.Option("--out", help="Folder for data, runs, picture and summary.json.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="A smoke test: few steps, no claim about the result.")
]
ListRecipes = Annotated[
    bool, typer.Option("--recipes", help="List the recipes and what they train instead.")
]
ListedNetwork = Annotated[
    NetworkName | None, typer.Option(help="With --recipes: this network's only.")
]
MemoryOf = Annotated[
    NetworkName | None,
    typer.Option("--memory", help="What a step of finetune with this network takes instead."),
]
ExplainOf = Annotated[
    NetworkName | None,
    typer.Option(
        "--explain", help="Which backend runs each op of such a step here, and why, instead."
    ),
]
StepPatch = Annotated[
    str, typer.Option("--patch", metavar="X,Y,Z", help="Patch in voxels, multiples of 16.")
]
MemoryOption = Annotated[
    MemoryMode,
    typer.Option(help="How activations are kept: exact, in 8 bits, or computed again."),
]
ChosenBatch = Annotated[
    int | None,
    typer.Option("--batch", help="Patches per step; default: 8, or what the budget allows."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="SIZE", help="Memory for the training: 8GiB, 8GB, 8000MB."),
]
Base = Annotated[Path, typer.Option(help="Base network: a run folder or a published .pt file.")]
Adapter = Annotated[Path | None, typer.Option(help="Adapter folder, from finetune.")]


def examples(*lines: str) -> str:
    """The epilogue of a command's help: command lines without "petite-fast"."""
    return "\n\n".join(["Examples:", *(f"petite-fast {line}" for line in lines)])


def training_data(
    data: Path, fold: int | None, patch: str | None, normalisation: Normalisation | None
) -> TrainingData:
    """Which scans, as the options say."""
    from petite_fast.training.scans import TrainingData

    return TrainingData(
        json=data,
        fold=fold,
        patch=numbers("--patch", patch, 3) if patch else None,
        normalisation=normalisation.value if normalisation else None,
    )


def train_settings(
    out: Path,
    steps: int,
    batch: int | None,
    lr: float,
    precision: Precision,
    seed: int,
    save_every: int,
    resume: str,
) -> TrainSettings:
    """How to train, as the options say; without a batch it is 8."""
    from petite_fast.training.loop import TrainSettings

    return TrainSettings(
        out=out,
        steps=steps,
        batch=8 if batch is None else batch,
        lr=lr,
        precision=precision.value,
        seed=seed,
        save_every=save_every,
        resume=resume if resume in ("auto", "never") else Path(resume),  # type: ignore[arg-type]
    )


def numbers(option: str, text: str, count: int | None = None) -> list[int]:
    """Comma-separated whole numbers, `count` of them.

    Raises:
        InputError: something else.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or (count and len(values) != count):
        wanted = f"{count} whole numbers" if count else "whole numbers"
        raise InputError(f"{option} is {text!r}; expected {wanted}, comma-separated")
    return values


def size_in_bytes(option: str, text: str) -> int:
    """A size such as 8GiB, 8GB, 7.5GB or 8000MB in bytes.

    Raises:
        InputError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]i?B)", text)
    if not match or not float(match[1]):
        raise InputError(f"{option} is {text!r}; expected a size such as 8GiB, 8GB or 8000MB")
    base = 1024 if "i" in match[2] else 1000
    return int(float(match[1]) * base ** ("kMGT".index(match[2][0]) + 1))


def memory_budget(text: str | None, batch: int | None) -> Budget | None:
    """The memory that --budget names, and the batch that --batch does."""
    from petite_fast.training.memory import Budget

    return None if text is None else Budget(size_in_bytes("--budget", text), batch)


def device_name(name: str) -> str:
    """A device that is there; "auto" is the GPU where there is one.

    Raises:
        InputError: no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device is {name!r}, and PyTorch finds no GPU here")
    return name
