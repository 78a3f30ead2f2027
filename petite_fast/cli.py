"""The commands: thin, each calls one function of `petite_fast.training` or `.data`.

Heavy imports happen inside a command, so that ``--help`` answers at once. What a user did wrong
(InputError) or the machine refused (OSError) is one sentence on stderr and exit code 2; Ctrl-C is
130. ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import logging
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from petite_fast.errors import InputError

if TYPE_CHECKING:
    from petite_fast.training.loop import TrainReport, TrainSettings
    from petite_fast.training.tasks import TrainingData

app = typer.Typer(
    name="petite-fast",
    help="Adapt a 3-D PET network to a new scanner by training under 1 % of its parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

_EXIT_INPUT = 2
_EXIT_INTERRUPTED = 130


class _Recipe(str, Enum):
    petite = "petite"
    bitfit = "bitfit"
    full = "full"


class _Precision(str, Enum):
    full = "32-true"
    bf16 = "bf16-mixed"
    fp16 = "16-mixed"


class _Normalisation(str, Enum):
    paired = "paired"
    petite = "petite"


class _Denominator(str, Enum):
    range = "range"
    mean = "mean"
    std = "std"


class _Split(str, Enum):
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
PrecisionOption = Annotated[_Precision, typer.Option("--precision", help="Arithmetic.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; the newest two stay.")]
Resume = Annotated[
    str, typer.Option(help="auto (newest checkpoint in --out), never, or a checkpoint folder.")
]
NormalisationOption = Annotated[
    _Normalisation | None,
    typer.Option("--normalisation", help="paired keeps units (default); petite is as published."),
]
Base = Annotated[Path, typer.Option(help="Base network: a run folder or a published .pt file.")]
Adapter = Annotated[Path | None, typer.Option(help="Adapter folder, from finetune.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    _state["debug"] = debug


_state: dict[str, Any] = {"debug": False}


@app.command(
    epilog="Example:  petite-fast simulate --scanner 63 --subjects 12 --out data/63  ·  "
    "petite-fast simulate --scanner 136 --subjects 9 --reduce 2 --out data/136"
)
def simulate(
    scanner: Annotated[str, typer.Option(help="136, 192, 224, 90 or 63.")],
    out: Annotated[Path, typer.Option(help="Folder for images/, labels/ and dataset.json.")],
    subjects: Annotated[int, typer.Option(help="How many scan pairs, at least 3.")] = 9,
    seed: Annotated[int, typer.Option(help="Subject k depends on it, the scanner and k.")] = 0,
    reduce: Annotated[int, typer.Option(help="Coarser voxels by this factor.")] = 1,
) -> None:
    """Simulate paired short and standard brain scans of one scanner, without any download."""
    from petite_fast.data.simulate import simulate as run

    path = run(out, scanner, subjects, seed=seed, reduce=reduce)
    _out.print(f"{subjects} scan pairs of scanner {scanner}: {path}", soft_wrap=True)


@app.command(
    epilog="Example:  petite-fast pretrain --data data/136/dataset.json --fold 0 --out runs/base"
    "  ·  a small one:  petite-fast pretrain --data data/136/dataset.json --widths 16,32,64,128 "
    "--patch 32,32,32 --steps 500 --out runs/small"
)
def pretrain(
    data: Data,
    out: Out,
    fold: Fold = None,
    steps: Steps = 2250,
    batch: Batch = 8,
    patch: PatchSize = None,
    lr: Rate = 1e-3,
    precision: PrecisionOption = _Precision.full,
    seed: Seed = 42,
    widths: Annotated[
        str, typer.Option(metavar="A,B,C,D", help="Channels of the generator's four resolutions.")
    ] = "64,128,256,512",
    normalisation: NormalisationOption = None,
    save_every: SaveEvery = 100,
    resume: Resume = "auto",
) -> None:
    """Train a base network (3D CVT-GAN) on one scanner; --out becomes the base."""
    from petite_fast.training import tasks

    report = tasks.pretrain(
        _training_data(data, fold, patch, normalisation),
        _settings(out, steps, batch, lr, precision, seed, save_every, resume),
        widths=_numbers("--widths", widths, 4),
    )
    _print_report(report, f"base network: {out}")


@app.command(
    epilog="Example:  petite-fast finetune --base runs/base --data data/63/dataset.json --fold 0 "
    "--out runs/63  ·  all weights:  petite-fast finetune --base runs/base --recipe full "
    "--data data/63/dataset.json --out runs/63-full"
)
def finetune(
    base: Base,
    data: Data,
    out: Out,
    recipe: Annotated[
        _Recipe, typer.Option(help="petite: prompts, LoRA and biases; bitfit: biases; full: all.")
    ] = _Recipe.petite,
    fold: Fold = None,
    steps: Steps = 900,
    batch: Batch = 8,
    patch: PatchSize = None,
    lr: Rate = 1e-3,
    precision: PrecisionOption = _Precision.full,
    seed: Seed = 42,
    rank: Annotated[int, typer.Option(help="LoRA rank of petite; lora_alpha is twice that.")] = 8,
    prompts: Annotated[
        str, typer.Option(metavar="A,B,C", help="Prompts of petite's three encoder stages.")
    ] = "0,8,32",
    normalisation: NormalisationOption = None,
    save_every: SaveEvery = 100,
    resume: Resume = "auto",
) -> None:
    """Adapt a base network to another scanner; --out becomes the adapter (full: a new base)."""
    from petite_fast.training import tasks

    report = tasks.finetune(
        base,
        _training_data(data, fold, patch, normalisation),
        _settings(out, steps, batch, lr, precision, seed, save_every, resume),
        recipe=recipe.value,
        rank=rank,
        num_prompts=_numbers("--prompts", prompts, 3),
    )
    _print_report(report, f"{'network' if recipe is _Recipe.full else 'adapter'}: {out}")


@app.command(
    epilog="Example:  petite-fast reconstruct scan.nii.gz --base runs/base --adapter runs/63 "
    "--out out  ·  held-out subjects:  petite-fast reconstruct data/63/dataset.json --fold 0 "
    "--base runs/base --adapter runs/63 --out out"
)
def reconstruct(
    scans: Annotated[Path, typer.Argument(help="NIfTI file, folder of them, or dataset JSON.")],
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder for NAME_desc-petite.nii.gz.")],
    adapter: Adapter = None,
    fold: Fold = None,
    split: Annotated[_Split, typer.Option(help="Half of the JSON's fold.")] = _Split.validation,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Turn short scans into standard ones, each on its own grid and in its own units."""
    from petite_fast.training import inference, tasks

    if scans.suffix == ".json":
        from petite_fast.data import read_datalist

        inputs = [pair.image for pair in read_datalist(scans, fold, split.value)]
        inference.check_distinct(inputs)
    else:
        inputs = inference.find_inputs(scans)
    reconstructor = tasks.load_reconstructor(base, adapter, _device(device))
    for path in inputs:
        _out.print(str(reconstructor.file(path, out)), soft_wrap=True, highlight=False)


@app.command(
    epilog="Example:  petite-fast evaluate out --data data/63/dataset.json --fold 0  ·  "
    "petite-fast evaluate out/scan_desc-petite.nii.gz --target standard.nii.gz"
)
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder from reconstruct, or one NIfTI.")],
    data: Annotated[Path | None, typer.Option(help="Dataset JSON, with a folder.")] = None,
    target: Annotated[Path | None, typer.Option(help="Standard scan, with one NIfTI.")] = None,
    fold: Fold = None,
    split: Annotated[_Split, typer.Option(help="Half of the JSON's fold.")] = _Split.validation,
    nrmse: Annotated[_Denominator, typer.Option(help="Denominator.")] = _Denominator.range,
    published: Annotated[
        bool, typer.Option("--published", help="The paper's formulas on min-max scaled volumes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
) -> None:
    """PSNR, SSIM and NRMSE against the standard scans, per subject and overall."""
    from petite_fast.data import read_datalist
    from petite_fast.files import write_json
    from petite_fast.training.evaluate import Comparison, find_predictions
    from petite_fast.training.evaluate import evaluate as run

    if (data is None) == (target is None):
        raise InputError("evaluate needs either --data (with a folder) or --target (with a file)")
    if target is not None:
        comparisons = [Comparison("scan", predictions, target)]
    else:
        assert data is not None
        comparisons = find_predictions(read_datalist(data, fold, split.value), predictions)
    report = run(comparisons, denominator=nrmse.value, published=published)
    _print_evaluation(report)
    if out is not None:
        write_json(out, report)


@app.command(
    epilog="Example:  petite-fast merge --base runs/base --adapter runs/63 --out runs/63-merged"
)
def merge(
    base: Base,
    adapter: Annotated[Path, typer.Option(help="Adapter folder, from finetune.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged base network.")],
) -> None:
    """Fold an adapter into its base network, exactly; the result is a --base of its own."""
    from petite_fast.training import tasks

    prompts = tasks.merge(base, adapter, out)
    _out.print(f"merged base network: {out}", soft_wrap=True)
    if prompts:
        _out.print("Channel prompts depend on the patch and stay beside the folded weights.")


@app.command(epilog="Example:  petite-fast info")
def info() -> None:
    """Versions, the native build, devices, and why a backend is not there."""
    from petite_fast.training.about import describe

    for name, value in describe().items():
        _out.print(f"{name:<16} {value}", soft_wrap=True, highlight=False)


@app.command(
    epilog="Example:  petite-fast demo --out runs/demo"
    "  ·  petite-fast demo --quick --out runs/quick"
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs, picture and summary.json.")] = (
        Path("runs/demo")
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke test: few steps, no claim about the result.")
    ] = False,
) -> None:
    """Everything, small: two scanners, pretraining, PETITE and full fine-tuning, table, picture."""
    from petite_fast.training.demo import run_demo

    result = run_demo(out, quick=quick, say=lambda text: _out.print(text, highlight=False))
    table = Table(title="Held-out subjects of the new scanner (mean)")
    for i, heading in enumerate(result.headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in result.rows:
        table.add_row(*row)
    _out.print(table)
    for line in result.notes:
        _out.print(line, soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("petite_fast").setLevel(logging.INFO)
    try:
        app(arguments, prog_name="petite-fast", standalone_mode=False)
        sys.exit(0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort) as stop:
        _fail(str(stop) or "interrupted", _EXIT_INTERRUPTED)
    except Exception as error:
        if _state["debug"] or not (sentence := _sentence(error)):
            raise
        _fail(sentence, _EXIT_INPUT)


def _sentence(error: Exception) -> str:
    """One line for an error that is the user's or the machine's; "" for a bug of ours."""
    from click import ClickException

    if isinstance(error, ClickException):
        return error.format_message()
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return ""


def _fail(sentence: str, code: int) -> None:
    _err.print(f"petite-fast: {' '.join(sentence.split())}")
    sys.exit(code)


def _training_data(
    data: Path, fold: int | None, patch: str | None, normalisation: _Normalisation | None
) -> TrainingData:
    from petite_fast.training.tasks import TrainingData

    return TrainingData(
        json=data,
        fold=fold,
        patch=_numbers("--patch", patch, 3) if patch else None,
        normalisation=normalisation.value if normalisation else None,
    )


def _settings(
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    precision: _Precision,
    seed: int,
    save_every: int,
    resume: str,
) -> TrainSettings:
    from petite_fast.training.loop import TrainSettings

    return TrainSettings(
        out=out,
        steps=steps,
        batch=batch,
        lr=lr,
        precision=precision.value,
        seed=seed,
        save_every=save_every,
        resume=resume if resume in ("auto", "never") else Path(resume),  # type: ignore[arg-type]
    )


def _numbers(option: str, text: str, count: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise InputError(f"{option} is {text!r}; expected {count} whole numbers, comma-separated")
    return values


def _device(name: str) -> str:
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


def _print_report(report: TrainReport, result: str) -> None:
    _out.print(
        f"trained {report.trainable:,} of {report.parameters:,} parameters "
        f"({report.trainable_percent:.3f} %), {report.steps} steps",
        highlight=False,
    )
    if report.rows:
        last = report.rows[-1]
        _out.print(
            f"last loss {last['loss']:.4g} (L1 {last['l1']:.4g}), "
            f"median step {report.step_seconds:.3f} s",
            highlight=False,
        )
    _out.print(result, soft_wrap=True, highlight=False)


def _print_evaluation(report: dict[str, Any]) -> None:
    table = Table(*("subject", "PSNR [dB]", "SSIM", "NRMSE"))
    digits = {"psnr": 2, "ssim": 4, "nrmse": 4}

    def cells(values: dict[str, Any]) -> list[str]:
        return ["inf" if values[k] is None else f"{values[k]:.{n}f}" for k, n in digits.items()]

    for row in report["subjects"]:
        table.add_row(row["subject"], *cells(row))
    table.add_section()
    overall = report["overall"]
    table.add_row("mean", *cells({k: v["mean"] for k, v in overall.items()}))
    table.add_row("std", *cells({k: v["std"] or 0.0 for k, v in overall.items()}))
    _out.print(table)
    for name, definition in report["definitions"].items():
        _out.print(f"{name}: {definition}", highlight=False)


if __name__ == "__main__":
    main()
