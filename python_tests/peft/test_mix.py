"""Recipes: which there are, what they train at full size, what is refused."""

from __future__ import annotations

import pytest
import torch

from petite_fast import MixConfig, PromptConfig, get_peft_model, petite_recipe
from petite_fast.errors import InputError
from petite_fast.models import CVTGANGenerator
from petite_fast.peft.mix import feasible, recipe, recipes

pytest.importorskip("monai")

# Published counts (facts of the paper's public code), where its form is ours; a second number is
# what the gates of token prompts add, and biases that are never in the graph are left out.
COUNTS = {
    ("cvtgan", "ln"): 11_776,
    ("cvtgan", "bitfit"): 31_777 - 896,  # resup*.transconv
    ("cvtgan", "adapter"): 207_392,
    ("cvtgan", "vpt"): 6_144,
    ("cvtgan", "vpt-deep"): 2 * 6_144,  # the published third row is never used
    ("cvtgan", "ssf"): 45_056,
    ("unetr", "ln"): 38_400,
    ("unetr", "bitfit"): 75_265,
    ("unetr", "adapter"): 1_779_840,
    ("unetr", "lora"): 294_912,  # without the published layers that are never used
    ("unetr", "vpt"): 38_400 + 144,
    ("unetr", "vpt-deep"): 460_800 + 144,
    ("unetr", "ssf"): 205_824,
    ("unetr", "petite"): 294_912 + 128,
}


def full_size(network: str) -> torch.nn.Module:
    with torch.device("meta"):
        if network == "cvtgan":
            return CVTGANGenerator()
        from petite_fast.models import UNETR

        return UNETR((64, 64, 64))


@pytest.mark.parametrize(("network", "name"), COUNTS)
def test_published_counts(network, name) -> None:
    model = get_peft_model(full_size(network), recipe(network, name))
    assert model.get_nb_trainable_parameters()[0] == COUNTS[network, name]


def test_the_21_mixes() -> None:
    assert len(feasible("cvtgan")) == 12 and len(feasible("unetr")) == 9
    assert ("vpt", "lora") in feasible("cvtgan") and ("lora", "vpt") not in feasible("unetr")
    assert all(a != b for network in ("cvtgan", "unetr") for a, b in feasible(network))


@pytest.mark.parametrize("network", ["cvtgan", "unetr"])
def test_every_recipe_trains_little(network) -> None:
    for name in recipes(network):
        if name == "full":
            continue
        model = get_peft_model(full_size(network), recipe(network, name))
        trained, total = model.get_nb_trainable_parameters()
        assert 0 < trained < 0.02 * total, name


def test_petite_is_its_mix_with_biases() -> None:
    mix = recipe("cvtgan", "vpt+lora+bitfit")
    assert mix == petite_recipe("cvtgan") == recipe("cvtgan", "petite")
    assert recipe("unetr", "petite") == petite_recipe("unetr") == recipe("unetr", "lora+ssf")
    assert isinstance(mix, MixConfig) and mix.bitfit


def test_placement() -> None:
    model = get_peft_model(
        CVTGANGenerator(widths=(4, 8, 16, 32)), petite_recipe("cvtgan", placement="linear")
    )
    assert all(name.rpartition(".")[2] in ("proj_q", "proj_k", "proj_v")
               for name in model._peft.injection.lora)  # fmt: skip
    with pytest.raises(InputError, match="'reference' or 'linear'"):
        petite_recipe("cvtgan", placement="dense")


@pytest.mark.parametrize(
    ("network", "name", "sentence"),
    [
        ("cvtgan", "dora", "expected one of petite, full, ln, bitfit, adapter, lora, lora-linear"),
        ("unetr", "lora-linear", "expected one of petite, full, ln"),
        ("unetr", "lora+vpt", "no tokens to put prompts beside"),
        ("cvtgan", "lora+lora", "two different methods"),
        ("cvtgan", "lora+", "expected one of"),
        ("cvtgan", "lora+ssf+ln", "expected one of"),
        ("swin", "lora", "no recipes for 'swin', expected one of cvtgan, unetr"),
    ],
)
def test_refused(network, name, sentence) -> None:
    with pytest.raises(InputError, match=sentence.replace("+", r"\+")):
        recipe(network, name)


@pytest.mark.parametrize(
    ("network", "name", "counts"),
    [("cvtgan", "vpt", (8, 32)), ("unetr", "vpt", (1, 2)), ("unetr", "petite", (5,))],
)
def test_wrong_number_of_prompts(network, name, counts) -> None:
    with pytest.raises(InputError, match="num_prompts is"):
        recipe(network, name, num_prompts=counts)


def test_rank_must_be_positive() -> None:
    with pytest.raises(InputError, match="r is 0, expected a positive integer"):
        recipe("cvtgan", "lora", r=0)


def test_prompts_beside_what_is_no_stage() -> None:
    net = CVTGANGenerator(widths=(4, 8, 16, 32))
    with pytest.raises(InputError, match="'resup1', a _Shortcut, which takes no prompts"):
        get_peft_model(net, PromptConfig({"resup1": 4}))
    with pytest.raises(InputError, match="'stage' matches no module; names there are: encoder_l"):
        get_peft_model(net, PromptConfig({"stage": 4}))
    with pytest.raises(InputError, match="channel prompts, which have no gate"):
        get_peft_model(net, PromptConfig({"decoder_layer1_up": 4}, gated=False))
