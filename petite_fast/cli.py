"""The commands: thin, each calls one function of `petite_fast.training` or `.data`.

Heavy imports happen inside a command, so that ``--help`` answers at once. What a user did wrong
(InputError) or the machine refused (OSError) is one sentence on stderr and exit code 2; Ctrl-C is
130. ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from petite_fast import cli_data, cli_report
from petite_fast.errors import InputError
from petite_fast.training.interrupt import TrainingInterrupted
from petite_fast.training.options import (
    Adapter,
    Base,
    Batch,
    BudgetOption,
    ChosenBatch,
    Data,
    DemoOut,
    ExplainOf,
    ExportFormat,
    Fold,
    ListedNetwork,
    ListRecipes,
    MemoryMode,
    MemoryOf,
    MemoryOption,
    NetworkName,
    NormalisationOption,
    Out,
    PatchSize,
    Precision,
    PrecisionOption,
    Prompts,
    Quick,
    Rate,
    Recipe,
    Resume,
    SaveEvery,
    Seed,
    Split,
    StepPatch,
    Steps,
    TuneOf,
    Widths,
    device_name,
    memory_budget,
    numbers,
    size_in_bytes,
    train_settings,
    training_data,
)
from petite_fast.training.options import examples as _examples

if TYPE_CHECKING:
    from petite_fast.training.loop import TrainReport

app = typer.Typer(
    name="petite-fast",
    help="Adapt a 3-D PET network to a new scanner by training under 1 % of its parameters.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
_state = {"debug": False}


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    _state["debug"] = debug


@app.command(
    epilog=_examples(
        "simulate --scanner 63 --subjects 12 --out data/63",
        "simulate --scanner 136 --subjects 9 --reduce 2 --out data/136",
    )
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
    _say(f"{subjects} scan pairs of scanner {scanner}: {path}")


@app.command(
    epilog=_examples(
        "pretrain --data data/136/dataset.json --fold 0 --out runs/base",
        "pretrain --data data/136/dataset.json --widths 16,32,64,128 --out runs/small",
        "pretrain --data data/136/dataset.json --network unetr --out runs/unetr",
    )
)
def pretrain(
    data: Data,
    out: Out,
    network: Annotated[NetworkName, typer.Option(help="3D CVT-GAN or UNETR.")] = NetworkName.cvtgan,
    fold: Fold = None,
    steps: Steps = 2250,
    batch: Batch = 8,
    patch: PatchSize = None,
    lr: Rate = 1e-3,
    precision: PrecisionOption = Precision.full,
    seed: Seed = 42,
    widths: Widths = None,
    normalisation: NormalisationOption = None,
    save_every: SaveEvery = 100,
    resume: Resume = "auto",
) -> None:
    """Train a base network on one scanner; --out becomes the base."""
    from petite_fast.training import tasks

    if widths is not None and network is not NetworkName.cvtgan:
        raise InputError(f"--widths is for cvtgan, and --network is {network.value}")
    report = tasks.pretrain(
        training_data(data, fold, patch, normalisation),
        train_settings(out, steps, batch, lr, precision, seed, save_every, resume),
        network=network.value,
        sizes={"widths": numbers("--widths", widths, 4)} if widths else None,
    )
    _print_report(report, f"base network: {out}")


@app.command(
    epilog=_examples(
        "finetune --base runs/base --data data/63/dataset.json --fold 0 --out runs/63",
        "finetune --base runs/base --data data/63/dataset.json --recipe full --out runs/63-full",
        "finetune --base runs/base --data data/63/dataset.json --recipe vpt+ssf --out runs/63-mix",
        "finetune --base runs/base --data data/63/dataset.json --budget 8GiB --out runs/63",
    )
)
def finetune(
    base: Base,
    data: Data,
    out: Out,
    recipe: Recipe = "petite",
    fold: Fold = None,
    steps: Steps = 900,
    batch: ChosenBatch = None,
    patch: PatchSize = None,
    lr: Rate = 1e-3,
    precision: PrecisionOption = Precision.full,
    seed: Seed = 42,
    rank: Annotated[int, typer.Option(help="LoRA rank; lora_alpha is twice that.")] = 8,
    prompts: Prompts = None,
    memory: MemoryOption = MemoryMode.exact,
    budget: BudgetOption = None,
    normalisation: NormalisationOption = None,
    save_every: SaveEvery = 100,
    resume: Resume = "auto",
) -> None:
    """Adapt a base network to another scanner; --out becomes the adapter (full: a new base)."""
    from petite_fast.training import tasks

    report = tasks.finetune(
        base,
        training_data(data, fold, patch, normalisation),
        train_settings(out, steps, batch, lr, precision, seed, save_every, resume),
        recipe=recipe,
        rank=rank,
        num_prompts=numbers("--prompts", prompts) if prompts else None,
        memory=memory.value,
        budget=memory_budget(budget, batch),
    )
    _print_report(report, f"{'network' if recipe == 'full' else 'adapter'}: {out}")


@app.command(
    epilog=_examples(
        "reconstruct scan.nii.gz --base runs/base --adapter runs/63 --out out",
        "reconstruct data/63/dataset.json --fold 0 --base runs/base --adapter runs/63 --out out",
        "reconstruct bids --base runs/base --out bids/derivatives/petite_fast",
        "reconstruct dicom_folder --base runs/base --out out --dicom",
        "reconstruct dynamic.nii.gz --frames 0 --base runs/base --out out",
    )
)
def reconstruct(
    scans: Annotated[
        Path, typer.Argument(help="NIfTI, ECAT or DICOM series, folder of them, or data set.")
    ],
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder for results; of BIDS, a derivative set.")],
    adapter: Adapter = None,
    fold: Fold = None,
    split: Annotated[Split | None, typer.Option(help="Which subjects of a data set.")] = None,
    frames: Annotated[
        str | None, typer.Option(help="Of dynamic series: the frames that are the short scan.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Write derived DICOM series as well, from DICOM.")
    ] = False,
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids", help="Keep patients' IDs in DICOM, and folders' names.")
    ] = False,
) -> None:
    """Turn short scans into standard ones, each on its own grid and in its own units."""
    from petite_fast.data.collection import find_layout, read_inputs
    from petite_fast.data.frames import parse_frames
    from petite_fast.training import inference, tasks

    chosen = None if frames is None else parse_frames(frames)
    if find_layout(scans) is None:
        inputs = inference.find_inputs(scans)
    else:
        inputs = read_inputs(scans, fold, split.value if split else None)
    names = inference.result_names(inputs, keep_ids)
    reconstructor = tasks.load_reconstructor(base, adapter, device_name(device))
    for path, name in zip(inputs, names, strict=True):
        result = reconstructor.file(path, out, name, frames=chosen, dicom=dicom, keep_ids=keep_ids)
        _say(str(result))


@app.command(
    epilog=_examples(
        "merge --base runs/base --adapter runs/63 --out runs/63-merged",
        "reconstruct scan.nii.gz --base runs/63-merged --out out",
    )
)
def merge(
    base: Base,
    adapter: Annotated[Path, typer.Option(help="Adapter folder, from finetune.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged base network.")],
) -> None:
    """Fold an adapter into its base network, exactly; the result is a --base of its own."""
    from petite_fast.training import tasks

    rest = tasks.merge(base, adapter, out)
    _say(f"merged base network: {out}")
    if rest:
        _say("Prompts and bottleneck adapters cannot be folded and stay beside the weights.")


@app.command(
    epilog=_examples(
        "export --base runs/base --adapter runs/63 --format state-dict --out 63.safetensors",
        "export --base runs/unetr --format monai-bundle --out bundles/unetr",
    )
)
def export(
    base: Base,
    form: Annotated[ExportFormat, typer.Option("--format", help="What to write.")],
    out: Annotated[Path, typer.Option(help="File (.safetensors or .pt), or the bundle's folder.")],
    adapter: Adapter = None,
) -> None:
    """Hand a network, its adapter merged, to other software: plain tensors or a MONAI bundle."""
    from petite_fast.training import tasks

    tasks.export(base, adapter, out, form.value)
    _say(f"{form.value}: {out}")


@app.command(
    epilog=_examples(
        "info",
        "info --recipes --network unetr",
        "info --memory cvtgan --patch 96,96,96 --batch 2 --recipe petite",
        "info --memory unetr --recipe lora --memory-mode int8 --budget 8GiB",
        "info --explain cvtgan --patch 64,64,64 --batch 1",
        "info --tune unetr --patch 96,96,96 --recipe lora",
    )
)
def info(
    recipes: ListRecipes = False,
    network: ListedNetwork = None,
    memory: MemoryOf = None,
    explain: ExplainOf = None,
    tune: TuneOf = None,
    patch: StepPatch = "64,64,64",
    batch: Batch = 2,
    recipe: Recipe = "petite",
    memory_mode: MemoryOption = MemoryMode.exact,
    budget: BudgetOption = None,
) -> None:
    """Versions, the native build, devices, and why a backend is not there."""
    from petite_fast.training import about, tables

    if question := memory or explain or tune:
        step = about.StepQuestion(question.value, recipe, batch, memory_mode.value)
        size = numbers("--patch", patch, 3)
        if explain is not None:
            _out.print(tables.decision_table(step.title, step.decisions(size)))
            return
        if tune is not None:
            for title, found in step.tune(size).items():
                _out.print(tables.decision_table(title, found))
            return
        _out.print(tables.memory_table(step.title, step.estimate(size)))
        if budget is not None:
            _say(step.largest(size_in_bytes("--budget", budget)))
    elif recipes:
        for each in [network] if network else list(NetworkName):
            _out.print(tables.recipe_table(each.value, about.recipe_sizes(each.value)))
    else:
        for name, value in about.describe().items():
            _say(f"{name:<16} {value}")


@app.command(epilog=_examples("demo --out runs/demo", "demo --quick --out runs/quick"))
def demo(
    out: DemoOut = Path("runs/demo"),
    quick: Quick = False,
) -> None:
    """Everything, small: two scanners, pretraining, PETITE and full fine-tuning, table, picture."""
    from petite_fast.training.demo import run_demo
    from petite_fast.training.tables import text_table

    result = run_demo(out, quick=quick, say=_say)
    _out.print(text_table(result.title, result.headings, result.rows))
    for line in result.notes:
        _say(line)


app.add_typer(cli_data.commands)
app.add_typer(cli_report.commands)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("petite_fast").setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], prog_name="petite-fast", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if _state["debug"] or not (sentence := _sentence(error)):
            raise
        _fail(sentence, 130 if isinstance(error, TrainingInterrupted) else 2)
    # typer gives a code instead of raising: 0 after --help, 130 after Ctrl-C
    sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> str:
    """One line for an error that is the user's or the machine's; "" for a bug of ours."""
    # A usage error of click, which newer versions of typer carry under another name.
    if usage := getattr(error, "format_message", None):
        return str(usage())
    if isinstance(error, (InputError, TrainingInterrupted)):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return ""


def _fail(sentence: str, code: int) -> None:
    _err.print(f"petite-fast: {' '.join(sentence.split())}")
    sys.exit(code)


def _print_report(report: TrainReport, result: str) -> None:
    from petite_fast.training.tables import report_lines

    for line in [*report_lines(report), result]:
        _say(line)


def _say(line: str) -> None:
    _out.print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    main()
