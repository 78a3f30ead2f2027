"""MLPs that keep their input alone: the same numbers and draws, and to the byte what is kept."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from petite_fast.models.cvt import Mlp
from petite_fast.nn import LoRALinear
from petite_fast.nn.lean import RecomputedTwin
from petite_fast.ops import dropout, saved_bytes
from petite_fast.ops.compress import storage

TOKENS, WIDTH = (2, 64), 32
INPUT = 8 * 2 * 64 * WIDTH  # bytes in float64
SEEDS = 2 * 8  # of both dropouts


@pytest.fixture(autouse=True)
def _draws_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of the plain module draws as `ops.dropout` does."""

    def stand_in(x, p, training, inplace=False):
        return dropout(x, p) if training and p > 0 else x

    monkeypatch.setattr(torch.nn.functional, "dropout", stand_in)


def freeze_weights(mlp: nn.Module) -> None:
    for name, p in mlp.named_parameters():
        p.requires_grad_(name.endswith("bias"))


def lora(names: tuple[str, ...], **options):
    def adapt(mlp: nn.Module) -> None:
        mlp.requires_grad_(False)
        for name in names:
            layer = LoRALinear.convert_(mlp.get_submodule(name), r=4, **options)
            nn.init.normal_(layer.lora_B)

    return adapt


ADAPT = {
    "all": lambda mlp: None,
    "bitfit": freeze_weights,
    "frozen": lambda mlp: mlp.requires_grad_(False),
    "lora": lora(("fc1", "fc2")),
    "lora-fc1": lora(("fc1",)),
    "lora-fc2": lora(("fc2",)),
    "lora-fa": lora(("fc1", "fc2"), train_a=False),
    "lora-dropout": lora(("fc1", "fc2"), lora_dropout=0.3),
}


def make(adapt: str, drop: float = 0.0, dtype=torch.float64) -> Mlp:
    torch.manual_seed(0)
    mlp = Mlp(WIDTH, drop).to(dtype)
    ADAPT[adapt](mlp)
    return mlp


def tokens(dtype=torch.float64, requires_grad: bool = True) -> torch.Tensor:
    x = torch.randn(*TOKENS, WIDTH, dtype=dtype)
    x[:, :3] = 0  # such rows are zero behind a layer without bias
    return x.requires_grad_(requires_grad)


def results(mlp: nn.Module, *args: torch.Tensor, context=nullcontext, times: int = 1):
    torch.manual_seed(1)
    with context():
        y = mlp(*args)
    after = torch.rand(())  # the generator must stand where it would
    wanted = [t for t in (*args, *mlp.parameters()) if t.requires_grad]
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).square().sum()
    for _ in range(times):
        found = torch.autograd.grad(loss, wanted, retain_graph=True) if wanted else ()
    return y.detach(), after, *found


def assert_same(mlp: nn.Module, *args: torch.Tensor, rtol: float = 1e-12, **options) -> None:
    plain, lean = copy.deepcopy(mlp), RecomputedTwin.become_(copy.deepcopy(mlp))
    theirs, ours = (results(m, *args, **options) for m in (plain, lean))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.25])
@pytest.mark.parametrize("adapt", ADAPT)
def test_numbers_and_draws_are_the_modules(adapt, drop, requires_grad) -> None:
    x = tokens(requires_grad=requires_grad)
    if adapt == "frozen" and not requires_grad:
        pytest.skip("nothing to differentiate")
    assert_same(make(adapt, drop), x)


@pytest.mark.parametrize("adapt", ["bitfit", "lora"])
def test_a_second_backward(adapt) -> None:
    assert_same(make(adapt), tokens(), times=2)


@pytest.mark.parametrize("adapt", ["bitfit", "lora"])
def test_prompt_term(adapt) -> None:
    term = torch.randn(1, TOKENS[1], 4 * WIDTH, dtype=torch.float64, requires_grad=True)
    assert_same(make(adapt, 0.25), tokens(), term)
    assert_same(make(adapt), tokens(), term * 2)


@pytest.mark.parametrize("adapt", ADAPT)
def test_autocast(adapt) -> None:
    def context():
        return torch.autocast("cpu", torch.bfloat16)

    x = tokens(torch.float32)
    assert_same(make(adapt, dtype=torch.float32), x, context=context, rtol=1e-6)
    assert_same(make(adapt, 0.25, torch.float32), x, context=context, rtol=1e-6)


@pytest.mark.parametrize("adapt", ["bitfit", "lora"])
def test_8_bits_change_nothing_here(adapt) -> None:
    def context():
        return storage("int8")

    mlp, x = make(adapt, dtype=torch.float32), tokens(torch.float32)
    lean = RecomputedTwin.become_(copy.deepcopy(mlp))
    for a, b in zip(results(lean, x, context=context), results(mlp, x), strict=True):
        torch.testing.assert_close(a, b)


KEPT = {
    ("bitfit", 0.0): INPUT, ("bitfit", 0.25): INPUT + SEEDS, ("frozen", 0.0): INPUT,
    ("lora", 0.0): INPUT, ("lora", 0.25): INPUT + SEEDS, ("lora-fc1", 0.25): INPUT + SEEDS,
    ("lora-fc2", 0.0): INPUT, ("lora-fa", 0.0): INPUT, ("all", 0.0): INPUT,
}  # fmt: skip


@pytest.mark.parametrize(("adapt", "drop"), KEPT)
def test_bytes(adapt, drop) -> None:
    mlp, x = RecomputedTwin.become_(make(adapt, drop)), tokens()
    assert saved_bytes(lambda: mlp(x)) == KEPT[adapt, drop]


@pytest.mark.parametrize(("adapt", "first", "act", "second"), [
    ("bitfit", 2, 1, 1), ("lora", 2, 2, 1), ("all", 2, 2, 1),
])  # fmt: skip
def test_what_is_computed_again(adapt, first, act, second) -> None:
    """And hooks: they see every call of the layers."""
    mlp, calls = RecomputedTwin.become_(make(adapt)), []
    for name in ("fc1", "act", "fc2"):
        mlp.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: calls.append(n))
    y = mlp(tokens())
    assert calls == ["fc1", "act", "fc2"]
    y.sum().backward()
    assert calls.count("fc1") == first and calls.count("act") >= act


def test_a_hook_on_a_dropout_sees_its_input() -> None:
    mlp, seen = RecomputedTwin.become_(make("bitfit", 0.25)), []
    mlp.drop.register_forward_hook(lambda module, args, y: seen.append(args[0].shape[-1]))
    mlp(tokens())
    assert seen == [4 * WIDTH, WIDTH]


def test_without_a_graph() -> None:
    mlp, x = make("lora", 0.25).eval(), tokens()
    lean = RecomputedTwin.become_(copy.deepcopy(mlp))
    with torch.no_grad():
        assert torch.equal(lean(x), mlp(x))
    x = tokens(requires_grad=False)
    assert torch.equal(RecomputedTwin.become_(make("frozen"))(x), make("frozen")(x))


def test_monais_block() -> None:
    blocks = pytest.importorskip("monai.networks.blocks.mlp")
    for mode in ("vit", "swin", "vista3d"):
        for act in ("GELU", "GEGLU"):
            mlp = blocks.MLPBlock(WIDTH, 48, 0.25, act=act, dropout_mode=mode).double()
            freeze_weights(mlp)
            assert_same(mlp, tokens())
            assert_same(mlp.eval(), tokens())
