"""Injection: what is adapted, frozen, lean, trainable, and that it starts as the identity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from petite_fast import (
    BitFitConfig,
    FrozenBatchNorm3d,
    FrozenConv3d,
    FrozenConvTranspose3d,
    LoraConfig,
    LoRAConv3d,
    LoRAConvTranspose3d,
    LoRALinear,
    MixConfig,
    PeftModel,
    PromptConfig,
    get_peft_model,
    petite_recipe,
)
from petite_fast.errors import InputError
from petite_fast.models import CVTGANDiscriminator, CVTGANGenerator


def trainable(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


def ab(*names):
    return {f"{name}.{leaf}" for name in names for leaf in ("lora_A", "lora_B")}


SMALL_CASES = {
    "lora-all": (LoraConfig(r=2), ab("stem", "down", "tokens.1", "up", "head")),
    "lora-suffix": (LoraConfig(r=2, target_modules=["1", "stem"]), ab("stem", "tokens.1")),
    "lora-regex": (LoraConfig(r=2, target_modules="(stem|up)"), ab("stem", "up")),
    "lora-fa": (
        LoraConfig(r=2, target_modules=["down"], train_a=False),
        {"down.lora_B"},
    ),
    "lora-dropout": (LoraConfig(r=2, target_modules=["down"], lora_dropout=0.2), ab("down")),
    "bitfit": (
        BitFitConfig(),
        {f"{n}.bias" for n in ("stem", "norm", "down", "tokens.0", "tokens.1", "up", "head")},
    ),
    "bitfit-norms": (BitFitConfig(["norm", "0"]), {"norm.bias", "tokens.0.bias"}),
    "mix": (
        MixConfig(encoder=BitFitConfig(), decoder=LoraConfig(r=2)),
        {"stem.bias", "norm.bias", "down.bias"} | ab("tokens.1", "up", "head"),
    ),
    "mix-bitfit": (
        MixConfig(encoder=LoraConfig(r=2, target_modules="down"), bitfit=True),
        ab("down")
        | {f"{n}.bias" for n in ("stem", "norm", "down", "tokens.0", "tokens.1", "up", "head")},
    ),
}


@pytest.fixture(params=SMALL_CASES.values(), ids=SMALL_CASES.keys())
def case(request):
    return request.param


def test_starts_as_the_base_and_only_the_named_parameters_move(small, small_input, case):
    config, expected_trainable = case
    with torch.no_grad():
        expected = small(small_input)
    base = copy.deepcopy(small)
    model = get_peft_model(small, config)
    assert model is small and isinstance(model, PeftModel) and isinstance(model, type(base))
    assert trainable(model) == expected_trainable
    with torch.no_grad():
        torch.testing.assert_close(model(small_input), expected, rtol=1e-13, atol=1e-13)

    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    learned = set()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        optimiser.zero_grad()
        model(small_input).square().mean().backward()
        learned |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    assert learned == expected_trainable
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == expected_trainable
    # The base is still there, names, order of names and values.
    assert list(model.base_state_dict()) == list(base.state_dict())
    for name, value in model.base_state_dict().items():
        assert torch.equal(value, base.state_dict()[name]), name
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model.eval()(small_input), expected, rtol=1e-13, atol=1e-13)


def test_every_other_layer_becomes_lean_and_keeps_its_name(small):
    names = list(small.state_dict())
    hooked = []
    small.stem.register_forward_hook(lambda *_: hooked.append(1))
    model = get_peft_model(small, LoraConfig(r=2, target_modules=["down", "tokens.1"]))
    assert {n: type(m) for n, m in model.named_children()} == {
        "stem": FrozenConv3d,
        "norm": FrozenBatchNorm3d,
        "down": LoRAConv3d,
        "tokens": nn.Sequential,
        "up": FrozenConvTranspose3d,
        "head": FrozenConv3d,
        "spare": FrozenConv3d,
    }
    assert type(model.tokens[1]) is LoRALinear
    assert [n for n in model.state_dict() if "lora" not in n] == names
    model(torch.randn(1, 1, 4, 4, 4, dtype=torch.float64))
    assert hooked == [1]


def test_norms_with_running_statistics_stay_in_evaluation_mode():
    net = nn.Sequential(
        nn.Conv3d(2, 4, 1),
        nn.BatchNorm3d(4),
        nn.BatchNorm3d(4, track_running_stats=False),
        nn.InstanceNorm3d(4, track_running_stats=True),
        nn.Flatten(),
        nn.BatchNorm1d(32),
        nn.Dropout(0.5),
    )
    model = get_peft_model(net.train(), LoraConfig(r=2))
    assert [m.training for m in net] == [True, False, True, False, True, False, True]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model.train()(torch.randn(3, 2, 2, 2, 2))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules="conv9"), "'conv9' matches no module; names there are: stem"),
        (LoraConfig(target_modules=["ste"]), "matches no module"),
        (LoraConfig(target_modules="["), "not a regular expression"),
        (LoraConfig(target_modules=["norm"]), "'norm', a BatchNorm3d; LoRA adapts torch's own"),
        (LoraConfig(target_modules="tokens.*"), "'tokens', a Sequential"),
        (LoraConfig(target_modules=["spare"]), "matches no module"),
        (BitFitConfig(["nothing"]), "matches no module; names there are: stem"),
        (PromptConfig({"stem": 4}), "transformer stages, and there is none in this network"),
        (MixConfig(decoder=PromptConfig({"up": 4})), "there is none in the decoder"),
        (
            MixConfig(encoder=LoraConfig(target_modules="up")),
            "matches no module in the encoder; names there are: stem, down",
        ),
    ],
)
def test_bad_targets_change_nothing(small, small_input, config, words):
    types = [type(m) for m in small.modules()]
    with pytest.raises(InputError, match=words):
        get_peft_model(small, config)
    assert [type(m) for m in small.modules()] == types
    assert all(p.requires_grad for p in small.parameters())


def test_misuse(small):
    with pytest.raises(InputError, match="does not say which modules are its encoder"):
        get_peft_model(nn.Sequential(nn.Conv3d(1, 1, 1)), MixConfig(encoder=LoraConfig()))
    with pytest.raises(TypeError, match="net: got dict"):
        get_peft_model({}, LoraConfig())
    with pytest.raises(TypeError, match="config: got dict"):
        get_peft_model(small, {"r": 8})
    with pytest.raises(TypeError, match="before it is compiled or wrapped"):
        get_peft_model(torch.compile(small), LoraConfig())
    with pytest.raises(TypeError, match="before it is compiled or wrapped"):
        get_peft_model(nn.DataParallel(small), LoraConfig())
    model = get_peft_model(small, BitFitConfig())
    get_peft_model(model.merge_and_unload(), LoraConfig(r=2))
    for net in (small, nn.Sequential(small)):
        with pytest.raises(ValueError, match="has adapters already"):
            get_peft_model(net, LoraConfig(r=2))


def test_second_injection_of_biases_is_refused(small):
    get_peft_model(small, BitFitConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        get_peft_model(small, BitFitConfig())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(4, 4, 3, padding=1)
        self.again = self.first  # one module under two names
        self.tied = nn.Conv3d(4, 4, 3, padding=1)
        self.tied.weight = self.first.weight  # one parameter in two modules

    def forward(self, x):
        return self.tied(self.again(self.first(x)))


@pytest.mark.parametrize("target", ["first", "again", "tied"])
def test_shared_modules_and_tied_weights(target):
    torch.manual_seed(0)
    net, x = Shared(), torch.randn(2, 4, 4, 4, 4)
    base = copy.deepcopy(net)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[target]))
    assert net.again is net.first and net.tied.weight is net.first.weight
    assert len(trainable(model)) == 2
    assert list(model.base_state_dict()) == list(base.state_dict())
    with torch.no_grad():
        net.get_submodule(target).lora_B.normal_()
        expected = model.eval()(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected)
    assert type(merged) is Shared and net.again is net.first
    assert all(p.requires_grad for p in merged.parameters())
    assert list(merged.state_dict()) == list(base.state_dict())
    untouched = "tied" if target != "tied" else "first"
    kept = merged.get_submodule(untouched).weight
    assert torch.equal(kept, base.get_submodule(untouched).weight)


def test_layers_that_are_not_torchs_own_are_left_alone():
    class Own(nn.Conv3d):
        pass

    net = nn.Sequential(
        Own(2, 2, 1), nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 2, 1)), nn.Conv3d(2, 2, 1)
    )
    model = get_peft_model(net, LoraConfig(r=1))
    assert trainable(model) == ab("2")
    assert type(net[0]) is Own and not isinstance(net[1], FrozenConv3d)


# --- CVT-GAN --------------------------------------------------------------------------------------


def test_petite_on_cvtgan(generator, patch):
    with torch.no_grad():
        expected = generator(patch)
    base = copy.deepcopy(generator)
    model = get_peft_model(generator, petite_recipe("cvtgan", r=2, num_prompts=(0, 2, 4)))
    names = trainable(model)
    prompts = {n for n in names if "prompt" in n}
    assert prompts == {f"encoder_layer{i}_down.0.prompt.embedding" for i in (2, 3)}
    lora = {n for n in names if "lora" in n}
    assert len(lora) == 2 * 9 and all(
        n.startswith("decoder_layer") and ".attn.conv_proj_" in n for n in lora
    )
    biases = {n for n in names if n.endswith(".bias")}
    assert biases == {
        n for n, _ in base.named_parameters() if n.endswith(".bias") and "transconv" not in n
    }
    assert names == prompts | lora | biases
    with torch.no_grad():
        torch.testing.assert_close(model(patch), expected, rtol=1e-12, atol=1e-12)

    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    learned = set()
    for _ in range(2):
        optimiser.zero_grad()
        (model(patch) - 1).square().mean().backward()
        learned |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    # proj_k has no bias; a constant added to every key changes no softmax: those biases of the
    # norms in front of it have gradients that vanish up to rounding, but they are in the graph.
    assert learned == names
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= names
    assert lora | prompts <= moved
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model.eval()(patch), expected, rtol=1e-12, atol=1e-12)


def test_trainable_share_of_the_full_generator(capsys):
    with torch.device("meta"):
        net = CVTGANGenerator()
    model = get_peft_model(net, petite_recipe("cvtgan"))
    count = {
        kind: sum(p.numel() for n, p in net.named_parameters() if p.requires_grad and kind in n)
        for kind in ("lora", "bias", "prompt")
    }
    # LoRA: nine A of (8, 1, 3, 3, 3); B of (C, 8) in two blocks of 256 and one of 128 channels.
    assert count["lora"] == 9 * 8 * 27 + 3 * 8 * (256 + 256 + 128)
    assert count["bias"] == 31_777 - 896  # the published count less the unused transconv's
    assert count["prompt"] == 8 * 8**3 + 32 * 4**3
    trainable_count, total = model.get_nb_trainable_parameters()
    assert trainable_count == sum(count.values()) == 54_329
    assert total == 28_715_681 + count["lora"] + count["prompt"]
    assert trainable_count / total < 0.01
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        "trainable params: 54,329 || all params: 28,739,129 || trainable%: 0.1890\n"
    )


def test_methods_for_the_other_side(generator):
    with pytest.raises(InputError, match="matches no module in the decoder"):
        get_peft_model(generator, MixConfig(decoder=PromptConfig({r"encoder_layer2_down\.0": 8})))
    with pytest.raises(InputError, match="gives 'decoder_layer1_up' both 8 and 4"):
        get_peft_model(generator, PromptConfig({"decoder_layer1_up": 8, "decoder_layer._up": 4}))
    with pytest.raises(InputError, match="'encoder_layer1_down.0' matches no module"):
        get_peft_model(CVTGANDiscriminator(), petite_recipe("cvtgan"))
    model = get_peft_model(generator, MixConfig(decoder=PromptConfig({r"decoder_layer[12]_up": 2})))
    assert trainable(model) == {f"decoder_layer{i}_up.prompt.embedding" for i in (1, 2)}


def test_lora_everywhere_leaves_the_unused_layers(generator):
    model = get_peft_model(generator, LoraConfig(r=2))
    assert not any("transconv" in name for name in trainable(model))
    assert isinstance(generator.decoder_layer3_up, LoRAConvTranspose3d)


def test_compiles_without_graph_break(small, small_input):
    config = MixConfig(encoder=BitFitConfig(), decoder=LoraConfig(r=2))
    model = get_peft_model(small, config).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(small_input), model(small_input))
    compiled(small_input).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_autocast(small, small_input):
    model = get_peft_model(small.float(), LoraConfig(r=2)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(small_input.float()).float().square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_twenty_steps_as_with_plain_pytorch(small, small_input):
    """BitFit through the lean twins against the same biases in the untouched network."""
    plain = copy.deepcopy(small)
    model = get_peft_model(small, BitFitConfig())
    losses = []
    for net in (model, plain):
        for name, p in plain.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
        run = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = (net(small_input) - 0.3).square().mean()
            loss.backward()
            optimiser.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
