"""fold_, unfold_ and release_: exact, lossless, for every layer and every geometry."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conv_cases import CASES, Case
from torch import Tensor, nn

from petite_fast.nn import (
    AdaptedLayer,
    LoRAConv3d,
    LoRAConvTranspose3d,
    LoRALinear,
    SSFBatchNorm3d,
    SSFConv3d,
    SSFConvTranspose3d,
    SSFGroupNorm,
    SSFInstanceNorm3d,
    SSFLayerNorm,
    SSFLinear,
)
from petite_fast.ops import reference, saved_bytes

LAYERS = {
    "lora": {nn.Conv3d: LoRAConv3d, nn.ConvTranspose3d: LoRAConvTranspose3d, nn.Linear: LoRALinear},
    "ssf": {nn.Conv3d: SSFConv3d, nn.ConvTranspose3d: SSFConvTranspose3d, nn.Linear: SSFLinear},
}
LINEAR = Case("linear", 4, 6, (1, 1, 1), (7, 1, 1), {})
MAPS = [*CASES, LINEAR, LINEAR._replace(name="no-bias-linear", geometry={"bias": False})]
MAPS += [CASES[0]._replace(name="no-bias", geometry={"padding": 1, "bias": False})]


def torch_map(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    geometry = dict(case.geometry)
    if "linear" in case.name:
        return nn.Linear(case.inputs, case.outputs, **geometry).to(dtype)
    cls = nn.ConvTranspose3d if geometry.pop("transposed", False) else nn.Conv3d
    return cls(case.inputs, case.outputs, case.kernel, **geometry).to(dtype)


def batch(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    if "linear" in case.name:
        return torch.randn(2, 7, case.inputs, dtype=dtype)
    return torch.randn(case.batch, case.inputs, *case.size, dtype=dtype)


def randomise(layer: Any) -> None:
    """Adapters that are not the identity."""
    with torch.no_grad():
        for name in layer.adapter_parameters:
            parameter = getattr(layer, name)
            parameter.copy_(torch.randn_like(parameter) * 0.5 + ("scale" in name))


def adapted_map(case: Case, method: str, dtype: torch.dtype = torch.float64) -> Any:
    module = torch_map(case, dtype)
    layer = LAYERS[method][type(module)].convert_(module)
    randomise(layer)
    return layer


def formula(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the adapter in them, in float64."""
    options = {
        "groups": getattr(layer, "groups", 1),
        "transposed": isinstance(layer, nn.ConvTranspose3d),
    }
    weight = layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    first, second = (getattr(layer, name).double() for name in layer.adapter_parameters)
    if "lora_A" in layer.adapter_parameters:
        return reference.effective_weight(weight, first, second, layer.scaling, **options), bias
    weight = reference.effective_weight(weight, gamma=first, **options)
    return weight, reference.effective_bias(bias, first, second)


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("map_case", MAPS, ids=lambda c: c.name)
def test_fold_and_unfold(map_case: Case, method: str) -> None:
    layer, x = adapted_map(map_case, method), batch(map_case)
    assert isinstance(layer, AdaptedLayer) and not layer.is_folded
    own = dict(layer._parameters)
    want, (weight, bias) = layer(x).detach(), formula(layer)
    layer.unfold_()  # nothing to undo
    layer.fold_()
    assert layer.is_folded
    folded = dict(layer._parameters)
    assert folded["weight"] is not own["weight"] and not folded["weight"].requires_grad
    torch.testing.assert_close(layer.weight, weight, rtol=1e-14, atol=1e-14)
    if bias is None:
        assert layer.bias is None
    else:
        torch.testing.assert_close(layer.bias, bias, rtol=1e-14, atol=1e-14)
    layer.fold_()  # nothing left to fold
    assert all(layer._parameters[name] is value for name, value in folded.items())
    x.requires_grad_()
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    assert saved_bytes(lambda: layer(x)) == 0
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert all(getattr(layer, name).grad is None for name in layer.adapter_parameters)
    layer.unfold_()
    layer.unfold_()
    assert not layer.is_folded
    assert all(layer._parameters[name] is value for name, value in own.items())
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("map_case", MAPS, ids=lambda c: c.name)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_release(map_case: Case, method: str, merge: bool, folded: bool) -> None:
    base, x, called = torch_map(map_case), batch(map_case), []
    layer = adapted_map(map_case, method)
    own = {name: layer._parameters[name] for name in ("weight", "bias")}
    if folded:
        layer.fold_()
        randomise(layer)  # the fold is out of date, and must not be what is merged
    want = copy.deepcopy(layer)
    want.unfold_()
    want = (want if merge else base)(x).detach()
    layer.register_forward_hook(lambda *_: called.append(1))
    assert layer.release_(merge) is layer
    assert type(layer) is type(base)
    assert set(layer.__dict__) == set(base.__dict__)
    names = set(base.state_dict()) | ({"bias"} if merge and method == "ssf" else set())
    assert set(layer.state_dict()) == names
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    assert called == [1]
    assert not any(p.requires_grad for p in layer.parameters())
    if merge:
        assert layer.weight is not own["weight"]
    else:
        assert all(layer._parameters[name] is value for name, value in own.items())
        assert torch.equal(layer(x), want)


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("map_case", [CASES[0], CASES[9], CASES[16], LINEAR], ids=lambda c: c.name)
def test_folding_rounds_once(map_case: Case, dtype: torch.dtype, method: str) -> None:
    layer = adapted_map(map_case, method, dtype)
    exact = formula(layer)
    layer.fold_()
    for got, want in zip((layer.weight, layer.bias), exact, strict=True):
        assert got.dtype == dtype and want is not None
        error, half_ulp = (got.double() - want).abs(), torch.finfo(dtype).eps / 2 * want.abs()
        assert (error <= half_ulp + 1e-6).all()  # of float32 sums


NORMS: dict[str, tuple[type[AdaptedLayer], Any, tuple[int, ...]]] = {
    "layer": (SSFLayerNorm, lambda: nn.LayerNorm(4), (2, 7, 4)),
    "layer-no-bias": (SSFLayerNorm, lambda: nn.LayerNorm(4, bias=False), (2, 7, 4)),
    "layer-plain": (SSFLayerNorm, lambda: nn.LayerNorm(4, elementwise_affine=False), (2, 7, 4)),
    "instance": (SSFInstanceNorm3d, lambda: nn.InstanceNorm3d(4, affine=True), (2, 4, 3, 4, 5)),
    "instance-plain": (SSFInstanceNorm3d, lambda: nn.InstanceNorm3d(4), (2, 4, 3, 4, 5)),
    "instance-statistics": (
        SSFInstanceNorm3d, lambda: nn.InstanceNorm3d(4, track_running_stats=True), (2, 4, 3, 4, 5),
    ),
    "batch": (SSFBatchNorm3d, lambda: nn.BatchNorm3d(4), (2, 4, 3, 4, 5)),
    "batch-plain": (SSFBatchNorm3d, lambda: nn.BatchNorm3d(4, affine=False), (2, 4, 3, 4, 5)),
    "group": (SSFGroupNorm, lambda: nn.GroupNorm(2, 4), (2, 4, 3, 4, 5)),
    "group-plain": (SSFGroupNorm, lambda: nn.GroupNorm(2, 4, affine=False), (2, 4, 3, 4, 5)),
}  # fmt: skip


def torch_norm(name: str) -> Any:
    """In evaluation mode, with weight, bias and statistics that are not the initial ones."""
    norm = NORMS[name][1]().double().eval()
    torch.manual_seed(2)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return norm


def adapted_norm(name: str) -> Any:
    layer = NORMS[name][0].convert_(torch_norm(name))
    layer.double()
    randomise(layer)
    return layer


@pytest.mark.parametrize("name", NORMS)
def test_fold_and_unfold_norms(name: str) -> None:
    layer = adapted_norm(name)
    x = torch.randn(NORMS[name][2], dtype=torch.float64)
    flag, own, want = layer.affine_attribute, dict(layer._parameters), layer(x).detach()
    was_affine = getattr(layer, flag)
    for _ in range(2):
        layer.fold_()
    assert layer.is_folded and getattr(layer, flag)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert torch.equal(layer(x), want)
    for _ in range(2):
        layer.unfold_()
    assert all(layer._parameters[key] is value for key, value in own.items())
    assert getattr(layer, flag) is was_affine and torch.equal(layer(x), want)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("merge", [True, False])
def test_release_norms(name: str, merge: bool) -> None:
    layer, base = adapted_norm(name), torch_norm(name)
    x = torch.randn(NORMS[name][2], dtype=torch.float64)
    want = (layer(x) if merge else base(x)).detach()
    scale, shift = layer.ssf_scale, layer.ssf_shift
    layer.release_(merge)
    assert type(layer) is type(base) and set(layer.__dict__) == set(base.__dict__)
    torch.testing.assert_close(layer.eval()(x), want, rtol=1e-13, atol=1e-13)
    if not merge:
        assert repr(layer) == repr(base) and set(layer.state_dict()) == set(base.state_dict())
        return
    assert {"weight", "bias"} <= set(layer.state_dict())
    assert "affine=True" in repr(layer)
    if base.weight is None:
        assert torch.equal(layer.weight, scale) and torch.equal(layer.bias, shift)
        with torch.no_grad():
            scale.zero_()  # another layer may share it
        assert layer.weight.all()


@pytest.mark.parametrize("method", LAYERS)
def test_a_move_reaches_the_base(method: str) -> None:
    layer = adapted_map(CASES[0], method)
    own, adapter = layer.weight, getattr(layer, layer.adapter_parameters[0])
    layer.fold_()
    layer.float()
    assert layer.is_folded and layer.weight.dtype == torch.float32
    layer.unfold_()
    assert layer.weight is own and own.dtype == torch.float32
    assert getattr(layer, layer.adapter_parameters[0]) is adapter


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_folded_layer(method: str, twin: Any) -> None:
    layer, x = adapted_map(CASES[0], method), batch(CASES[0])
    want = layer(x).detach()
    layer.fold_()
    other = twin(layer)
    assert other.is_folded
    other.unfold_()
    assert layer.is_folded and torch.equal(other(x), want)
    assert torch.equal(layer.effective_weight() if method == "lora" else layer.weight, layer.weight)


def test_a_folded_lora_layer_merges_to_what_it_computes() -> None:
    layer, x = adapted_map(CASES[0], "lora"), batch(CASES[0])
    layer.fold_()
    merged = layer.merge()
    assert torch.equal(merged.weight, layer.weight) and merged.weight is not layer.weight
    assert torch.equal(layer.effective_weight(torch.float32), layer.weight.float())
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-11, atol=1e-11)
    layer.bias.requires_grad_()
    layer(x).sum().backward()  # BitFit goes on
    assert layer.bias.grad is not None


def test_folding_in_inference_mode_leaves_usable_parameters() -> None:
    layer, x = adapted_map(CASES[0], "ssf"), batch(CASES[0]).requires_grad_()
    with torch.inference_mode():
        layer.fold_()
    assert not layer.weight.is_inference()
    layer(x).sum().backward()


def test_dropout_has_no_say_in_a_folded_layer() -> None:
    layer = LoRAConv3d(4, 6, 3, padding=1, lora_dropout=0.9, dtype=torch.float64).train()
    randomise(layer)
    x = batch(CASES[0])
    layer.fold_()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-11, atol=1e-11)
