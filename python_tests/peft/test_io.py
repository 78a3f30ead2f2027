"""Adapter files: what they hold, what is refused, and that Hugging Face PEFT opens them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from petite_fast import (
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


def scramble(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def run(net, x):
    with torch.no_grad():
        return net(x)


@pytest.fixture
def base(small):
    return copy.deepcopy(small)


@pytest.fixture
def saved(base, small, tmp_path):
    """(adapted network, directory that holds its adapter)."""
    model = scramble(get_peft_model(small, LORA))
    model.save_pretrained(tmp_path, {"scanner": "63", "normalisation": "paired", "epochs": 3})
    return model, tmp_path


def edit_config(directory, **changes):
    path = directory / CONFIG
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))


def edit_tensors(directory, change):
    tensors = safetensors.torch.load_file(directory / MODEL)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / MODEL)


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
    assert record["peft_type"] == "LORA" and record["r"] == 2 and record["lora_alpha"] == 6
    assert record["target_modules"] == ["stem", "down", "tokens.1", "up", "head"]
    assert record["scanner"] == "63" and record["normalisation"] == "paired"
    assert record["metadata"] == {"epochs": 3}
    assert record["base_model_sha256"] == model.base_sha256()
    assert record["petite_fast_version"] and record["torch_version"] == torch.__version__
    config, information = read_information(directory)
    assert config.r == 2 and information["scanner"] == "63"


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


def other_base(directory):
    edit_config(directory, base_model_sha256="0" * 64)


def other_rank(directory):
    edit_config(directory, r=4)


def missing_key(directory):
    edit_tensors(directory, lambda t: t.pop("base_model.model.up.lora_A.weight"))


def extra_key(directory):
    edit_tensors(directory, lambda t: t.update(extra=torch.zeros(1)))


def other_shape(directory):
    name = "base_model.model.up.lora_A.weight"
    edit_tensors(directory, lambda t: t.update({name: torch.zeros(2, 9, 1, 1, 1)}))


def integers(directory):
    name = "base_model.model.up.lora_A.weight"
    edit_tensors(directory, lambda t: t.update({name: t[name].int()}))


def truncated(directory):
    content = (directory / MODEL).read_bytes()
    (directory / MODEL).write_bytes(content[: len(content) // 2])


def html(directory):
    (directory / MODEL).write_text("<html>Not found</html>")


def no_model(directory):
    (directory / MODEL).unlink()


def no_config(directory):
    (directory / CONFIG).unlink()


def not_json(directory):
    (directory / CONFIG).write_text("{")


def json_list(directory):
    (directory / CONFIG).write_text("[]")


def no_hash(directory):
    edit_config(directory, base_model_sha256=...)


def dora(directory):
    edit_config(directory, use_dora=True)


def unknown_type(directory):
    edit_config(directory, peft_type="VERA")


def unknown_field(directory):
    edit_config(directory, rank_pattern={"a": 3})


def bad_value(directory):
    edit_config(directory, lora_alpha="x")


def no_such_module(directory):
    edit_config(directory, target_modules=["nothing"])


DAMAGE = {
    other_base: "trained on another base network",
    other_rank: "",
    missing_key: "1 tensors missing (first: base_model.model.up.lora_A.weight), 0 unexpected",
    extra_key: "0 tensors missing, 1 unexpected (first: extra)",
    other_shape: "up.lora_A.weight is torch.float32 (2, 9, 1, 1, 1), expected floating point (2, 8",
    integers: "torch.int32",
    truncated: "truncated or not a safetensors file",
    html: "truncated or not a safetensors file",
    no_model: "adapter_model.safetensors cannot be read (No such file",
    no_config: "adapter_config.json cannot be read (No such file",
    not_json: "is not JSON",
    json_list: "is not a JSON object",
    no_hash: "no base_model_sha256",
    dora: "use_dora is True",
    unknown_type: "peft_type is 'VERA'",
    unknown_field: "got also ['rank_pattern']",
    bad_value: "lora_alpha is 'x'",
    no_such_module: "",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_and_change_nothing(saved, base, small_input, damage):
    model, directory = saved
    damage(directory)
    fresh = copy.deepcopy(base)
    words = DAMAGE[damage]
    with pytest.raises(InputError) as caught:
        PeftModel.from_pretrained(fresh, directory)
    text = str(caught.value)
    assert words in text and "\n" not in text
    assert [type(m) for m in fresh.modules()] == [type(m) for m in base.modules()]
    assert all(p.requires_grad for p in fresh.parameters())
    assert list(fresh.state_dict()) == list(base.state_dict())
    assert torch.equal(run(fresh, small_input), run(base, small_input))

    before = run(model, small_input)
    if damage is no_such_module:  # it names what to adapt, which here is done already
        return
    for name in ("default", "new"):
        with pytest.raises(InputError):
            model.load_adapter(directory, name)
    assert torch.equal(run(model, small_input), before)
    assert set(model.peft_config) == {"default"}


def test_wrong_rank_names_both(saved, base):
    _, directory = saved
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6))
    with pytest.raises(InputError, match=r"\[\(2, 6\)\], expected \[\(4, 6\)\]"):
        model.load_adapter(directory)
    with pytest.raises(InputError, match="expected none"):
        get_peft_model(base.merge_and_unload(), BitFitConfig()).load_adapter(directory)


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


# --- Hugging Face PEFT ----------------------------------------------------------------------------


def make_dense():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(8, 4, (1, 3, 3), stride=2),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Linear(5, 3),
    ).double()


@pytest.mark.parametrize("targets", [None, ["0", "4"], "[024]"])
def test_hugging_face_opens_a_lora_adapter(tmp_path, targets):
    peft = pytest.importorskip("peft")
    net, base = make_dense(), make_dense()
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets)
    model = scramble(get_peft_model(net, config)).eval()
    model.save_pretrained(tmp_path, {"scanner": "63"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert not [w for w in caught if "missing adapter keys" in str(w.message).lower()]
    x = torch.randn(2, 2, 3, 7, 6, dtype=torch.float64)
    expected = run(model, x)
    torch.testing.assert_close(run(theirs.eval(), x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(make_dense(), x), expected)
    # And the gradients, from the same loss.
    theirs = peft.PeftModel.from_pretrained(
        make_dense(), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    )
    model.train()(x).square().sum().backward()
    theirs(x).square().sum().backward()
    other = dict(theirs.named_parameters())
    count = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = other[f"base_model.model.{name}.default.weight"].grad
            torch.testing.assert_close(p.grad, grad.reshape(p.shape), rtol=1e-10, atol=1e-10)
            count += 1
    assert count == (8 if targets is None else 4 if len(targets) == 2 else 6)
