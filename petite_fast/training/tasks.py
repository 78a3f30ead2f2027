"""Pretrain a base network on one scanner, adapt it to another, merge: the work behind the CLI.

A run folder holds its result directly, beside log.csv, tensorboard/ and checkpoints/:

    pretrain, finetune --recipe full     a base network (network.json, *.safetensors)
    finetune, any other recipe           an adapter (adapter_config.json, adapter_model.safetensors)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from petite_fast.data import Normaliser, PatchDataset
from petite_fast.errors import InputError
from petite_fast.models import (
    CVTGANDiscriminator,
    LoadedNetwork,
    build_network,
    load_network,
    save_network,
)
from petite_fast.models.checkpoints import added_parameters, bare_copy
from petite_fast.models.published import Network
from petite_fast.peft import (
    AdapterConfig,
    MixConfig,
    PeftModel,
    PromptConfig,
    get_peft_model,
    read_information,
)
from petite_fast.peft.config import AnyConfig
from petite_fast.peft.export import export_bundle, export_state_dict
from petite_fast.peft.io import state_sha256
from petite_fast.peft.lean import Memory
from petite_fast.peft.mix import recipe as recipe_config
from petite_fast.training.inference import Reconstructor
from petite_fast.training.loop import TrainReport, TrainSettings, train
from petite_fast.training.memory import Budget
from petite_fast.training.objectives import GANObjective, L1Objective, MSEObjective, Objective
from petite_fast.training.provenance import provenance
from petite_fast.training.scans import DEFAULT_PATCH, TrainingData


def pretrain(
    data: TrainingData,
    settings: TrainSettings,
    *,
    network: Network = "cvtgan",
    sizes: Mapping[str, Any] | None = None,
) -> TrainReport:
    """Train a network from random weights; the base network is in settings.out.

    A CVT-GAN has the GAN objective, and both of its networks train. A UNETR has mean squared error,
    and position embeddings for the patch of the training.

    Args:
        data: scans of the first scanner.
        settings: how to train.
        network: "cvtgan" or "unetr".
        sizes: keyword arguments of the network that are not its defaults, such as CVT-GAN's widths.

    Raises:
        InputError: the data, the sizes or the settings cannot be used; see also `train`.
        TrainingInterrupted, OSError: see `train`.
    """
    normalisation = data.normalisation or "paired"
    samples = data.open(settings.seed, normalisation)
    sizes = dict(sizes or {})
    if network == "cvtgan":
        _check_batch_norm(settings.batch, samples.patch)
    else:
        sizes = {"img_size": samples.patch, **sizes}
    torch.manual_seed(settings.seed)
    try:
        generator = build_network(network, **sizes)
    except ValueError as error:
        raise InputError(f"no {network} of these sizes: {error}") from error
    discriminator = CVTGANDiscriminator() if network == "cvtgan" else None
    objective: Objective = MSEObjective()
    if discriminator is not None:
        objective = GANObjective(discriminator, train_discriminator=True)
    metadata = _metadata(data, samples, settings, normalisation)
    report = train(
        generator,
        objective,
        samples,
        settings,
        config={
            "task": "pretrain",
            "network": network,
            "sizes": generator.config,
            **metadata,
            **_subjects(samples),
        },
        title="pretrain",
    )
    if discriminator is not None:
        discriminator.cpu()
    save_network(settings.out, generator.cpu(), discriminator, **metadata)
    return report


def finetune(
    base: Path,
    data: TrainingData,
    settings: TrainSettings,
    *,
    recipe: str = "petite",
    rank: int = 8,
    num_prompts: Sequence[int] | None = None,
    memory: Memory = "exact",
    budget: Budget | None = None,
) -> TrainReport:
    """Adapt the base network to the scanner of `data`; the result is in settings.out.

    The discriminator of the base, if it has one, judges but does not train, in every recipe:
    PETITE does so, and one objective for all makes recipes comparable (the published full
    fine-tuning trains the discriminator too).

    Args:
        base: base network, a folder or a published .pt file.
        data: scans of the new scanner.
        settings: how to train.
        recipe: one of `petite_fast.peft.mix.recipes`.
        rank: LoRA rank; lora_alpha is twice that, as published.
        num_prompts: prompts of the encoder's stages; None is the network's own number.
        memory: how activations are kept for the backward pass; see `get_peft_model`.
        budget: memory that the training may take: it chooses the patch, if `data` has none, and
            the batch in the place of `settings.batch`. What it chose is logged.

    Raises:
        InputError: the base, the data, the recipe or the settings cannot be used, or the budget has
            no room for them; see also `train`.
        TrainingInterrupted, OSError: see `train`.
    """
    loaded = load_network(base)
    normalisation = data.normalisation or loaded.metadata.get("normalisation", "paired")
    networks = [net for net in (loaded.generator, loaded.discriminator) if net is not None]
    hashes = [state_sha256(net.state_dict()) for net in networks]
    from_base = {name for name, _ in loaded.generator.named_parameters()}
    torch.manual_seed(settings.seed)  # the random start of adapters
    generator = adapted(
        loaded.generator, loaded.network, recipe, rank=rank, num_prompts=num_prompts, memory=memory
    )
    objective = finetune_objective(loaded)
    trained_norms = recipe == "full" and loaded.network == "cvtgan"
    if budget is not None:
        if trained_norms and data.patch and budget.batch:
            _check_batch_norm(budget.batch, data.patch)
        patch, batch = budget.choose(
            generator,
            data.patch,
            precision=settings.precision,
            objective=objective,
            smallest=48 if trained_norms and budget.batch == 1 else 16,
            largest=data.shortest_side(),
            smallest_batch=2 if trained_norms else 1,
        )
        data, settings = replace(data, patch=patch), replace(settings, batch=batch)
    samples = data.open(settings.seed, normalisation)
    if trained_norms:
        _check_batch_norm(settings.batch, samples.patch)
    metadata = _metadata(data, samples, settings, normalisation)
    config = {
        "task": "finetune",
        "recipe": recipe,
        "base": hashes,
        **metadata,
        **_subjects(samples),
    }
    if recipe != "full":
        config |= {"rank": rank, "num_prompts": num_prompts and list(num_prompts)}
    if memory == "int8":  # the others give the same result
        config["memory"] = memory
    known = from_base & {name for name, p in generator.named_parameters() if not p.requires_grad}
    report = train(
        generator,
        objective,
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

    LoRA and SSF become part of the weights, exactly; biases and norms are. Prompts and bottleneck
    adapters are no function of the weights and cannot: with them, `out` holds the folded network in
    ``out/base`` and the rest as an adapter of it beside that, and `load_reconstructor` takes `out`
    as one base.

    Returns:
        Whether something stayed.

    Raises:
        InputError: base or adapter cannot be read, or do not belong together.
        OSError: `out` cannot be written.
    """
    loaded = load_network(base)
    model = PeftModel.from_pretrained(loaded.generator, adapter)
    config, information = read_information(adapter)
    metadata = loaded.metadata | _told(information)
    rest = _cannot_be_folded(config)
    merged: Any = model.merge_and_unload()
    if rest is None:
        save_network(out, merged, loaded.discriminator, **metadata)
        return False
    plain = bare_copy(merged)
    save_network(out / "base", plain, loaded.discriminator, **metadata)
    model = get_peft_model(plain, rest)
    model.load_state_dict(merged.state_dict())
    model.save_pretrained(out, metadata=metadata)
    return True


def export(base: Path, adapter: Path | None, out: Path, form: str) -> None:
    """Hand a network, with an adapter merged into it, to other software.

    Args:
        base: base network, a folder or a published .pt file.
        adapter: folder of an adapter, or None.
        out: "state-dict": a file, .safetensors or .pt; "monai-bundle": the bundle's folder.
        form: one of these two.

    Raises:
        InputError: base or adapter cannot be read, do not belong together, or have what cannot be
            folded; `out` has another ending, or is no name for a bundle.
        OSError: `out` cannot be written.
    """
    network, loaded, metadata = _load(base, adapter)
    plain: Any = network.merge_and_unload() if isinstance(network, PeftModel) else network
    if form == "state-dict":
        export_state_dict(plain, out)
        return
    patch = list(_patch(loaded, metadata))
    said: dict[str, Any] = {
        key: metadata[key] for key in ("scanner", "normalisation") if key in metadata
    }
    export_bundle(
        plain,
        out.parent,
        out.name,
        network_config=_description(plain, patch),
        metadata={"patch": patch, **said},
    )


def load_reconstructor(
    base: Path, adapter: Path | None = None, device: str = "cpu"
) -> Reconstructor:
    """The network of a base (also a merged one) with or without an adapter, ready for scans.

    Patch and normalisation are those of the adapter's training, else of the base's.

    Raises:
        InputError: base or adapter cannot be read, or do not belong together.
    """
    network, loaded, metadata = _load(base, adapter)
    return Reconstructor(
        network.to(device).eval(),
        _patch(loaded, metadata),
        Normaliser(metadata.get("normalisation", "paired")),
        provenance(network, metadata),
    )


def adapted(
    generator: torch.nn.Module,
    network: str,
    recipe: str,
    *,
    rank: int = 8,
    num_prompts: Sequence[int] | None = None,
    memory: Memory = "exact",
) -> Any:
    """`generator`, in place, with what `recipe` trains switched on and the rest frozen.

    Raises:
        InputError: no such recipe for this network, rank or num_prompts is out of range, or a
            memory mode other than "exact" for "full", which makes no layer lean.
    """
    if recipe == "full":
        if memory != "exact":
            raise InputError(
                f"memory is {memory!r}, expected 'exact': recipe full trains torch's own layers"
            )
        return generator.requires_grad_(True)
    config = recipe_config(network, recipe, r=rank, num_prompts=num_prompts)
    return get_peft_model(generator, config, memory=memory)


def finetune_objective(loaded: LoadedNetwork) -> Objective:
    """The base's own objective, a discriminator frozen; L1 for a CVT-GAN without one."""
    if loaded.network == "unetr":
        return MSEObjective()
    if loaded.discriminator is None:
        return L1Objective()
    return GANObjective(loaded.discriminator, train_discriminator=False)


def _load(
    base: Path, adapter: Path | None
) -> tuple[torch.nn.Module, LoadedNetwork, dict[str, Any]]:
    """The network, adapted if there is an adapter; what was loaded; what is said of both."""
    if adapter is None and (base / "base").is_dir() and (base / "adapter_config.json").is_file():
        base, adapter = base / "base", base
    loaded = load_network(base)
    if adapter is None:
        return loaded.generator, loaded, loaded.metadata
    network = PeftModel.from_pretrained(loaded.generator, adapter)
    _, information = read_information(adapter)
    return network, loaded, loaded.metadata | _told(information)


def _told(information: dict[str, Any]) -> dict[str, Any]:
    """What an adapter file says about its training."""
    told: dict[str, Any] = {key: information[key] for key in ("scanner", "normalisation")}
    told |= information["metadata"] or {}
    return {key: value for key, value in told.items() if value is not None}


def _patch(loaded: LoadedNetwork, metadata: dict[str, Any]) -> tuple[int, int, int]:
    """The patch of the training; without a record of it the one that a UNETR is made for."""
    default = loaded.generator.config.get("img_size", DEFAULT_PATCH)
    return tuple(metadata.get("patch", default))


def _cannot_be_folded(config: AnyConfig) -> AnyConfig | None:
    """The part of `config` that `merge_and_unload` leaves in the network; None without any."""
    stays = (PromptConfig, AdapterConfig)
    if not isinstance(config, MixConfig):
        return config if isinstance(config, stays) else None
    halves = {"encoder": config.encoder, "decoder": config.decoder}
    kept: dict[str, Any] = {
        side: part if isinstance(part, stays) else None for side, part in halves.items()
    }
    return replace(config, bitfit=False, **kept) if any(kept.values()) else None


def _description(network: Any, patch: list[int]) -> dict[str, Any]:
    """How MONAI's ConfigParser builds `network`; by MONAI's own class where that is enough."""
    added, config = added_parameters(network), network.config
    if added:
        build = "petite_fast.models.build_network"
        return {"_target_": build, "network": network.network, "added": added, **config}
    if network.network == "unetr" and config["img_size"] == patch:
        return {"_target_": "monai.networks.nets.UNETR", **config}
    name = "UNETR" if network.network == "unetr" else "CVTGANGenerator"
    return {"_target_": f"petite_fast.models.{name}", **config}


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
