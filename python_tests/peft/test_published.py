"""Published tensors in our networks, against the published method written out on a copy."""

from __future__ import annotations

import copy
import functools
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft_cases import build, inputs, run
from torch import nn

from petite_fast import LoraConfig, MixConfig, PeftModel, SSFConfig, get_peft_model
from petite_fast.errors import InputError
from petite_fast.models import CVTGANDiscriminator, load_published_adapter
from petite_fast.peft.published import published_adapter

pytest.importorskip("monai")
pytest.importorskip("einops")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def random(*shape, around=0.0):
    return around + 0.1 * torch.randn(shape, dtype=torch.float64)


def blocks(net):
    """{dotted name: block} of either network."""
    return {
        name.removesuffix(".attn"): net.get_submodule(name.removesuffix(".attn"))
        for name, _ in net.named_modules()
        if name.endswith(".attn")
    }


def scale_output(module, scale, shift, dim=-1):
    shape = [1] * 5 if dim == 1 else [-1]
    shape[dim] = -1
    module.register_forward_hook(lambda m, i, y: y * scale.view(shape) + shift.view(shape))


@functools.cache
def _base(name):
    net = build(name)
    return net, run(net, inputs(name, batch=1))


def base(name):
    """A copy of the base network."""
    return copy.deepcopy(_base(name)[0])


def assert_same(name, state, expected, **options):
    """`state` in our network computes what `expected` does; `expected` is the base, changed."""
    x = inputs(name, batch=1)
    model = published_adapter(base(name), state, **options)
    wanted = run(expected, x)
    assert not torch.allclose(wanted, _base(name)[1], rtol=1e-6)
    torch.testing.assert_close(run(model, x), wanted, **EXACT)
    return model


def adapter_tensors(net, reduction):
    state = {}
    for name, block in blocks(net).items():
        width = block.norm1.weight.numel()
        hidden = width // reduction
        state |= {
            f"{name}.adapter_downsample.weight": random(hidden, width),
            f"{name}.adapter_downsample.bias": random(hidden),
            f"{name}.adapter_upsample.weight": random(width, hidden),
            f"{name}.adapter_upsample.bias": random(width),
        }
    return state


@pytest.mark.parametrize("name", ["cvtgan", "unetr"])
def test_adapters(name):
    expected = base(name)
    state = adapter_tensors(expected, 3)

    def behind(down, up):
        def through(map, x):
            return F.linear(x, state[f"{map}.weight"], state[f"{map}.bias"])

        return lambda module, inputs, y: y + through(up, F.gelu(through(down, y)))

    for block_name, block in blocks(expected).items():
        names = (f"{block_name}.adapter_{which}sample" for which in ("down", "up"))
        block.mlp.register_forward_hook(behind(*names))
    model = assert_same(name, state, expected)
    assert model.peft_config["default"].reduction == 3
    assert model.get_nb_trainable_parameters()[0] == sum(v.numel() for v in state.values())


def lora_tensors(net, projections="qk", r=2, rows=9):
    return {
        f"{name}.attn.conv_proj_{part}.conv.lora_{leaf}": random(
            *((3 * r, 3 * width) if leaf == "A" else (rows, 3 * r))
        )
        for name, block in blocks(net).items()
        for width in [block.norm1.weight.numel()]
        for part in projections
        for leaf in "AB"
    }


def add_lora(net, state, scaling):
    for key in [key for key in state if key.endswith(".lora_A")]:
        path = key.removesuffix(".lora_A")
        kernel = net.get_submodule(path).weight.detach()
        kernel += scaling * (state[f"{path}.lora_B"] @ state[key]).view(kernel.shape)


def test_lora_of_depthwise_kernels():
    expected = base("cvtgan")
    state = lora_tensors(expected)
    add_lora(expected, state, 16 / 2)
    model = assert_same("cvtgan", state, expected)
    merged = model.merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(merged[key], value, **EXACT)
    expected = base("cvtgan")
    add_lora(expected, state, 1 / 2)
    assert_same("cvtgan", state, expected, lora_alpha=1)


def test_lora_with_biases_and_its_file(tmp_path):
    """Two methods are a mix; a .pt file as the published code writes it; and our own file of it."""
    expected = base("cvtgan")
    state = lora_tensors(expected)
    state |= {n: random(*p.shape) for n, p in expected.named_parameters() if n.endswith(".bias")}
    add_lora(expected, state, 8)
    expected.load_state_dict({k: v for k, v in state.items() if "bias" in k}, strict=False)
    model = assert_same("cvtgan", state, expected)
    config = model.peft_config["default"]
    assert isinstance(config, MixConfig) and config.bitfit
    assert isinstance(config.encoder, LoraConfig) and isinstance(config.decoder, LoraConfig)

    torch.save({"best_acc": [np.float64(1)], "state_dict_G": state}, tmp_path / "final_1_2.pt")
    again = load_published_adapter(base("cvtgan"), tmp_path / "final_1_2.pt")
    with pytest.raises(InputError, match="holds no discriminator of cvtgan"):
        load_published_adapter(base("cvtgan"), tmp_path / "final_1_2.pt", "discriminator")
    x = inputs("cvtgan", batch=1)
    assert torch.equal(run(again, x), run(model, x))
    model.save_pretrained(tmp_path / "ours")
    ours = PeftModel.from_pretrained(base("cvtgan"), tmp_path / "ours")
    assert torch.equal(run(ours, x), run(model, x))


@pytest.mark.parametrize("name", ["cvtgan", "unetr"])
@pytest.mark.parametrize("what", ["bias", "norms"])
def test_parameters_of_the_base(name, what):
    expected = base(name)
    norms = {n for n, m in expected.named_modules() if isinstance(m, nn.LayerNorm)}
    state = {
        n: random(*p.shape)
        for n, p in expected.named_parameters()
        if "cross_attn" not in n
        and (n.endswith(".bias") if what == "bias" else n.rpartition(".")[0] in norms)
    }
    assert not expected.load_state_dict(state, strict=False).unexpected_keys
    model = assert_same(name, state, expected)
    unused = sum(v.numel() for k, v in state.items() if "transconv" in k)
    assert model.get_nb_trainable_parameters()[0] == sum(v.numel() for v in state.values()) - unused


def test_discriminator():
    net = CVTGANDiscriminator(widths=(4, 8, 8, 16)).double().eval()
    state = lora_tensors(net)
    expected = copy.deepcopy(net)
    add_lora(expected, state, 8)
    x = random(1, 2, 32, 32, 32)
    model = published_adapter(net, state | {"linear.bias": random(1)})
    assert model is net
    torch.testing.assert_close(run(model, x), run(expected, x), **EXACT)


def test_ssf_of_cvtgan(caplog):
    """Where the tensors belong: the published block used its attention twice and no MLP."""
    expected, state = base("cvtgan"), {}

    def pair(owner, number, *modules, dim=-1):
        name = f"{owner}.ssf_scale_{number}"
        width = getattr(modules[0], "out_features", None) or modules[0].weight.shape[0]
        state[name] = random(width, around=1.0)
        state[name.replace("scale", "shift")] = random(width)
        for module in modules:
            scale_output(module, state[name], state[name.replace("scale", "shift")], dim)

    for stage in (f"encoder_layer{i}_down.0" for i in (1, 2, 3)):
        embed = expected.get_submodule(stage).patch_embed
        pair(f"{stage}.patch_embed", 1, embed.proj, dim=1)
        pair(f"{stage}.patch_embed", 2, embed.norm)
    for name, block in blocks(expected).items():
        pair(name, 1, block.norm1)
        pair(name, 2, block.norm2)
        pair(f"{name}.attn", 1, block.attn.proj_q, block.attn.proj_k, block.attn.proj_v)
        pair(f"{name}.attn", 2, block.attn.proj)
        pair(f"{name}.mlp", 1, block.mlp.fc1)
        pair(f"{name}.mlp", 2, block.mlp.fc2)
    with caplog.at_level(logging.WARNING, "petite_fast"):
        model = assert_same("cvtgan", state, expected)
    assert "left its MLPs out by mistake" in caplog.text
    assert model.get_nb_trainable_parameters()[0] == sum(v.numel() for v in state.values())


def qkv_tensors(net, r=2):
    state = {}
    for name in blocks(net):
        path, width = f"{name}.attn.qkv", 24
        state |= {f"{path}.lora_A": random(2 * r, width), f"{path}.lora_B": random(2 * width, r)}
    return state


def add_qkv(net, state, scaling, r=2):
    for name, block in blocks(net).items():
        a, b = state[f"{name}.attn.qkv.lora_A"], state[f"{name}.attn.qkv.lora_B"]
        with torch.no_grad():
            for part in (0, 1):
                rows = slice(part * 24, (part + 1) * 24)
                block.attn.qkv.weight[rows] += scaling * b[rows] @ a[part * r : (part + 1) * r]


def test_lora_of_unetr():
    expected = base("unetr")
    state = qkv_tensors(expected)
    add_qkv(expected, state, 8)
    model = assert_same("unetr", state, expected)
    assert model.peft_config["default"].qkv_parts == "qk"


def test_petite_of_unetr():
    """LoRA in the transformer, SSF in one decoder block; unused pairs beside the fused ones."""
    expected = base("unetr")
    state = qkv_tensors(expected)
    add_qkv(expected, state, 8)
    norms = expected.decoder2.conv_block
    for number, norm in ((1, norms.norm1), (2, norms.norm2)):
        # A norm without a weight has its pair in float32.
        scale, shift = random(4, around=1.0).float().double(), random(4).float().double()
        state[f"decoder2.conv_block.ssf_scale_{number}"] = scale
        state[f"decoder2.conv_block.ssf_shift_{number}"] = shift
        scale_output(norm, scale, shift, dim=1)
    used = sum(v.numel() for v in state.values())
    for name in blocks(expected):
        for part in "qk":
            state[f"{name}.attn.{part}.lora_A"] = random(2, 24)
            state[f"{name}.attn.{part}.lora_B"] = random(72, 2)
    model = assert_same("unetr", state, expected)
    config = model.peft_config["default"]
    assert isinstance(config.encoder, LoraConfig) and isinstance(config.decoder, SSFConfig)
    assert not config.bitfit and model.get_nb_trainable_parameters()[0] == used


def test_ssf_of_unetr():
    """Pair 1 of a block is behind both of its norms, pair 2 nowhere."""
    expected, state = base("unetr"), {}

    def pair(owner, ending, *modules):
        width = modules[0].weight.shape[0]
        scale = state[f"{owner}.ssf_scale{ending}"] = random(width, around=1.0)
        shift = state[f"{owner}.ssf_shift{ending}"] = random(width)
        for module in modules:
            scale_output(module, scale, shift)

    pair("vit.patch_embedding", "", expected.vit.patch_embedding.patch_embeddings[1])
    pair("vit", "", expected.vit.norm)
    for name, block in blocks(expected).items():
        pair(name, "_1", block.norm1, block.norm2)
        pair(f"{name}.attn", "_1", block.attn.qkv)
        pair(f"{name}.attn", "_2", block.attn.out_proj)
        pair(f"{name}.mlp", "_1", block.mlp.linear1)
        pair(f"{name}.mlp", "_2", block.mlp.linear2)
        state |= {f"{name}.ssf_scale_2": random(24), f"{name}.ssf_shift_2": random(24)}
    assert_same("unetr", state, expected)


@pytest.mark.parametrize("deep", [False, True])
def test_token_prompts(deep, caplog):
    expected = base("unetr")
    state = {"vit.prompt_embeddings": random(1, 3, 24)}
    if deep:
        state["vit.deep_prompt_embeddings"] = random(11, 3, 24)
    vit = expected.vit

    def forward(x):
        tokens, hidden = vit.patch_embedding(x), []
        prompt = state["vit.prompt_embeddings"].expand(len(x), -1, -1)
        for i, block in enumerate(vit.blocks):
            if deep and i:
                prompt = state["vit.deep_prompt_embeddings"][i - 1].expand(len(x), -1, -1)
            both = block(torch.cat([prompt, tokens], 1))
            prompt, tokens = both[:, :3], both[:, 3:]
            hidden.append(tokens)
        return vit.norm(tokens), hidden

    vit.forward = forward
    with caplog.at_level(logging.WARNING, "petite_fast"):
        model = assert_same("unetr", state, expected)
    assert ("norm behind every block" in caplog.text) == deep
    config = model.peft_config["default"]
    assert config.deep == deep and not config.gated and config.num_prompts == {"vit": 3}


def without_last(state):
    return dict(list(state.items())[:-1])


def with_reshaped(state):
    name, value = list(state.items())[-1]
    return state | {name: value[:-1]}


REFUSED = {  # {case: (network, its file, words)}
    "channel prompts": (
        "cvtgan", lambda net: {"encoder_layer2_down.0.prompt_embeddings1": random(8, 8, 8, 8)},
        "prompt_embeddings1 holds channel prompts: they widen every layer",
    ),
    "shipped rows": (
        "cvtgan", lambda net: lora_tensors(net, rows=3),
        "does not have the 216 numbers of its kernel (8, 1, 3, 3, 3): the released code could not",
    ),
    "half a pair": (
        "cvtgan", lambda net: without_last(lora_tensors(net)),
        "decoder_layer2_up.blocks.0.attn.conv_proj_k.conv has lora_A alone, expected a pair",
    ),
    "of the other network": (
        "cvtgan", lambda net: qkv_tensors(base("unetr")),
        "vit.blocks.0.attn.qkv has a published LoRA, but this network has no such layer",
    ),
    "other width": (
        "unetr", lambda net: {k: v[:, :-1] if "A" in k else v for k, v in qkv_tensors(net).items()},
        "has lora_A (4, 23) and lora_B (48, 2), expected (2 r, 24) and (48, r) for query and key",
    ),
    "missing bias": (
        "cvtgan", lambda net: without_last(adapter_tensors(net, 2)),
        "does not fit this network: 1 tensors missing (first: decoder_layer2_up.blocks.0.mlp.adap",
    ),
    "other shape": (
        "cvtgan", lambda net: with_reshaped(adapter_tensors(net, 2)),
        "has (7,) for decoder_layer2_up.blocks.0.mlp.adapter.up.bias, expected (8,)",
    ),
    "two sizes": (
        "cvtgan", lambda net: adapter_tensors(net, 2)
        | {"encoder_layer1_down.0.blocks.0.adapter_downsample.weight": random(2, 8)},
        "the adapters have [(2, 8), (4, 8), (8, 16), (16, 32)] hidden and outer channels, expected",
    ),
    "some biases": (
        "cvtgan", lambda net: {"decoder_layer1.0.bias": random(32)}, "tensors missing (first: deco",
    ),
    "a weight": (
        "cvtgan", lambda net: {"decoder_layer1.0.weight": random(32, 32, 3, 3, 3)},
        "decoder_layer1.0.weight is a weight of the base network, which no method trains",
    ),
    "statistics": (
        "cvtgan", lambda net: {"decoder_layer1.2.running_mean": torch.zeros(32)},
        "decoder_layer1.2.running_mean has no equivalent in this network (1 such)",
    ),
    "nothing": ("cvtgan", lambda net: {}, "holds no tensors of an adapter"),
    "two methods at once": (
        "unetr", lambda net: qkv_tensors(net) | adapter_tensors(net, 2),
        "the file has two methods in the encoder",
    ),
    "uneven prompts": (
        "unetr", lambda net: {"vit.prompt_embeddings": random(1, 3, 24),
                              "vit.deep_prompt_embeddings": random(11, 4, 24)},
        "are not stacks of equally many tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    name, make_state, words = REFUSED[case]
    net, fresh = base(name), base(name)
    with pytest.raises(InputError) as caught:
        published_adapter(net, make_state(fresh))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert [type(m) for m in net.modules()] == [type(m) for m in fresh.modules()]
    for (key, value), (other, expected) in zip(
        net.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(value, expected)


def test_an_adapted_network_is_refused():
    net = get_peft_model(base("unetr"), LoraConfig(r=2))
    with pytest.raises(ValueError, match="has adapters already"):
        published_adapter(net, qkv_tensors(base("unetr")))
