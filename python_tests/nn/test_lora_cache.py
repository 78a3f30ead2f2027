"""The effective weight that LoRA layers keep in evaluation mode: never a stale one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from petite_fast import LoRAConv3d


def make():
    torch.manual_seed(0)
    layer = LoRAConv3d(4, 8, 3, padding=1, r=3)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer.eval()


@pytest.fixture
def cached():
    layer = make()
    x = torch.randn(2, 4, 5, 6, 7)
    with torch.no_grad():
        layer(x)
    assert layer._kept is not None
    return layer, x


def fresh(layer, x):
    """What the layer computes without anything kept."""
    with torch.no_grad():
        return layer.merge()(x)


def test_effective_weight_is_kept_and_reused(cached):
    layer, x = cached
    kept = layer._kept
    with torch.no_grad():
        layer(x)
    assert layer._kept is kept
    with torch.inference_mode():
        layer(x)
    assert layer._kept is kept


def change_in_place(layer):
    layer.lora_A.mul_(2)


def change_base(layer):
    layer.weight.add_(1)


def replace_parameter(layer):
    layer.lora_B = nn.Parameter(torch.randn_like(layer.lora_B))


def replace_data(layer):
    layer.lora_B.data = torch.randn_like(layer.lora_B)


def replace_data_twice(layer):
    # The first storage is freed before the second is made: they could share an address.
    layer.lora_B.data = torch.randn_like(layer.lora_B)
    layer.lora_B.data = torch.randn_like(layer.lora_B)


def replace_by_alias(layer):
    # Same address, and after one write the same version as the tensor it replaces.
    layer.lora_B = nn.Parameter(layer.lora_B.data)
    layer.lora_B.mul_(2)


def change_scale(layer):
    layer.scaling = 5.0


def load_values(layer):
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})


def take_a_step(layer):
    layer.lora_B.grad = torch.ones_like(layer.lora_B)
    torch.optim.AdamW([layer.lora_B], lr=0.1).step()


def write_past_autograd(layer):
    layer.lora_A.data.mul_(3)
    layer.eval()


def change_dtype(layer):
    layer.bfloat16().float()


CHANGES = [
    change_in_place, change_base, replace_parameter, replace_data, replace_data_twice,
    replace_by_alias,
    change_scale, load_values, take_a_step, write_past_autograd, change_dtype,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_rebuilds_it(cached, change):
    layer, x = cached
    with torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, fresh(layer, x), rtol=1e-5, atol=1e-5)


def test_autocast_and_float_do_not_share_it(cached):
    layer, x = cached
    with torch.no_grad():
        full = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            assert layer._kept.weight.dtype == torch.bfloat16
        assert torch.equal(layer(x), full)


def test_training_drops_it_and_gradients_never_use_it(cached):
    layer, x = cached
    layer.train()
    assert layer._kept is None
    layer.eval()
    layer(x).sum().backward()
    assert layer._kept is None and layer.lora_B.grad.any()


def test_it_is_not_copied_pickled_or_saved(cached):
    layer, x = cached
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._kept is None and layer._kept is not None
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))
            other.lora_B.zero_()
            assert not torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert buffer.tell() < 3 * sum(v.nbytes for v in layer.state_dict().values()) + 8192


def test_functional_call_is_not_cached(cached):
    layer, x = cached
    kept = layer._kept
    other = {k: v.detach() * 2 for k, v in layer.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(layer, other, (x,))
        assert not torch.equal(y, layer(x))
    assert layer._kept is kept


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        layer = make()
        x = torch.randn(2, 4, 5, 6, 7)
        before = layer(x)
        layer.lora_B.zero_()
        assert not torch.equal(layer(x), before)


def test_wrong_dtype_is_refused_alike_with_and_without_it(cached):
    layer, x = cached
    with pytest.raises(TypeError, match="x: got"):
        layer(x.double())
    with torch.no_grad(), pytest.raises(TypeError, match="x: got"):
        layer(x.double())
