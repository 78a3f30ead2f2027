"""The options and files of Hugging Face PEFT's LoRA: which are accepted, which are refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from peft_cases import run, scramble
from torch import nn

from petite_fast import PeftModel
from petite_fast.errors import InputError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EXACT = {"rtol": 1e-11, "atol": 1e-12}
CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

REFUSED = {
    "use_dora": (True, "DoRA is not supported"),
    "lora_bias": (True, "a bias in lora_B"),
    "bias": ("all", "trained biases"),
    "modules_to_save": (["head"], "fully trained modules"),
    "layer_replication": ([[0, 2]], "replicated layers"),
    "target_parameters": (["head.weight"], "single parameters"),
    "trainable_token_indices": ([1], "token embeddings"),
    "fan_in_fan_out": (True, "transposed weight"),
    "exclude_modules": (["head"], "target_modules"),
    "layers_to_transform": ([0], "target_modules"),
    "use_qalora": (True, "QALoRA"),
    "megatron_config": ({"a": 1}, "Megatron"),
    "alora_invocation_tokens": ([1, 2], "activated LoRA"),
    "velora_config": ({"a": 1}, "VeLoRA"),
    "init_lora_weights": ("pissa_niter_4", "changes the base network"),
    "arrow_config": ({"a": 1}, "unknown here"),
    "target_modules": (None, "expected names of modules"),
    "r": (0, "expected a positive integer"),
}
ACCEPTED = {
    "peft_version": "0.99.0",
    "revision": "main",
    "auto_mapping": {"base_model_class": "Net", "parent_library": "x"},
    "base_model_name_or_path": "somewhere",
    "inference_mode": False,
    "task_type": "FEATURE_EXTRACTION",
    "init_lora_weights": "orthogonal",
    "layers_pattern": "blocks",
    "qalora_group_size": 32,
    "megatron_core": "megatron.other",
    "loftq_config": {"loftq_bits": 4},
    "later_one": None,
    "later_two": False,
    "later_three": {},
    "later_four": [],
}


def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    return net.double()


@pytest.fixture
def x():
    return torch.randn(2, 2, 4, 4, 4, dtype=torch.float64, generator=torch.manual_seed(1))


@pytest.fixture
def theirs_saved(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["0", "3"])
    theirs = scramble(peft.get_peft_model(make(), config, autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path)
    return theirs, tmp_path


def edit(directory, **changes):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_change_the_result_are_refused(theirs_saved, option):
    value, words = REFUSED[option]
    edit(theirs_saved[1], **{option: value})
    net = make()
    with pytest.raises(InputError, match=words) as caught:
        PeftModel.from_pretrained(net, theirs_saved[1])
    assert option in str(caught.value) and "\n" not in str(caught.value)
    assert type(net) is nn.Sequential and type(net[0]) is nn.Conv3d


def test_options_that_change_nothing_are_accepted(theirs_saved, x):
    theirs, directory = theirs_saved
    edit(directory, **ACCEPTED)
    torch.testing.assert_close(
        run(PeftModel.from_pretrained(make(), directory), x), run(theirs, x), **EXACT
    )


def test_missing_fields_have_their_defaults(theirs_saved, x):
    theirs, directory = theirs_saved
    record = {"peft_type": "LORA", "r": 2, "target_modules": ["0", "3"]}
    (directory / CONFIG).write_text(json.dumps(record))
    ours = PeftModel.from_pretrained(make(), directory)
    assert ours.peft_config["default"].lora_alpha == 8
    torch.testing.assert_close(run(ours, x), run(theirs, x), **EXACT)


def test_their_file_is_read_strictly(theirs_saved):
    _, directory = theirs_saved
    whole = safetensors.torch.load_file(directory / MODEL)
    tensors = dict(whole)
    del tensors[f"{PREFIX}3.lora_A.weight"]
    safetensors.torch.save_file(tensors, directory / MODEL)
    with pytest.raises(InputError, match="1 tensors missing .first: .*3.lora_A"):
        PeftModel.from_pretrained(make(), directory)
    safetensors.torch.save_file(
        whole | {f"{PREFIX}0.lora_magnitude_vector": torch.ones(6)}, directory / MODEL
    )
    with pytest.raises(InputError, match="1 unexpected .first: .*lora_magnitude_vector"):
        PeftModel.from_pretrained(make(), directory)
