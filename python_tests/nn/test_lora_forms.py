"""Forms of LoRA: rslora, parts of a fused projection, updates that cross the groups."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn import LoRAConv3d, LoRAConvTranspose3d, LoRALinear
from petite_fast.ops import dropout, saved_bytes


def randomise(layer: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(4)
    return list(torch.autograd.grad(y, inputs, torch.randn_like(y)))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-11, atol=1e-11)


# --- scaling --------------------------------------------------------------------------------------


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    for layer in (
        LoRALinear(6, 4, r=4, lora_alpha=6, use_rslora=True),
        LoRALinear.from_linear(nn.Linear(6, 4), 4, 6, use_rslora=True),
        LoRAConv3d.from_conv(nn.Conv3d(6, 4, 3), 4, 6, use_rslora=True),
        LoRAConvTranspose3d.convert_(nn.ConvTranspose3d(6, 4, 2), 4, 6, use_rslora=True),
    ):
        assert layer.use_rslora and layer.scaling == 3.0
        assert "use_rslora=True" in repr(layer)
    plain = LoRALinear(6, 4, r=4, lora_alpha=6)
    assert plain.scaling == 1.5 and "rslora" not in repr(plain)


# --- fused query, key and value -------------------------------------------------------------------

PARTS = ["q", "k", "v", "qk", "qv", "kv"]


def fused(parts: str, **options: Any) -> tuple[nn.Linear, LoRALinear]:
    torch.manual_seed(0)
    base = nn.Linear(5, 12, dtype=torch.float64)  # D = 4
    layer = LoRALinear.from_linear(base, r=2, lora_alpha=6, qkv_parts=parts, **options)
    return base, randomise(layer)


def by_parts(base: nn.Linear, x: Tensor, layer: LoRALinear, a: Tensor, b: Tensor) -> Tensor:
    """q, k and v one by one, each with a LoRA of its own where there is one."""
    outputs = []
    for row, part in enumerate("qkv"):
        y = F.linear(x, base.weight[4 * row : 4 * row + 4], base.bias[4 * row : 4 * row + 4])
        if part in layer.qkv_parts:
            i = layer.qkv_parts.index(part)
            low = F.linear(x, a[2 * i : 2 * i + 2])
            y = y + 3.0 * F.linear(low, b[4 * i : 4 * i + 4])
        outputs.append(y)
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("parts", PARTS)
def test_parts_are_separate_layers(parts: str) -> None:
    base, layer = fused(parts)
    n = len(parts)
    assert layer.lora_A.shape == (2 * n, 5) and layer.lora_B.shape == (4 * n, 2)
    assert layer.scaling == 3.0 and f"qkv_parts='{parts}'" in repr(layer)
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    own = [layer.lora_A, layer.lora_B]
    y, want = layer(x), by_parts(base, x, layer, *own)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert_same(gradients(y, [x, *own]), gradients(want, [x, *own]))
    a, b = layer.factors()
    assert a is layer.lora_A and b.shape == (12, 2 * n)
    weight = base.weight + layer.scaling * b @ a
    torch.testing.assert_close(layer.effective_weight(), weight.detach())
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), want)
        torch.testing.assert_close(layer.merge()(x), want)
        layer.lora_B.zero_()  # the kept W_eff is made anew
        torch.testing.assert_close(layer(x), base(x))


def test_parts_round_trip() -> None:
    base, layer = fused("qk")
    x = torch.randn(3, 5, dtype=torch.float64)
    want, weight = layer(x).detach(), layer.weight
    layer.fold_()
    torch.testing.assert_close(layer(x), want)
    layer.unfold_()
    assert layer.weight is weight
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.qkv_parts == "qk" and torch.equal(twin(x), want)
    layer.release_(merge=True)
    assert set(layer.__dict__) == set(base.__dict__)
    torch.testing.assert_close(layer(x), want)


def test_parts_keep_x_and_the_block_structured_b() -> None:
    _, layer = fused("qk")
    x = torch.randn(50, 5, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == x.nbytes + 12 * 4 * 8
    layer = LoRALinear(5, 12, r=2, dtype=torch.float64)
    assert saved_bytes(lambda: layer(x)) == x.nbytes


def test_parts_with_dropout() -> None:
    base, layer = fused("qv", lora_dropout=0.5)
    layer.train()
    x = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    own = [layer.lora_A, layer.lora_B]
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    mask = dropout(torch.ones_like(x), 0.5)
    a, b = layer.factors()
    want = base(x) + 3.0 * F.linear(F.linear(mask * x, a), b)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert_same(gradients(y, [x, *own]), gradients(want, [x, *own]))


def test_parts_compile_and_autocast() -> None:
    layer = randomise(LoRALinear(5, 12, r=2, qkv_parts="qk"))
    x = torch.randn(3, 5, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, traced = layer(x), compiled(x)
    torch.testing.assert_close(traced, y)
    for a, b in zip(gradients(traced, inputs), gradients(y, inputs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.03, atol=0.1)
    assert all(g.dtype == torch.float32 for g in gradients(half, inputs))


def test_parts_are_checked() -> None:
    for bad in ("", "vk", "qq", "x", None):
        with pytest.raises(ValueError, match="qkv_parts: got"):
            LoRALinear(6, 9, qkv_parts=bad)
    linear = nn.Linear(6, 8)
    with pytest.raises(ValueError, match="of 8 outputs, wanted a multiple of 3"):
        LoRALinear.convert_(linear, qkv_parts="qk")
    assert type(linear) is nn.Linear and linear.weight.requires_grad
    assert LoRALinear.convert_(linear, r=2, qkv_parts="qkv").lora_B.shape == (8, 2)
    with pytest.raises(TypeError, match="qkv_parts"):
        LoRAConv3d.convert_(nn.Conv3d(3, 3, 3), qkv_parts="qk")


# --- crossing the groups --------------------------------------------------------------------------

GROUPED = [
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=3, stride=2, padding=1, groups=2, bias=False),
    dict(kernel_size=(1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=4),
    dict(kernel_size=1, groups=2),
]


def crossing(case: dict[str, Any], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Conv3d(4, 8, **case, dtype=dtype)
    layer = LoRAConv3d.from_conv(base, r=4, lora_alpha=6, crossing=True, **options)
    return base, randomise(layer)


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_crossing_is_hugging_faces_layer(case: dict[str, Any], use_rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    base, layer = crossing(case, use_rslora=use_rslora)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], use_rslora=use_rslora, lora_dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be merged
        net = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)))
    down, up = net[0].lora_A["default"].weight, net[0].lora_B["default"].weight
    assert down.shape == layer.lora_A.shape and up.shape == (*layer.lora_B.shape, 1, 1, 1)
    with torch.no_grad():
        down.copy_(layer.lora_A)
        up.copy_(layer.lora_B[..., None, None, None])
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), net(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same(gradients(ours, [x, layer.lora_A, layer.lora_B]), gradients(theirs, [x, down, up]))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        dict(kernel_size=3, padding=2, dilation=2, groups=2),
        dict(kernel_size=3, padding=1, groups=2, padding_mode="circular"),
        dict(kernel_size=2, padding="same", groups=4, padding_mode="reflect"),
    ],
)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_crossing_has_the_geometry_of_the_convolution(
    case: dict[str, Any], lora_dropout: float
) -> None:
    base, layer = crossing(case, lora_dropout=lora_dropout)
    layer.train()
    down = nn.Conv3d(4, 4, **case | {"groups": 1}, bias=False, dtype=torch.float64)
    own = [layer.lora_A, layer.lora_B]
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    mask = dropout(torch.ones_like(x), lora_dropout)
    low = down._conv_forward(mask * x, layer.lora_A, None)
    branch = F.conv3d(low, layer.lora_B[..., None, None, None], groups=base.groups)
    want = base(x) + 1.5 * branch
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert_same(gradients(y, [x, *own]), gradients(want, [x, *own]))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_crossing_keeps_x_once() -> None:
    _, layer = crossing(GROUPED[0], torch.float32)
    x = torch.randn(2, 4, 5, 6, 7, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == x.nbytes + layer.lora_B.nbytes  # scaled


def test_crossing_cannot_be_folded() -> None:
    base, layer = crossing(GROUPED[0])
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    want, names = layer(x).detach(), set(layer.state_dict())
    for attempt in (
        layer.fold_,
        layer.merge,
        layer.effective_weight,
        lambda: layer.release_(merge=True),
    ):
        with pytest.raises(ValueError, match="crossing: .* cannot be folded in or merged"):
            attempt()
    assert not layer.is_folded and set(layer.state_dict()) == names
    assert torch.equal(layer(x), want)
    layer.release_(merge=False)
    assert type(layer) is nn.Conv3d and set(layer.__dict__) == set(base.__dict__)
    torch.testing.assert_close(layer(x), base(x))


def test_crossing_starts_as_the_layer_and_learns() -> None:
    torch.manual_seed(0)
    base = nn.Conv3d(4, 8, 3, padding=1, groups=2)
    layer = LoRAConv3d.convert_(copy.deepcopy(base), r=4, crossing=True)
    x = torch.randn(2, 4, 5, 6, 7)
    assert torch.equal(layer(x), base(x)) and "crossing=True" in repr(layer)
    optimiser, moved = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1), set()
    for _ in range(2):
        optimiser.zero_grad()
        layer(x).square().mean().backward()
        moved |= {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    assert moved == {"lora_A", "lora_B"}


def test_crossing_compile_autocast_and_copies() -> None:
    _, layer = crossing(GROUPED[1], torch.float32)
    x = torch.randn(2, 4, 5, 6, 7, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, traced = layer(x), compiled(x)
    torch.testing.assert_close(traced, y)
    for a, b in zip(gradients(traced, inputs), gradients(y, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.float(), y, rtol=0.05, atol=0.05 * float(y.detach().abs().max())
    )
    assert all(g.dtype == torch.float32 for g in gradients(half, inputs))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.crossing and torch.equal(twin(x), y)
    torch.testing.assert_close(layer(x[0]), y[0])


def test_crossing_is_checked() -> None:
    conv = nn.Conv3d(4, 8, 3, groups=2)
    for module, r in ((conv, 3), (nn.Conv3d(4, 8, 3), 4)):
        with pytest.raises(ValueError, match="wanted groups > 1 that divide r"):
            LoRAConv3d.convert_(module, r=r, crossing=True)
    with pytest.raises(ValueError, match="crossing"):
        LoRAConv3d(4, 8, 3, groups=2, r=3, crossing=True)
    assert type(conv) is nn.Conv3d and conv.weight.requires_grad
    with pytest.raises(TypeError, match="crossing"):
        LoRALinear(4, 8, crossing=True)
