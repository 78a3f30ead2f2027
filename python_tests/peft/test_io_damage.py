"""Adapter files that are damaged or of something else: refused in one sentence, nothing changed."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from peft_cases import run, scramble

from petite_fast import BitFitConfig, LoraConfig, PeftModel, get_peft_model
from petite_fast.errors import InputError

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def base(small):
    return copy.deepcopy(small)


@pytest.fixture
def saved(base, small, tmp_path):
    """(adapted network, directory that holds its adapter)."""
    model = scramble(get_peft_model(small, LoraConfig(r=2, lora_alpha=6)))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def edit_config(directory, **changes):
    path = directory / CONFIG
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))


def edit_tensors(directory, change):
    tensors = safetensors.torch.load_file(directory / MODEL)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / MODEL)


def other_base(directory):
    edit_config(directory, base_model_sha256="0" * 64)


def edit_own(directory, **changes):
    record = json.loads((directory / CONFIG).read_text())
    edit_config(directory, petite_fast=record["petite_fast"] | changes)


def other_rank(directory):
    edit_own(directory, r=4)


def rank_for_others(directory):
    edit_config(directory, r=4)


def alpha_for_others(directory):
    edit_config(directory, lora_alpha=7)


def pattern_for_others(directory):
    edit_config(directory, rank_pattern={"stem": 3})


def other_class(directory):
    edit_config(directory, base_model_class="UNETR", base_model_sha256="0" * 64)


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
    edit_own(directory, rank=3)


def unknown_option(directory):
    edit_config(directory, new_trick=0.5)


def bad_value(directory):
    edit_own(directory, lora_alpha="x")


def no_fields(directory):
    edit_config(directory, petite_fast=[])


def other_method(directory):
    edit_config(directory, petite_fast=BitFitConfig().to_dict())


def no_such_module(directory):
    edit_own(directory, target_modules=["nothing"])


DAMAGE = {
    other_base: "trained on another base network, with other weights (sha256 000000000000..., this "
    "SmallNet has ",
    other_class: "was trained on a UNETR, and this network is a SmallNet",
    other_rank: "",
    rank_for_others: "r is 4 for Hugging Face PEFT, expected 2 as under 'petite_fast'",
    alpha_for_others: "lora_alpha is 7 for Hugging Face PEFT, expected 6",
    pattern_for_others: "rank_pattern is {'stem': 3} for Hugging Face PEFT, expected {}",
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
    dora: "use_dora is True: DoRA is not supported",
    unknown_type: "peft_type is 'VERA'",
    unknown_field: "got also ['rank']",
    unknown_option: "new_trick is 0.5: this option is unknown here and not at its default",
    bad_value: "lora_alpha is 'x'",
    no_fields: "petite_fast is [], expected the fields of a LORA config",
    other_method: "expected the fields of a LORA config",
    no_such_module: "matches no module",
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
        with pytest.raises(InputError) as caught:
            model.load_adapter(directory, name)
        assert "\n" not in str(caught.value)
    assert torch.equal(run(model, small_input), before)
    assert set(model.peft_config) == {"default"}
