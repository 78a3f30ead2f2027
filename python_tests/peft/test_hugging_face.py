"""LoRA adapters to and from Hugging Face PEFT: outputs, gradients and merged weights in float64."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import safetensors.torch
import torch
from peft_cases import run, scramble
from torch import nn

from petite_fast import LoraConfig, LoRAConv3d, PeftModel, get_peft_model
from petite_fast.errors import InputError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EXACT = {"rtol": 1e-11, "atol": 1e-12}
CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Attention(nn.Module):
    """Fused query, key and value with one head."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


class Net(nn.Module):
    """Every kind of layer that PEFT has LoRA for: [N, 2, D, H, W] -> [N, T, 3]."""

    def __init__(self):
        super().__init__()
        self.k3 = nn.Conv3d(2, 6, 3, padding=1)
        self.k1 = nn.Conv3d(6, 6, 1, bias=False)
        self.stride = nn.Conv3d(6, 6, 3, stride=2, padding=1)
        self.flat = nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1))
        self.attn = Attention()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = self.flat(torch.relu(self.stride(torch.relu(self.k1(torch.relu(self.k3(x)))))))
        y = y.flatten(2).transpose(1, 2)
        return self.head(y + self.attn(y))


def make(cls=Net):
    torch.manual_seed(0)
    return cls().double()


@pytest.fixture
def x():
    return torch.randn(2, 2, 4, 6, 5, dtype=torch.float64, generator=torch.manual_seed(1))


def open_theirs(base, directory, **options):
    return peft.PeftModel.from_pretrained(base, directory, autocast_adapter_dtype=False, **options)


def adapt_theirs(base, **settings):
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    return scramble(theirs)


def in_our_shape(layer, leaf, value):
    """A gradient of PEFT's lora_A or lora_B in the shape of ours."""
    parts = getattr(layer, "qkv_parts", "qkv")
    if leaf == "lora_B" and parts != "qkv":
        r, depth = layer.r, layer.out_features // 3
        rows = [("qkv".index(part) * depth, i * r) for i, part in enumerate(parts)]
        return torch.cat([value[row : row + depth, col : col + r] for row, col in rows])
    return value.reshape(getattr(layer, leaf).shape)


def assert_same(ours, theirs, x, merges=True):
    """Outputs, gradients of A and B, and the weights after merging."""
    ours.train(), theirs.train()
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, **EXACT)
    (y.sin().sum()).backward(), (z.sin().sum()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    count = 0
    for name, p in ours.named_parameters():
        if p.requires_grad:
            path, _, leaf = name.rpartition(".")
            grad = gradients[f"{PREFIX}{name}.default.weight"]
            grad = in_our_shape(ours.get_submodule(path), leaf, grad)
            assert grad.abs().max() > 1e-6
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-11)
            count += 1
    assert count and count == 2 * sum(hasattr(m, "lora_A") for m in ours.modules())
    if merges:
        merged = theirs.merge_and_unload().state_dict()
        for name, value in ours.merge_and_unload().state_dict().items():
            torch.testing.assert_close(value, merged[name], **EXACT)


# PEFT cannot merge a 1x1x1 Conv3d (it takes it for a 1x1 Conv2d).
EVERYTHING_ELSE = ["k3", "stride", "flat", "qkv", "head"]
TO_THEIRS = {
    "k3": LoraConfig(r=4, target_modules=["k3"]),
    "k1": LoraConfig(r=4, lora_alpha=3, target_modules=["k1"]),
    "stride": LoraConfig(r=4, target_modules="stride"),
    "flat": LoraConfig(r=4, target_modules=["flat"]),
    "linear": LoraConfig(r=2, target_modules=["head"]),
    "everything": LoraConfig(r=2, lora_alpha=5),
    "rslora": LoraConfig(r=4, lora_alpha=3, target_modules=EVERYTHING_ELSE, use_rslora=True),
    "q": LoraConfig(r=2, target_modules=["qkv"], qkv_parts="q"),
    "qv": LoraConfig(r=2, lora_alpha=3, target_modules=["qkv"], qkv_parts="qv"),
    "kv-rslora": LoraConfig(r=3, target_modules=["qkv"], qkv_parts="kv", use_rslora=True),
    "patterns": LoraConfig(
        r=2,
        target_modules=EVERYTHING_ELSE,
        rank_pattern={"k3": 3, "attn.qkv": 1},
        alpha_pattern={"head": 5},
    ),
    "parts-and-patterns": LoraConfig(
        r=2,
        target_modules=EVERYTHING_ELSE,
        qkv_parts="qk",
        rank_pattern={"k.": 3},
        alpha_pattern={"head": 5, "qkv": 7},
    ),
}


@pytest.mark.parametrize("case", TO_THEIRS)
def test_theirs_opens_ours(tmp_path, x, case):
    config = TO_THEIRS[case]
    ours = scramble(get_peft_model(make(), config))
    ours.save_pretrained(tmp_path, {"scanner": "63"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = open_theirs(make(), tmp_path, is_trainable=True)
    assert not [w for w in caught if "missing adapter keys" in str(w.message).lower()]
    adapted = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {f"{PREFIX}{n}" for n, m in ours.named_modules() if hasattr(m, "lora_A")}

    again = PeftModel.from_pretrained(make(), tmp_path)
    assert again.peft_config == {"default": config}
    assert torch.equal(run(again, x), run(ours, x))
    assert not torch.allclose(run(make(), x), run(ours, x), rtol=1e-7)
    assert_same(ours, theirs, x, merges=case not in ("k1", "everything"))


FROM_THEIRS = {
    "k3": {"r": 4, "lora_alpha": 10, "target_modules": ["k3"]},
    "k1": {"r": 4, "target_modules": ["k1"]},
    "stride": {"r": 4, "target_modules": "str.*"},
    "flat": {"r": 4, "target_modules": ["flat"]},
    "linear": {"r": 2, "target_modules": ["head"], "init_lora_weights": "gaussian"},
    "qkv": {"r": 2, "target_modules": ["qkv"], "init_lora_weights": False},
    "rslora": {"r": 4, "target_modules": EVERYTHING_ELSE, "use_rslora": True},
    "patterns": {
        "r": 2,
        "target_modules": EVERYTHING_ELSE,
        "rank_pattern": {"k3": 3, "^attn.qkv": 1},
        "alpha_pattern": {"head": 5, "flat": 1},
    },
}


@pytest.mark.parametrize("case", FROM_THEIRS)
def test_ours_opens_theirs(tmp_path, x, caplog, case):
    settings = FROM_THEIRS[case]
    theirs = adapt_theirs(make(), **settings)
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "petite_fast"):
        ours = PeftModel.from_pretrained(make(), tmp_path)
    assert [r for r in caplog.records if "could not be checked" in r.getMessage()]
    config = ours.peft_config["default"]
    assert config.r == settings["r"] and config.lora_alpha == settings.get("lora_alpha", 8)
    assert config.use_rslora == settings.get("use_rslora", False)
    assert_same(ours, theirs, x, merges=case != "k1")


def test_theirs_can_be_loaded_beside_ours(tmp_path, x):
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["k3", "head"]}
    theirs = adapt_theirs(make(), **settings)
    theirs.save_pretrained(tmp_path)
    ours = get_peft_model(make(), LoraConfig(**settings))
    assert ours.load_adapter(tmp_path, "theirs")["base_model_sha256"] is None
    ours.set_adapter("theirs")
    torch.testing.assert_close(run(ours, x), run(theirs, x), **EXACT)
    other = get_peft_model(make(), LoraConfig(**settings | {"lora_alpha": 4}))
    with pytest.raises(
        InputError, match="has r=2, lora_alpha=3, .* 'k3', expected r=2, lora_alpha=4"
    ):
        other.load_adapter(tmp_path, "theirs")


def test_injected_by_theirs(tmp_path, x):
    """Their functional way: a config, a state dict and a network of one's own."""
    ours = scramble(get_peft_model(make(), LoraConfig(r=2, qkv_parts="qk")))
    ours.save_pretrained(tmp_path)
    net = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(tmp_path), make())
    tensors = safetensors.torch.load_file(tmp_path / MODEL)
    state = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    assert not peft.set_peft_model_state_dict(net, state).unexpected_keys
    torch.testing.assert_close(run(net, x), run(ours, x), **EXACT)


def test_ours_through_theirs_and_back(tmp_path, x):
    """What PEFT writes again is PEFT's: the fused parts are one adapter of twice the rank."""
    ours = scramble(get_peft_model(make(), TO_THEIRS["parts-and-patterns"]))
    ours.save_pretrained(tmp_path / "ours")
    open_theirs(make(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert "petite_fast" not in json.loads((tmp_path / "theirs" / CONFIG).read_text())
    back = PeftModel.from_pretrained(make(), tmp_path / "theirs")
    torch.testing.assert_close(run(back, x), run(ours, x), **EXACT)
    assert back.attn.qkv.lora_A.shape == (4, 6) and back.attn.qkv.lora_B.shape == (18, 4)


def test_a_fused_part_with_numbers_elsewhere_is_refused(tmp_path):
    ours = scramble(get_peft_model(make(), TO_THEIRS["qv"]))
    ours.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / MODEL)
    tensors[f"{PREFIX}attn.qkv.lora_B.weight"][6, 0] = 1e-9
    safetensors.torch.save_file(tensors, tmp_path / MODEL)
    with pytest.raises(InputError, match="attn.qkv.lora_B.weight is not zero outside its blocks"):
        PeftModel.from_pretrained(make(), tmp_path)


class Ambiguous(nn.Module):
    """`conv` as the end of another name, of a layer that LoRA leaves alone."""

    peft_unused = r"old\."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 6, 3, padding=1)
        self.old = nn.ModuleDict({"conv": nn.Conv3d(6, 6, 1)})

    def forward(self, x):
        return self.conv(x)


def test_theirs_adapts_the_same_modules_and_no_more(tmp_path, x):
    ours = scramble(get_peft_model(make(Ambiguous), LoraConfig(r=2)))
    ours.save_pretrained(tmp_path)
    theirs = open_theirs(make(Ambiguous), tmp_path)
    assert [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")] == [f"{PREFIX}conv"]
    torch.testing.assert_close(run(theirs, x), run(ours, x), **EXACT)


# --- layers that only one of the two has ----------------------------------------------------------


def convolution(**options):
    torch.manual_seed(0)
    cls = options.pop("cls", nn.Conv3d)
    return nn.Sequential(cls(4, 8, 3, **options)).double()


def test_their_grouped_form(tmp_path):
    """lora_A dense, lora_B grouped: an update across the groups, in layers of their own kind."""
    theirs = adapt_theirs(convolution(groups=2, padding=1), r=4, target_modules=["0"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(convolution(groups=2, padding=1), tmp_path / "theirs")
    assert type(ours[0]) is LoRAConv3d and ours[0].crossing
    assert ours[0].lora_A.shape == (4, 4, 3, 3, 3) and ours[0].lora_B.shape == (8, 2)
    x = torch.randn(2, 4, 5, 4, 3, dtype=torch.float64)
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(convolution(groups=2, padding=1), tmp_path / "ours")
    assert again[0].crossing and torch.equal(run(again, x), run(ours, x))
    reopened = open_theirs(convolution(groups=2, padding=1), tmp_path / "ours")
    torch.testing.assert_close(run(reopened, x), run(theirs, x), **EXACT)
    assert_same(ours, theirs, x, merges=False)

    record = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(record | {"r": 3}))
    net = convolution(groups=2, padding=1)
    with pytest.raises(InputError, match="knows no single lora_A for all groups"):
        PeftModel.from_pretrained(net, tmp_path / "theirs")
    assert type(net[0]) is nn.Conv3d
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(record))
    same_rank = get_peft_model(convolution(groups=2, padding=1), LoraConfig(r=4, lora_alpha=8))
    with pytest.raises(InputError, match="knows no single lora_A for all groups, as '0' has"):
        same_rank.load_adapter(tmp_path / "theirs", "new")


@pytest.mark.parametrize(
    "options",
    [
        {"cls": nn.ConvTranspose3d},
        {"groups": 2},
        {"groups": 4},
        {"padding": 1, "padding_mode": "reflect"},
        {"dilation": 2, "padding": 2},
    ],
    ids=str,
)
def test_theirs_refuses_what_it_cannot_compute(tmp_path, options):
    ours = scramble(get_peft_model(convolution(**options), LoraConfig(r=4)))
    ours.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="not supported|size mismatch"):
        open_theirs(convolution(**options), tmp_path)
    x = torch.randn(1, 4, 6, 6, 6, dtype=torch.float64)
    again = PeftModel.from_pretrained(convolution(**options), tmp_path)
    assert torch.equal(run(again, x), run(ours, x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode 'reflect', as '0' has"),
        ({"dilation": 2, "padding": 2}, "dilation, as '0' has"),
    ],
)
def test_ours_refuses_what_theirs_computes_otherwise(tmp_path, options, words):
    adapt_theirs(convolution(**options), r=2, target_modules=["0"]).save_pretrained(tmp_path)
    net = convolution(**options)
    with pytest.raises(InputError, match=words):
        PeftModel.from_pretrained(net, tmp_path)
    assert type(net[0]) is nn.Conv3d and list(net.state_dict()) == ["0.weight", "0.bias"]
