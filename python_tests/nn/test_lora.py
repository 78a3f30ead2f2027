"""LoRA layers against the two-branch formula in float64; dropout, merge, precision, compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from petite_fast import FrozenConv3d, LoRAConv3d, LoRAConvTranspose3d, LoRALinear
from petite_fast.ops import dropout, saved_bytes

CONV = [
    dict(kernel_size=1),
    dict(kernel_size=2),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(1, 3, 3), padding=(0, 1, 1)),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=3, dilation=2, padding=2),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=3, padding=1, groups=4, bias=False),
    dict(kernel_size=3, stride=2, padding=1, groups=4),
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=2, padding="same"),
    dict(kernel_size=(3, 2, 1), padding="valid"),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=(1, 2, 1), padding_mode="replicate"),
    dict(kernel_size=2, padding="same", padding_mode="circular"),
]
TRANSPOSED = [
    dict(kernel_size=2, stride=2),
    dict(kernel_size=1),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    dict(kernel_size=3, stride=(1, 2, 2), padding=1, output_padding=(0, 1, 0), bias=False),
    dict(kernel_size=2, stride=2, groups=2),
    dict(kernel_size=3, stride=2, dilation=2, output_padding=1),
    dict(kernel_size=3, padding=1, groups=4),
]
CASES = [(LoRAConv3d, nn.Conv3d, case) for case in CONV]
CASES += [(LoRAConvTranspose3d, nn.ConvTranspose3d, case) for case in TRANSPOSED]
CASES += [(LoRALinear, nn.Linear, case) for case in (dict(), dict(bias=False))]
IDS = [f"{cls.__name__}-{'-'.join(f'{k}={v}' for k, v in case.items())}" for cls, _, case in CASES]


def make(cls, case, r=3, dtype=torch.float64, **options):
    """A layer 4 -> 8 with random adapters, and a base of the torch class with its weights."""
    torch.manual_seed(0)
    layer = cls(4, 8, **case, r=r, lora_alpha=6, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def make_input(cls, dtype=torch.float64):
    torch.manual_seed(1)
    shape = (2, 5, 4) if cls is LoRALinear else (2, 4, 5, 6, 7)
    return torch.randn(shape, dtype=dtype)


def plain(layer, torch_class, case):
    base = torch_class(4, 8, **case).to(layer.weight.dtype)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora" not in k})
    return base.requires_grad_(False)


def two_branches(base, x, lora_A, lora_B, scale):
    """base(x) + scale * B(A(x)) with the group and kernel conventions of the layers."""
    if isinstance(base, nn.Linear):
        return base(x) + scale * F.linear(F.linear(x, lora_A), lora_B)
    groups = base.groups
    if isinstance(base, nn.ConvTranspose3d):
        branch = 0
        low = [
            F.conv3d(part, a)
            for part, a in zip(x.chunk(groups, 1), lora_A.chunk(groups, 1), strict=True)
        ]
        branch = torch.cat(
            [
                F.conv_transpose3d(
                    part, lora_B, None, base.stride, base.padding, base.output_padding, 1,
                    base.dilation,
                )
                for part in low
            ],
            1,
        )  # fmt: skip
        return base(x) + scale * branch
    down = copy.deepcopy(base)
    down.groups, down.bias = 1, None
    low = [down._conv_forward(part, lora_A, None) for part in x.chunk(groups, 1)]
    branch = [
        F.conv3d(t, b[..., None, None, None])
        for t, b in zip(low, lora_B.chunk(groups, 0), strict=True)
    ]
    return base(x) + scale * torch.cat(branch, 1)


@pytest.mark.parametrize(("cls", "torch_class", "case"), CASES, ids=IDS)
def test_output_and_gradients_are_those_of_two_branches(cls, torch_class, case):
    layer, x = make(cls, case), make_input(cls).requires_grad_()
    if layer.bias is not None:
        layer.bias.requires_grad_()
    base = plain(layer, torch_class, case)
    if base.bias is not None:
        base.bias.requires_grad_()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x2 = x.detach().clone().requires_grad_()
    expected = two_branches(base, x2, a, b, 2.0)
    got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    got.backward(direction)
    expected.backward(direction)
    pairs = [(x, x2), (layer.lora_A, a), (layer.lora_B, b)]
    pairs += [] if base.bias is None else [(layer.bias, base.bias)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    assert layer.weight.grad is None


@pytest.mark.parametrize(("cls", "torch_class", "case"), CASES, ids=IDS)
def test_starts_as_the_layer_and_merges_exactly(cls, torch_class, case):
    torch.manual_seed(0)
    base, x = torch_class(4, 8, **case).double(), make_input(cls)
    expected = base(x).detach()
    convert = cls.from_linear if cls is LoRALinear else cls.from_conv
    layer = convert(base, r=3)
    assert layer.weight is base.weight and not base.weight.requires_grad
    assert isinstance(layer, torch_class)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.effective_weight(), base.weight)

    with torch.no_grad():
        layer.lora_B.normal_()
    merged = layer.eval().merge()
    assert type(merged) is torch_class
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in base.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(merged.weight, layer._adapters(x)[0])  # the very W_eff the layer uses
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(merged(x), expected)
        layer.lora_B.zero_()  # independent of the layer
        assert not torch.equal(merged.weight, layer.weight)


@pytest.mark.parametrize("case", [CONV[2], CONV[6]])
def test_merged_layer_runs_the_same_bits(case):
    """Batch 2, float64: torch and the layer call the same convolution."""
    layer, x = make(LoRAConv3d, case).eval(), make_input(LoRAConv3d)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.merge()(x))


def test_every_trainable_tensor_learns_within_two_steps():
    for cls, case in (
        (LoRAConv3d, CONV[2]),
        (LoRAConvTranspose3d, TRANSPOSED[0]),
        (LoRALinear, {}),
    ):
        torch.manual_seed(0)
        layer, x = cls(4, 8, **case, r=3), make_input(cls, torch.float32)
        optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        weight, moved = layer.weight.clone(), set()
        for _ in range(2):
            optimiser.zero_grad()
            layer(x).square().mean().backward()
            moved |= {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
            optimiser.step()
        assert moved == {"lora_A", "lora_B"}
        assert torch.equal(layer.weight, weight)


def test_lora_fa_keeps_r_channels_and_plain_lora_one_input():
    x = torch.randn(2, 16, 6, 6, 6)
    fa = LoRAConv3d(16, 16, 3, padding=1, r=4, train_a=False)
    both = LoRAConv3d(16, 16, 3, padding=1, r=4)
    assert not fa.lora_A.requires_grad and fa.lora_B.requires_grad
    assert saved_bytes(lambda: fa(x)) == x.nbytes * 4 // 16
    assert saved_bytes(lambda: both(x)) == x.nbytes


@pytest.mark.parametrize("r", [0, -1, 2.0, True, "8", None])
def test_bad_rank(r):
    with pytest.raises(ValueError, match="r: got"):
        LoRAConv3d(4, 8, 3, r=r)
    conv = nn.Conv3d(4, 8, 3)
    with pytest.raises(ValueError, match="r: got"):
        LoRAConv3d.convert_(conv, r=r)
    assert type(conv) is nn.Conv3d and conv.weight.requires_grad


def test_bad_dropout_and_bad_layers():
    with pytest.raises(ValueError, match="lora_dropout"):
        LoRALinear(4, 8, lora_dropout=1.0)

    class Own(nn.Conv3d):
        pass

    for module in (Own(4, 8, 3), nn.Conv2d(4, 8, 3), nn.ConvTranspose3d(4, 8, 3)):
        with pytest.raises(TypeError, match="wanted a plain torch.nn.Conv3d"):
            LoRAConv3d.from_conv(module)
    with pytest.raises(TypeError, match="wanted a plain torch.nn.Linear"):
        LoRALinear.from_linear(nn.Bilinear(2, 2, 2))


def test_conversion_in_place_keeps_hooks_and_references():
    conv = nn.Conv3d(4, 8, 3)
    net, seen = nn.Sequential(conv), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    assert LoRAConv3d.convert_(conv, r=2) is conv is net[0]
    net(torch.randn(1, 4, 4, 4, 4))
    assert seen == [1]
    assert set(net.state_dict()) == {"0.weight", "0.bias", "0.lora_A", "0.lora_B"}


def test_from_a_frozen_twin():
    frozen = FrozenConv3d(4, 8, 3)
    assert LoRAConv3d.from_conv(frozen, r=2).weight is frozen.weight


# --- dropout on the branch ------------------------------------------------------------------------

DROPOUT = [
    (LoRAConv3d, CONV[2]),
    (LoRAConv3d, CONV[6]),
    (LoRAConv3d, CONV[12]),
    (LoRAConvTranspose3d, TRANSPOSED[3]),
    (LoRAConvTranspose3d, TRANSPOSED[5]),
    (LoRALinear, {}),
]


@pytest.mark.parametrize(("cls", "case"), DROPOUT)
def test_dropout_branch(cls, case):
    """Same mask in forward and backward: output and gradients of the written-out formula."""
    layer = make(cls, case, lora_dropout=0.4).train()
    torch_class = cls.torch_class
    x = make_input(cls).requires_grad_()
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    mask = dropout(torch.ones_like(x), 0.4)
    assert (mask == 0).any()

    base = plain(layer, torch_class, case)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x2 = x.detach().clone().requires_grad_()
    unbiased = copy.deepcopy(base)
    unbiased.bias = None
    # base(x) + s B(A(mask x)) = two_branches on mask x, with base(mask x) exchanged for base(x)
    branch = two_branches(unbiased, mask * x2, a, b, 2.0) - unbiased(mask * x2)
    expected = base(x2) + branch
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    torch.manual_seed(99)  # the state of the generator must not matter to the backward
    y.backward(direction)
    expected.backward(direction)
    for ours, theirs in ((x, x2), (layer.lora_A, a), (layer.lora_B, b)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)


def test_dropout_keeps_the_input_alone_and_is_off_in_eval():
    layer = make(LoRAConv3d, dict(kernel_size=3, padding=1), dtype=torch.float32, lora_dropout=0.5)
    x = torch.randn(2, 4, 8, 8, 8)
    assert saved_bytes(lambda: layer(x)) == x.nbytes + layer.lora_B.nbytes  # scaled
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-5, atol=1e-5)


# --- precision, compile, other tensor types -------------------------------------------------------


def test_adapters_of_a_half_precision_base_are_float32():
    assert LoRAConv3d(4, 8, 3, dtype=torch.bfloat16).lora_A.dtype == torch.float32
    assert LoRAConv3d(4, 8, 3, dtype=torch.float64).lora_A.dtype == torch.float64
    linear = nn.Linear(4, 8, dtype=torch.float16)
    layer = LoRALinear.from_linear(linear, adapter_dtype=torch.float16)
    assert layer.lora_B.dtype == torch.float16
    layer = LoRAConv3d(4, 8, 3, padding=1, dtype=torch.bfloat16)
    y = layer(torch.randn(2, 4, 5, 5, 5, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_B.grad.dtype == torch.float32
    assert layer.merge().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_autocast(lora_dropout):
    layer = make(LoRAConv3d, CONV[2], dtype=torch.float32, lora_dropout=lora_dropout)
    x = make_input(LoRAConv3d, torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == x.grad.dtype == torch.float32
    if not lora_dropout:
        reference = make(LoRAConv3d, CONV[2], dtype=torch.float32)(x.detach())
        torch.testing.assert_close(y.float(), reference, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_break(training):
    layer = make(LoRAConv3d, CONV[2], dtype=torch.float32).train(training)
    x = make_input(LoRAConv3d, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).square().sum().backward()
    grad = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(grad, layer.lora_A.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        compiled(x)
        layer.lora_B.mul_(2)  # a compiled layer has nothing kept that could be stale
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_output_size_and_unbatched_input():
    layer = make(LoRAConvTranspose3d, dict(kernel_size=3, stride=2, padding=1))
    x = make_input(LoRAConvTranspose3d)
    for size in ((9, 11, 13), (10, 11, 14)):
        assert layer(x, output_size=size).shape[2:] == size
    for layer.lora_dropout in (0.0, 0.2):
        assert layer(x, (10, 12, 14)).shape[2:] == (10, 12, 14)
    conv = make(LoRAConv3d, CONV[2])
    torch.testing.assert_close(conv(x[0]), conv(x)[0])


def test_metatensor():
    data = pytest.importorskip("monai.data")
    x = data.MetaTensor(torch.randn(1, 4, 5, 5, 5))
    layer = make(LoRAConv3d, CONV[2], dtype=torch.float32)
    assert isinstance(layer(x), data.MetaTensor)
    layer.eval()
    with torch.no_grad():
        y = layer(x)
        assert isinstance(y, data.MetaTensor)
        torch.testing.assert_close(y.as_tensor(), layer(x.as_tensor()))


def test_repr_names_the_settings():
    text = repr(LoRAConv3d(4, 8, 3, groups=2, r=5, lora_dropout=0.1, train_a=False))
    for part in ("LoRAConv3d(4, 8", "groups=2", "r=5", "lora_alpha=16", "lora_dropout=0.1"):
        assert part in text
    assert "train_a=False" in text
