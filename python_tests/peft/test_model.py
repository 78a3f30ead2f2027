"""The verbs of an adapted network: disable, switch, merge, copy, pickle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from petite_fast import (
    BitFitConfig,
    LoraConfig,
    MixConfig,
    PeftModel,
    get_peft_model,
    petite_recipe,
)
from petite_fast.models import CVTGANGenerator

MIX = MixConfig(encoder=LoraConfig(r=2), decoder=LoraConfig(r=3), bitfit=True)


def scramble(model, seed=0):
    """Give every trainable parameter a random value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.fixture
def model(small):
    return scramble(get_peft_model(small, MIX))


def run(net, x):
    with torch.no_grad():
        return net(x)


def test_disable_is_exact_and_restores(small, small_input):
    reference = get_peft_model(copy.deepcopy(small), BitFitConfig())  # lean, nothing trained
    model = scramble(get_peft_model(small, MIX))
    adapted = run(model, small_input)
    parameters = {n: p for n, p in model.named_parameters()}
    with model.disable_adapter():
        assert torch.equal(run(model, small_input), run(reference, small_input))
        assert not any(p.requires_grad for p in model.parameters())
        with model.disable_adapter():
            pass
        assert torch.equal(run(model, small_input), run(reference, small_input))
    assert {n: p for n, p in model.named_parameters()} == parameters  # the very same objects
    assert torch.equal(run(model, small_input), adapted)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(run(model, small_input), adapted)


def test_disable_does_not_disturb_a_pending_graph(model, small_input):
    """Distillation: adapted and base output in one loss, backward inside, outside, or after."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss():
        return (model(small_input) - 1).square().mean()

    expected = torch.autograd.grad(loss(), trained)
    y = loss()
    with model.disable_adapter():
        base = model(small_input)
        assert not base.requires_grad
        inside = torch.autograd.grad(loss_of := y, trained, retain_graph=True)
    after = torch.autograd.grad(loss_of, trained)
    for a, b, c in zip(expected, inside, after, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_switching(model, small_input, small):
    first = run(model, small_input)
    model.add_adapter("fresh")
    assert model.active_adapter == "default" and set(model.peft_config) == {"default", "fresh"}
    assert torch.equal(run(model, small_input), first)
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.set_adapter("fresh")
    with model.disable_adapter():
        base = run(model, small_input)
    assert torch.equal(run(model, small_input), base)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    model(small_input).square().mean().backward()
    optimiser.step()  # it holds the same parameters
    second = run(model, small_input)
    assert not torch.equal(second, base)
    model.set_adapter("default")
    assert torch.equal(run(model, small_input), first)
    model.set_adapter("fresh")
    assert torch.equal(run(model, small_input), second)
    model.set_adapter("fresh")
    assert torch.equal(run(model, small_input), second)


def test_names(model):
    with pytest.raises(ValueError, match=r"got 'x', wanted one of \['default'\]"):
        model.set_adapter("x")
    with pytest.raises(ValueError, match="'default', which is taken"):
        model.add_adapter("default")


def test_what_a_disabled_adapter_refuses(model, tmp_path):
    model.add_adapter("other")
    with model.disable_adapter():
        for call in (
            lambda: model.set_adapter("other"),
            lambda: model.save_pretrained(tmp_path),
            lambda: model.load_adapter(tmp_path),
            model.merge_and_unload,
        ):
            with pytest.raises(ValueError, match="disable"):
                call()
    assert not list(tmp_path.iterdir())


def test_merge_gives_a_plain_network(small, small_input):
    base = copy.deepcopy(small)
    base.head.requires_grad_(False)
    small.head.requires_grad_(False)
    model = scramble(get_peft_model(small, MIX))
    expected = run(model, small_input)
    merged = model.merge_and_unload()
    assert merged is small and type(merged) is type(base)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(run(merged, small_input), expected, rtol=1e-13, atol=1e-13)
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: p.requires_grad for n, p in base.named_parameters()
    }
    base.load_state_dict(merged.state_dict(), strict=True)
    assert torch.equal(run(base, small_input), run(merged, small_input))
    assert not hasattr(merged, "save_pretrained") and "r=" not in repr(merged)
    assert merged.train().norm.training


def test_merge_of_petite_keeps_the_prompts(generator, patch):
    kinds = [type(m) for m in generator.modules()]
    model = scramble(get_peft_model(generator, petite_recipe("cvtgan", 2, num_prompts=(1, 2, 3))))
    expected = run(model, patch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, patch), expected, rtol=1e-11, atol=1e-11)
    assert type(merged) is CVTGANGenerator
    prompts = [n for n, _ in merged.named_parameters() if "prompt" in n]
    assert len(prompts) == 3
    assert not any(merged.get_parameter(n).requires_grad for n in prompts)
    plain = [type(m) for n, m in merged.named_modules() if not n.endswith("prompt")]
    assert plain == kinds


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, small_input, how, tmp_path):
    expected = run(model, small_input)
    model.add_adapter("other")
    twin = how(model)
    assert type(twin) is type(model) and isinstance(twin, PeftModel)
    assert torch.equal(run(twin, small_input), expected)
    assert twin.base_sha256() == model.base_sha256()
    assert set(twin.peft_config) == {"default", "other"}
    twin.set_adapter("other")
    scramble(twin, 3)
    assert torch.equal(run(model, small_input), expected)
    twin.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    assert torch.equal(run(model, small_input), run(twin, small_input))
    assert type(twin.merge_and_unload()) is model.original()


def test_two_networks_of_one_class_share_their_class():
    one, two = (get_peft_model(nn.Sequential(nn.Conv3d(1, 1, 1)), LoraConfig(r=1)) for _ in "ab")
    assert type(one) is type(two) and type(one).__name__ == "PeftSequential"
    assert isinstance(one, nn.Sequential)


def test_moving_and_casting_the_network(model, small_input):
    sha = model.base_sha256()
    model.add_adapter("other")
    model.float().double()
    model.set_adapter("other")
    with model.disable_adapter():
        base = run(model, small_input)
    assert base.dtype == torch.float64
    assert torch.equal(run(model, small_input), base)
    assert model.base_sha256() != sha  # rounded to float32 on the way
    half = model.to(torch.bfloat16)
    with half.disable_adapter():
        assert run(half, small_input.bfloat16()).dtype == torch.bfloat16


def test_state_dict_round_trip(model, small_input, small):
    state = copy.deepcopy(model.state_dict())
    expected = run(model, small_input)
    scramble(model, 5)
    model.load_state_dict(state, strict=True)
    assert torch.equal(run(model, small_input), expected)
