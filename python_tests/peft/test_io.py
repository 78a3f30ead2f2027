"""Adapter files: what they hold and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft_cases import run, scramble
from torch import nn

from petite_fast import (
    AdapterConfig,
    BitFitConfig,
    LoraConfig,
    MixConfig,
    PeftModel,
    get_peft_model,
    petite_recipe,
)
from petite_fast.errors import InputError
from petite_fast.peft import read_information
from petite_fast.peft.io import state_sha256

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
LORA = LoraConfig(r=2, lora_alpha=6)


@pytest.fixture
def base(small):
    return copy.deepcopy(small)


@pytest.fixture
def saved(base, small, tmp_path):
    """(adapted network, directory that holds its adapter)."""
    model = scramble(get_peft_model(small, LORA))
    model.save_pretrained(tmp_path, {"scanner": "63", "normalisation": "paired", "epochs": 3})
    return model, tmp_path


def test_names_and_shapes_in_the_file(saved):
    model, directory = saved
    assert sorted(p.name for p in directory.iterdir()) == [CONFIG, MODEL]
    tensors = safetensors.torch.load_file(directory / MODEL)
    shapes = {k.removeprefix("base_model.model."): tuple(v.shape) for k, v in tensors.items()}
    assert shapes == {
        "stem.lora_A.weight": (2, 1, 3, 3, 3),
        "stem.lora_B.weight": (8, 2, 1, 1, 1),
        "down.lora_A.weight": (2, 8, 2, 2, 2),
        "down.lora_B.weight": (8, 2, 1, 1, 1),
        "tokens.1.lora_A.weight": (2, 8),
        "tokens.1.lora_B.weight": (8, 2),
        "up.lora_A.weight": (2, 8, 1, 1, 1),
        "up.lora_B.weight": (2, 8, 2, 2, 2),
        "head.lora_A.weight": (2, 8, 1, 1, 1),
        "head.lora_B.weight": (1, 2, 1, 1, 1),
    }
    record = json.loads((directory / CONFIG).read_text())
    assert record["peft_type"] == "LORA" and record["petite_fast"] == LORA.to_dict()
    assert record["scanner"] == "63" and record["normalisation"] == "paired"
    assert record["metadata"] == {"epochs": 3}
    assert record["base_model_sha256"] == model.base_sha256()
    assert record["base_model_class"] == "SmallNet"
    assert record["petite_fast_version"] and record["torch_version"] == torch.__version__
    config, information = read_information(directory)
    assert config == LORA and information["scanner"] == "63"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_from_pretrained(small, base, small_input, tmp_path, dropout):
    config = MixConfig(encoder=BitFitConfig(), decoder=LoraConfig(r=2, lora_dropout=dropout))
    model = scramble(get_peft_model(small, config))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, "mine")
    assert loaded is base and loaded.active_adapter == "mine"
    assert loaded.peft_config == {"mine": config}
    assert torch.equal(run(loaded, small_input), run(model, small_input))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_lora_fa_saves_its_frozen_half(small, base, small_input, tmp_path):
    model = scramble(get_peft_model(small, LoraConfig(r=2, train_a=False)))
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)  # another random A on the loading side
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(run(loaded, small_input), run(model, small_input))
    assert not loaded.stem.lora_A.requires_grad


def test_petite_round_trip(generator, patch, tmp_path):
    base = copy.deepcopy(generator)
    recipe = petite_recipe("cvtgan", r=2, num_prompts=(0, 2, 3))
    model = scramble(get_peft_model(generator, recipe))
    for module in model.modules():
        if hasattr(module, "cross_q"):
            module.cross_q.mul_(2)  # as if drawn by another version of the generator
    model.save_pretrained(tmp_path, {"scanner": "90"})
    tensors = safetensors.torch.load_file(tmp_path / MODEL)
    prefix = "base_model.model.encoder_layer2_down.0.prompt."
    assert {k.removeprefix(prefix) for k in tensors if k.startswith(prefix)} == {
        "embedding", "cross_q", "cross_k", "cross_v", "cross_mlp"
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(run(loaded, patch), run(model, patch))
    assert loaded.peft_config["default"] == recipe
    assert (
        loaded.base_sha256()
        == model.base_sha256()
        == json.loads((tmp_path / CONFIG).read_text())["base_model_sha256"]
    )


def test_load_adapter(saved, base, small_input):
    model, directory = saved
    other = get_peft_model(base, LORA)
    before = run(other, small_input)
    information = other.load_adapter(directory, "63")
    assert information["scanner"] == "63" and information["metadata"] == {"epochs": 3}
    assert other.active_adapter == "default"
    assert torch.equal(run(other, small_input), before)
    other.set_adapter("63")
    assert torch.equal(run(other, small_input), run(model, small_input))
    other.set_adapter("default")
    other.load_adapter(directory)  # new values for the active one
    assert torch.equal(run(other, small_input), run(model, small_input))


def test_the_hash_is_of_the_base_alone(small, small_input):
    plain = state_sha256(small.state_dict())
    model = scramble(get_peft_model(small, MixConfig(decoder=LoraConfig(r=2), bitfit=True)))
    assert model.base_sha256() == plain
    model.norm.num_batches_tracked += 1
    assert model.base_sha256() == plain
    with model.disable_adapter():
        assert model.base_sha256() == plain
    model.norm.running_var[0] += 1e-12
    assert model.base_sha256() != plain
    # Written down, so that files stay readable: name, dtype, shape and bytes, sorted by name.
    digest = hashlib.sha256(b"b\0torch.bfloat16\0(1,)\0\x80\x3fw\0torch.float32\0(1, 2)\0")
    digest.update(b"\0\0\x80\x3f\0\0\0\0")
    state = {"w": torch.tensor([[1.0, 0.0]]), "b": torch.ones(1, dtype=torch.bfloat16)}
    assert state_sha256(state | {"bn.num_batches_tracked": torch.tensor(3)}) == digest.hexdigest()


def test_wrong_rank_names_both(saved, base):
    _, directory = saved
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6))
    with pytest.raises(
        InputError, match=r"has r=2, lora_alpha=6, .* for LoRA on 'stem', expected r=4"
    ):
        model.load_adapter(directory)
    with pytest.raises(InputError, match="10 tensors missing|10 unexpected"):
        get_peft_model(base.merge_and_unload(), BitFitConfig()).load_adapter(directory)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (LoraConfig(r=2), LoraConfig(r=2, use_rslora=True), "use_rslora=False.* 'stem'"),
        (LoraConfig(r=2), LoraConfig(r=2, alpha_pattern={"up": 3}), "lora_alpha=16.* 'up'"),
        (
            MixConfig(decoder=LoraConfig(r=2)),
            MixConfig(decoder=LoraConfig(r=2, lora_alpha=3)),
            "LoRA in the decoder on 'tokens.1', expected r=2, lora_alpha=3",
        ),
        (
            AdapterConfig(2, "gelu", ["tokens"]),
            AdapterConfig(2, "relu", ["tokens"]),
            "activation gelu for the adapters, expected activation relu",
        ),
    ],
)
def test_what_shapes_do_not_tell_is_compared(small, base, tmp_path, theirs, ours, words):
    get_peft_model(small, theirs).save_pretrained(tmp_path)
    model = get_peft_model(base, ours)
    with pytest.raises(InputError, match=words):
        model.load_adapter(tmp_path, "new")
    assert set(model.peft_config) == {"default"}


def test_two_adapters_of_one_name(saved, base, small_input):
    """As in Hugging Face PEFT: loading replaces, adding refuses."""
    model, directory = saved
    other = get_peft_model(base, LORA)
    other.add_adapter("63")
    for name in ("63", "default"):
        with pytest.raises(ValueError, match=f"got '{name}', which is taken"):
            other.add_adapter(name)
        other.load_adapter(directory, name)
        other.set_adapter(name)
        assert torch.equal(run(other, small_input), run(model, small_input))
    assert set(other.peft_config) == {"63", "default"}


def test_another_base_is_refused(saved, base):
    _, directory = saved
    with torch.no_grad():
        base.stem.weight[0, 0, 0, 0, 0] += 1e-9
    with pytest.raises(InputError, match="trained on another base network"):
        PeftModel.from_pretrained(base, directory)
    assert type(base.stem) is nn.Conv3d


@pytest.mark.parametrize("fails", [CONFIG, MODEL])
def test_a_save_that_fails_leaves_the_old_pair(saved, monkeypatch, fails):
    model, directory = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    scramble(model, 4)
    for method in ("write_bytes", "write_text"):
        real = getattr(Path, method)

        def full_disk(path, *args, real=real, **kwargs):
            if path.name.endswith(fails):
                real(path, *[a[: len(a) // 2] for a in args], **kwargs)
                raise OSError(28, "No space left on device")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, method, full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_an_interrupted_rename_leaves_a_config_only_with_its_model(saved, monkeypatch):
    """The model goes first: a new directory never has a config without a model."""
    model, directory = saved
    renamed = []
    monkeypatch.setattr(
        os, "replace", lambda a, b, real=os.replace: (renamed.append(Path(b).name), real(a, b))
    )
    model.save_pretrained(directory / "new")
    assert renamed == [MODEL, CONFIG]


def test_metadata_must_be_json(saved):
    model, directory = saved
    before = (directory / CONFIG).read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(directory, {"tensor": torch.zeros(1)})
    assert (directory / CONFIG).read_bytes() == before
