"""Pretrain a base network on one scanner, adapt it to another, merge: the work behind the CLI.

A run folder holds its result directly, beside log.csv, tensorboard/ and checkpoints/:

    pretrain, finetune --recipe full     a base network (network.json, *.safetensors)
    finetune, any other recipe           an adapter (adapter_config.json, adapter_model.safetensors)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from petite_fast.data import Normaliser, PatchDataset, read_datalist
from petite_fast.errors import InputError
from petite_fast.models import (
    CVTGANDiscriminator,
    CVTGANGenerator,
    LoadedNetwork,
    load_network,
    save_network,
)
from petite_fast.peft import (
    BitFitConfig,
    PeftModel,
    PromptConfig,
    get_peft_model,
    petite_recipe,
    read_information,
)
from petite_fast.peft.io import state_sha256
from petite_fast.training.inference import Reconstructor
from petite_fast.training.loop import TrainReport, TrainSettings, train
from petite_fast.training.objectives import GANObjective, L1Objective, Objective

Recipe = Literal["petite", "bitfit", "full"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
DEFAULT_PATCH = (64, 64, 64)
DEFAULT_WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class TrainingData:
    """Which scans to train on, and how to cut and scale them.

    Attributes:
        json: dataset JSON; see `read_datalist`.
        fold: one of its folds (its training half); None takes every pair.
        patch: sides in voxels, multiples of 16; None is the JSON's "roi", else 64 x 64 x 64.
        normalisation: "paired", "petite", or None for the base network's (paired without one).
    """

    json: Path
    fold: int | None = None
    patch: Sequence[int] | None = None
    normalisation: str | None = None

    def description(self) -> dict[str, Any]:
        """The top level of the JSON file ("scanner", "roi", ...)."""
        return json.loads(self.json.read_text(encoding="utf-8"))

    def open(self, seed: int, normalisation: str) -> PatchDataset:
        """The training patches.

        Raises:
            InputError: the JSON or a file in it cannot be used, or the patch does not fit.
        """
        pairs = read_datalist(self.json, self.fold, "training")
        patch = tuple(self.patch or self.description().get("roi") or DEFAULT_PATCH)
        if len(patch) != 3 or any(side < 16 or side % 16 for side in patch):
            raise InputError(
                f"the patch is {'x'.join(map(str, patch))}; expected three multiples of 16"
            )
        return PatchDataset(
            pairs,
            patch,
            normaliser=Normaliser(normalisation),  # type: ignore[arg-type]
            seed=seed,
        )


def pretrain(
    data: TrainingData, settings: TrainSettings, *, widths: Sequence[int] = DEFAULT_WIDTHS
) -> TrainReport:
    """Train a CVT-GAN (both networks) from random weights; the base network is in settings.out.

    Raises:
        InputError: the data, the widths or the settings cannot be used; see also `train`.
        TrainingInterrupted, OSError: see `train`.
    """
    normalisation = data.normalisation or "paired"
    samples = data.open(settings.seed, normalisation)
    _check_batch_norm(settings.batch, samples.patch)
    torch.manual_seed(settings.seed)
    try:
        generator = CVTGANGenerator(tuple(widths))
    except ValueError as error:
        raise InputError(f"--widths {','.join(map(str, widths))}: {error}") from error
    discriminator = CVTGANDiscriminator()
    metadata = _metadata(data, samples, settings, normalisation)
    report = train(
        generator,
        GANObjective(discriminator, train_discriminator=True),
        samples,
        settings,
        config={"task": "pretrain", "widths": list(widths), **metadata, **_subjects(samples)},
        title="pretrain",
    )
    save_network(settings.out, generator.cpu(), discriminator.cpu(), **metadata)
    return report


def finetune(
    base: Path,
    data: TrainingData,
    settings: TrainSettings,
    *,
    recipe: Recipe = "petite",
    rank: int = 8,
    num_prompts: Sequence[int] = (0, 8, 32),
) -> TrainReport:
    """Adapt the base network to the scanner of `data`; the result is in settings.out.

    The discriminator of the base, if it has one, judges but does not train, in every recipe:
    PETITE does so, and one objective for all makes recipes comparable (the published full
    fine-tuning trains the discriminator too).

    Args:
        base: base network, a folder or a published .pt file.
        data: scans of the new scanner.
        settings: how to train.
        recipe: "petite" (encoder prompts, decoder LoRA, biases), "bitfit" (biases) or "full".
        rank: LoRA rank of "petite"; lora_alpha is twice that, as published.
        num_prompts: prompts of the three encoder stages in "petite".

    Raises:
        InputError: the base, the data or the settings cannot be used; see also `train`.
        TrainingInterrupted, OSError: see `train`.
    """
    loaded = load_network(base)
    normalisation = data.normalisation or loaded.metadata.get("normalisation", "paired")
    samples = data.open(settings.seed, normalisation)
    metadata = _metadata(data, samples, settings, normalisation)
    networks = [net for net in (loaded.generator, loaded.discriminator) if net is not None]
    config = {
        "task": "finetune",
        "recipe": recipe,
        "base": [state_sha256(net.state_dict()) for net in networks],
        **metadata,
        **_subjects(samples),
    }
    if recipe == "petite":
        config |= {"rank": rank, "num_prompts": list(num_prompts)}
    if recipe == "full":
        _check_batch_norm(settings.batch, samples.patch)
    torch.manual_seed(settings.seed)  # LoRA's random start
    from_base = {name for name, _ in loaded.generator.named_parameters()}
    generator = adapted(loaded.generator, recipe, rank=rank, num_prompts=num_prompts)
    known = from_base & {name for name, p in generator.named_parameters() if not p.requires_grad}
    report = train(
        generator,
        finetune_objective(loaded),
        samples,
        settings,
        config=config,
        known=known,
        title=f"finetune ({recipe})",
    )
    generator.cpu()
    if recipe == "full":
        discriminator = loaded.discriminator.cpu() if loaded.discriminator else None
        save_network(settings.out, generator, discriminator, recipe=recipe, **metadata)
    else:
        generator.save_pretrained(settings.out, metadata={"recipe": recipe, **metadata})
    return report


def merge(base: Path, adapter: Path, out: Path) -> bool:
    """Fold an adapter into its base network; the merged base network is in `out`.

    LoRA and biases become part of the weights, exactly. Channel prompts depend on the patch and
    cannot: with them, `out` holds the folded network in ``out/base`` and the prompts as an adapter
    of it beside that, and `load_reconstructor` takes `out` as one base.

    Returns:
        Whether prompts stayed.

    Raises:
        InputError: base or adapter cannot be read, or do not belong together.
        OSError: `out` cannot be written.
    """
    loaded = load_network(base)
    model = PeftModel.from_pretrained(loaded.generator, adapter)
    _, information = read_information(adapter)
    told = {k: information[k] for k in ("scanner", "normalisation")} | information["metadata"]
    merged = model.merge_and_unload()
    prompts = {name: stage.prompt for name, stage in merged.named_modules() if _prompted(stage)}
    for name in prompts:
        merged.get_submodule(name).prompt = None  # type: ignore[assignment]
    metadata = loaded.metadata | told
    folder = out / "base" if prompts else out
    save_network(folder, merged, loaded.discriminator, **metadata)  # type: ignore[arg-type]
    if prompts:
        counts = {re.escape(name): prompt.num_prompts for name, prompt in prompts.items()}
        model = get_peft_model(merged, PromptConfig(counts))
        for name, prompt in prompts.items():
            stage = model.get_submodule(name)
            stage.prompt.load_state_dict(prompt.state_dict())  # type: ignore[union-attr]
        model.save_pretrained(out, metadata=metadata)
    return bool(prompts)


def load_reconstructor(
    base: Path, adapter: Path | None = None, device: str = "cpu"
) -> Reconstructor:
    """The network of a base (also a merged one) with or without an adapter, ready for scans.

    Patch and normalisation are those of the adapter's training, else of the base's.

    Raises:
        InputError: base or adapter cannot be read, or do not belong together.
    """
    if adapter is None and (base / "base").is_dir() and (base / "adapter_config.json").is_file():
        base, adapter = base / "base", base
    loaded = load_network(base)
    network: torch.nn.Module = loaded.generator
    metadata = loaded.metadata
    if adapter is not None:
        network = PeftModel.from_pretrained(network, adapter)
        _, information = read_information(adapter)
        own = {"normalisation": information["normalisation"], **(information["metadata"] or {})}
        metadata = metadata | {k: v for k, v in own.items() if v is not None}
    return Reconstructor(
        network.to(device).eval(),
        tuple(metadata.get("patch", DEFAULT_PATCH)),
        Normaliser(metadata.get("normalisation", "paired")),
    )


def _prompted(module: torch.nn.Module) -> bool:
    return hasattr(module, "make_prompt") and module.prompt is not None


def adapted(
    generator: torch.nn.Module, recipe: Recipe, *, rank: int, num_prompts: Sequence[int]
) -> Any:
    """`generator`, in place, with what `recipe` trains switched on and the rest frozen.

    Raises:
        InputError: rank or num_prompts is out of range.
    """
    if recipe == "full":
        return generator.requires_grad_(True)
    if recipe == "bitfit":
        return get_peft_model(generator, BitFitConfig())
    config = petite_recipe("cvtgan", r=rank, lora_alpha=2 * rank, num_prompts=tuple(num_prompts))
    return get_peft_model(generator, config)


def finetune_objective(loaded: LoadedNetwork) -> Objective:
    """The GAN objective with the base's discriminator frozen, or L1 where there is none."""
    if loaded.discriminator is None:
        return L1Objective()
    return GANObjective(loaded.discriminator, train_discriminator=False)


def _metadata(
    data: TrainingData, samples: PatchDataset, settings: TrainSettings, normalisation: str
) -> dict[str, Any]:
    """What whoever uses the result must know."""
    return {
        "scanner": str(data.description().get("scanner", "unknown")),
        "normalisation": normalisation,
        "patch": list(samples.patch),
        "seed": settings.seed,
    }


def _subjects(samples: PatchDataset) -> dict[str, Any]:
    return {"subjects": [pair.subject for pair in samples.pairs]}


def _check_batch_norm(batch: int, patch: Sequence[int]) -> None:
    """BatchNorm needs two values per channel where the network is coarsest (keys of stage 3)."""
    if batch * math.prod(math.ceil(side / 32) for side in patch) < 2:
        raise InputError(
            f"--batch {batch} with patch {'x'.join(map(str, patch))} leaves one value per channel "
            "for BatchNorm; use a batch of at least 2 or a patch with a side above 32"
        )
