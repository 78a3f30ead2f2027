"""Configs: JSON round trip, validation, recipes."""

from __future__ import annotations

import json

import pytest

from petite_fast import BitFitConfig, LoraConfig, MixConfig, PromptConfig, petite_recipe
from petite_fast.errors import InputError
from petite_fast.peft import PeftConfig

GOOD = [
    LoraConfig(),
    LoraConfig(r=4, lora_alpha=8.5, target_modules=["a", "b.c"], lora_dropout=0.1, train_a=False),
    LoraConfig(target_modules=r".*\.conv"),
    BitFitConfig(),
    BitFitConfig(["norm"]),
    PromptConfig({"stage.0": 8, "stage.1": 0}),
    MixConfig(bitfit=True),
    MixConfig(encoder=LoraConfig(r=2), decoder=BitFitConfig()),
    petite_recipe("cvtgan", r=4, lora_alpha=4, num_prompts=(1, 2, 3)),
]


@pytest.mark.parametrize("config", GOOD, ids=lambda config: type(config).__name__)
def test_json_round_trip(config):
    text = json.dumps(config.to_dict())
    assert PeftConfig.from_dict(json.loads(text)) == config
    assert json.loads(text)["peft_type"] == config.peft_type


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoraConfig(r=0), "r is 0, expected a positive integer"),
        (lambda: LoraConfig(r=-3), "r is -3"),
        (lambda: LoraConfig(r=2.0), "r is 2.0"),
        (lambda: LoraConfig(r=True), "r is True"),
        (lambda: LoraConfig(lora_alpha=0), "lora_alpha is 0"),
        (lambda: LoraConfig(lora_alpha="16"), "lora_alpha is '16'"),
        (lambda: LoraConfig(lora_dropout=1.0), r"lora_dropout is 1.0, expected a number in \[0, 1"),
        (lambda: LoraConfig(train_a=1), "train_a is 1"),
        (lambda: LoraConfig(target_modules=[]), "target_modules is"),
        (lambda: LoraConfig(target_modules=[1]), "target_modules is"),
        (lambda: BitFitConfig(target_modules=3), "BitFitConfig: target_modules is 3"),
        (lambda: PromptConfig({"a": -1}), "num_prompts is"),
        (lambda: PromptConfig({"a": 1.5}), "num_prompts is"),
        (lambda: PromptConfig({"a": 0}), "at least one number above 0"),
        (lambda: PromptConfig([8, 32]), "num_prompts is"),
        (lambda: MixConfig(), "all empty"),
        (lambda: MixConfig(encoder=8), "encoder is 8"),
        (lambda: MixConfig(decoder=MixConfig(bitfit=True)), "decoder is"),
        (lambda: MixConfig(bitfit="yes"), "bitfit is 'yes'"),
        (lambda: petite_recipe("unet"), "'unet', expected one of cvtgan, unetr"),
        (lambda: petite_recipe("cvtgan", r=0), "r is 0"),
        (lambda: petite_recipe("cvtgan", num_prompts=(8, 32)), "expected 3: one number per"),
        (lambda: PeftConfig.from_dict({"peft_type": "DORA"}), "peft_type is 'DORA', expected one"),
        (lambda: PeftConfig.from_dict({"r": 8}), "peft_type is None"),
        (lambda: PeftConfig.from_dict({"peft_type": ["LORA"]}), "peft_type is"),
        (lambda: PeftConfig.from_dict({"peft_type": "LORA", "rank": 8}), r"got also \['rank'\]"),
        (lambda: MixConfig(encoder={"peft_type": "LORA", "r": -1}), "r is -1"),
    ],
)
def test_bad_values(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_tuple_or_set_of_targets_becomes_a_list():
    assert LoraConfig(target_modules=("b", "a")).target_modules == ["b", "a"]
    assert LoraConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]
