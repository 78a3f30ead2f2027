"""Every method on every network: the shared checks."""

from __future__ import annotations

import copy

import pytest
import torch
from peft_cases import CASES, build, inputs, run, scramble
from torch import nn
from torch.utils.checkpoint import checkpoint

from petite_fast import LoraConfig, MixConfig, PeftModel, get_peft_model
from petite_fast.peft.methods.adapter import AdapterSite
from petite_fast.peft.methods.prompt import PromptSite
from petite_fast.peft.methods.ssf import SSFSite

pytest.importorskip("monai")
pytest.importorskip("dynamic_network_architectures")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """(network name, base network, adapted copy of it): for looking, not for changing."""
    name, config = CASES[request.param]
    base = build(name)
    return name, base, get_peft_model(copy.deepcopy(base), config)


@pytest.fixture
def fresh(case):
    """(network name, base network, an adapted one to change)."""
    name, base, model = case
    return name, base, copy.deepcopy(model)


def gradients(model, x):
    """{name: gradient} of everything that trains, for one loss."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    loss = (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).square().mean()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def test_starts_as_the_identity(case) -> None:
    name, base, model = case
    x = inputs(name)
    torch.testing.assert_close(run(model, x), run(base, x), **EXACT)


def test_everything_learns_within_two_steps_and_nothing_else_moves(fresh) -> None:
    name, base, model = fresh
    x = inputs(name)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < sum(p.numel() for p in trained.values())
    model.train()
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    seen = set()
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        seen |= {n for n, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert seen == trained.keys()
    kept = model.base_state_dict()
    assert kept.keys() == before.keys()
    assert [k for k in before if not torch.equal(kept[k], before[k])] == []


def test_round_trip_through_a_file(fresh, tmp_path) -> None:
    name, base, model = fresh
    scramble(model).save_pretrained(tmp_path)
    torch.manual_seed(99)  # another random start on the loading side
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = inputs(name)
    assert torch.equal(run(loaded, x), run(model, x))
    assert loaded.peft_config == model.peft_config


def test_merge_and_unload_leaves_torchs_own_layers(fresh) -> None:
    name, base, model = fresh
    x = inputs(name)
    expected = run(scramble(model), x)
    sites = model._peft.injection.sites
    stays = any(isinstance(site, (AdapterSite, PromptSite)) for site in sites)
    plain = model.merge_and_unload()
    torch.testing.assert_close(run(plain, x), expected, **EXACT)
    assert type(plain) is type(base)
    classes = {n: type(m) for n, m in plain.named_modules()}
    wrong = [
        n for n, m in base.named_modules()
        if classes[n] is not type(m) and type(m).__name__ != "ViT"
    ]  # fmt: skip
    assert wrong == []
    if not stays:
        # SSF gives a weight and a bias to a layer without; nothing else may differ.
        scaled = {
            n for site in sites if isinstance(site, SSFSite) for n in (site.name, *site.others)
        }
        new = {k.rpartition(".")[0] for k in plain.state_dict().keys() - base.state_dict().keys()}
        assert new <= scaled


def test_merge_adapter_is_lossless(fresh) -> None:
    name, _, model = fresh
    x = inputs(name)
    expected = run(scramble(model), x)
    before = dict(model.named_parameters())
    model.merge_adapter()
    torch.testing.assert_close(run(model, x), expected, **EXACT)
    with pytest.raises(ValueError, match="merged adapter"):
        model.set_adapter("default")
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert torch.equal(run(model, x), expected)


def test_disable_and_switch(fresh) -> None:
    name, base, model = fresh
    x = inputs(name)
    model.add_adapter("other")
    first = run(scramble(model, 1), x)
    with model.disable_adapter():
        torch.testing.assert_close(run(model, x), run(base, x), **EXACT)
    model.set_adapter("other")
    torch.testing.assert_close(run(model, x), run(base, x), **EXACT)
    second = run(scramble(model, 2), x)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(run(model, x), first)
    mixed = model.mixed_batch(x, ["default", "other"])
    torch.testing.assert_close(mixed[:1], first[:1], **EXACT)
    torch.testing.assert_close(mixed[1:], second[1:], **EXACT)


def test_gradient_checkpointing_gives_the_same_gradients(fresh) -> None:
    name, _, model = fresh
    x = inputs(name)
    scramble(model)
    expected = gradients(model, x)
    found = gradients(_Checkpointed(model), x)
    for key, value in expected.items():
        torch.testing.assert_close(found[f"inner.{key}"], value, **EXACT)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_autocast(fresh) -> None:
    name, _, model = fresh
    model = scramble(model).float()
    x = inputs(name, dtype=torch.float32)
    expected = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = (y.float() - x).square().mean()
    loss.backward()
    error = (y.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_mixed_batch_refusals() -> None:
    model = get_peft_model(build("unet"), LoraConfig(r=2))
    x = inputs("unet")
    with pytest.raises(ValueError, match="got 1, wanted one per sample: 2"):
        model.mixed_batch(x, ["default"])
    with pytest.raises(ValueError, match="got 'siemens', wanted one of"):
        model.mixed_batch(x, ["default", "siemens"])
    with pytest.raises(ValueError, match="training mode"):
        model.train().mixed_batch(x, ["default", "default"])


def test_a_half_given_by_patterns() -> None:
    net = nn.Sequential()
    net.add_module("a", nn.Conv3d(1, 4, 3, padding=1))
    net.add_module("b", nn.Conv3d(4, 1, 3, padding=1))
    config = MixConfig(
        encoder=LoraConfig(r=2), decoder=LoraConfig(r=3), encoder_modules="a", decoder_modules="b"
    )
    model = get_peft_model(net, config)
    assert (model.a.r, model.b.r) == (2, 3)
