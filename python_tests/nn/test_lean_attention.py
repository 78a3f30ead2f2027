"""MONAI's window attention by the fused product: the module's numbers, and less kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from petite_fast import BitFitConfig, get_peft_model
from petite_fast.nn import lean_attention
from petite_fast.nn.lean_attention import LeanSwinBlockTwin, LeanWindowAttentionTwin
from petite_fast.ops import saved_bytes

swin = pytest.importorskip("monai.networks.nets.swin_unetr")

WINDOW, HEADS, WIDTH = (3, 3, 3), 2, 8
N = 27


def make(dtype=torch.float64, drop: float = 0.0, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    module = swin.WindowAttention(WIDTH, HEADS, WINDOW, qkv_bias=bias, attn_drop=drop).to(dtype)
    nn.init.normal_(module.relative_position_bias_table)
    module.relative_position_bias_table.requires_grad_(False)
    return module


def shifted() -> torch.Tensor:
    """[8, 27, 27], as MONAI makes it for 2 x 2 x 2 windows."""
    return swin.compute_mask([6, 6, 6], WINDOW, (1, 1, 1), torch.device("cpu"))


def windows(count: int, n: int = N, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, n, WIDTH, dtype=dtype, requires_grad=True)


def results(module: nn.Module, x: torch.Tensor, mask) -> list[torch.Tensor]:
    y = module(x, mask)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weight).sum(), wanted)]


def assert_same(module: nn.Module, x: torch.Tensor, mask=None, **tolerance: float) -> None:
    lean = LeanWindowAttentionTwin.become_(copy.deepcopy(module))
    for a, b in zip(results(lean, x, mask), results(module, x, mask), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers(dtype, bias) -> None:
    module, tolerance = make(dtype, bias=bias), {}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-10, "atol": 1e-12}
    assert_same(module, windows(4, dtype=dtype), **tolerance)
    assert_same(module, windows(4, n=8, dtype=dtype), **tolerance)  # a smaller window
    assert_same(module, windows(16, dtype=dtype), shifted().to(dtype), **tolerance)


def test_other_masks() -> None:
    mask = torch.randn(4, N, N, dtype=torch.float64)
    mask[2] = mask[0]
    assert_same(make(), windows(8), mask, rtol=1e-10, atol=1e-12)


def test_autocast() -> None:
    x, module = windows(8, dtype=torch.float32), make(torch.float32)
    lean = LeanWindowAttentionTwin.become_(copy.deepcopy(module))
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = lean(x, shifted()), module(x, shifted())
    assert y.dtype == theirs.dtype
    torch.testing.assert_close(y, theirs, rtol=2e-2, atol=2e-2)


def test_only_the_qkv_bias_trains() -> None:
    module = make()
    for name, p in module.named_parameters():
        p.requires_grad_(name == "qkv.bias")
    assert_same(module, windows(8).detach().requires_grad_(), shifted(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["table", "dropout", "hook"])
def test_the_modules_own_where_the_matrix_is_wanted(case) -> None:
    module, seen = make(drop=0.5 if case == "dropout" else 0.0), []
    if case == "table":
        module.relative_position_bias_table.requires_grad_(True)
    lean = LeanWindowAttentionTwin.become_(copy.deepcopy(module))
    if case == "hook":
        lean.softmax.register_forward_hook(lambda _, args, y: seen.append(y.shape))
    x, found = windows(8), []
    for each in (lean, module):
        torch.manual_seed(1)
        found.append(results(each, x, shifted()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert seen == ([(8, HEADS, N, N)] if case == "hook" else [])


@pytest.mark.parametrize("masked", [False, True])
def test_bytes(masked) -> None:
    """q, k, v and the output; a row's sum; a matrix per different mask, whatever the batch."""
    module, batch = make(torch.float32).requires_grad_(False), 32
    module.qkv.bias.requires_grad_(True)
    lean = LeanWindowAttentionTwin.become_(module)
    x, mask = windows(8 * batch, dtype=torch.float32), shifted() if masked else None
    tokens, matrix = 4 * 8 * batch * N, 4 * HEADS * N * N
    kept = saved_bytes(lambda: lean(x, mask))
    assert kept <= tokens * (4 * WIDTH + HEADS) + matrix * (8 if masked else 1) + 1024


def test_swin_unetr_keeps_less() -> None:
    pytest.importorskip("einops")
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(0)
    net = SwinUNETR(1, 1, feature_size=12, depths=(2, 1, 1, 1))
    model = get_peft_model(net, BitFitConfig()).train()
    twins = [m for m in model.modules() if isinstance(m, LeanWindowAttentionTwin)]
    assert len(twins) == 5
    x = torch.randn(1, 1, 32, 32, 64)
    lean = saved_bytes(lambda: model(x).square().mean())
    grads = [torch.autograd.grad(model(x).square().mean(), twins[1].qkv.bias)[0]]
    for twin in twins:
        twin.leave_()
    plain = saved_bytes(lambda: model(x).square().mean())
    grads.append(torch.autograd.grad(model(x).square().mean(), twins[1].qkv.bias)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-7)
    assert lean < 0.7 * plain


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_mask_is_looked_at_once_for_each_size(use_checkpoint, monkeypatch) -> None:
    """Sizes with as many windows have different masks; the second step looks at none."""
    torch.manual_seed(0)
    options = {"shift_size": (1, 1, 1), "use_checkpoint": use_checkpoint}
    block = swin.SwinTransformerBlock(WIDTH, HEADS, WINDOW, **options).double()
    block.attn.relative_position_bias_table.requires_grad_(False)
    lean = LeanSwinBlockTwin.become_(copy.deepcopy(block))
    LeanWindowAttentionTwin.become_(lean.attn)
    looked, groups = [], lean_attention._groups
    monkeypatch.setattr(lean_attention, "_groups", lambda m: looked.append(m) or groups(m))
    monkeypatch.setattr(lean_attention, "_groupings", {})
    sizes = [(6, 6, 9), (9, 6, 6), (6, 6, 8)]  # the last is padded to the first
    for step in range(2):
        steps = []
        for net in (block, lean):
            total = 0.0
            for size in sizes:
                x = torch.linspace(-1, 1, 2 * WIDTH * size[0] * size[1] * size[2]).double()
                padded = [-(-n // 3) * 3 for n in size]
                mask = swin.compute_mask(padded, WINDOW, (1, 1, 1), torch.device("cpu"))
                total = total + net(x.sin().view(2, *size, WIDTH), mask).square().sum()
            steps.append([total, *torch.autograd.grad(total, [net.mlp.linear1.weight,
                                                              net.attn.qkv.weight])])  # fmt: skip
        for a, b in zip(*steps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert len(looked) == len(sizes), step
    assert lean.attn.mask_key is None


def test_a_mask_first_seen_in_inference_serves_a_step(monkeypatch) -> None:
    monkeypatch.setattr(lean_attention, "_groupings", {})
    block = swin.SwinTransformerBlock(WIDTH, HEADS, WINDOW, shift_size=(1, 1, 1))
    block.attn.relative_position_bias_table.requires_grad_(False)
    lean = LeanSwinBlockTwin.become_(block)
    LeanWindowAttentionTwin.become_(lean.attn)
    mask = swin.compute_mask([6, 6, 9], WINDOW, (1, 1, 1), torch.device("cpu"))
    x = torch.randn(2, 6, 6, 9, WIDTH)
    with torch.inference_mode():
        seen = lean(x, mask)
    assert len(lean_attention._groupings) == 1
    y = lean(x, mask)
    y.sum().backward()
    torch.testing.assert_close(y, seen)
    assert lean.attn.qkv.weight.grad.isfinite().all()


def test_what_has_no_values_is_not_remembered(monkeypatch) -> None:
    """Nor does it meet what is remembered: a memory estimate before training, and after."""
    monkeypatch.setattr(lean_attention, "_groupings", {})
    lean = LeanWindowAttentionTwin.become_(make())
    lean.mask_key = "a size"
    monkeypatch.setattr(lean_attention, "_groups", lambda mask: [[0, 1]])

    def without_values() -> None:
        lean._grouping(torch.empty(2, N, N, device="meta"))
        with FakeTensorMode():
            assert type(lean._grouping(torch.empty(2, N, N)).order) is FakeTensor

    without_values()
    assert lean_attention._groupings == {}
    lean._grouping(torch.empty(2, N, N))
    kept = dict(lean_attention._groupings)
    assert list(kept) == ["a size"] and type(kept["a size"].order) is torch.Tensor
    without_values()
    assert lean_attention._groupings == kept
