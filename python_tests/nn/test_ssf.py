"""SSF layers against scale * layer(x) + shift in float64; identity, memory, precision, compile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_cases import CASES, Case, assert_twice_torch
from torch import Tensor, nn

from petite_fast.nn import (
    SSFBatchNorm3d,
    SSFConv3d,
    SSFConvTranspose3d,
    SSFGroupNorm,
    SSFInstanceNorm3d,
    SSFLayer,
    SSFLayerNorm,
    SSFLinear,
)
from petite_fast.ops import saved_bytes

TWINS: dict[type[nn.Module], type[SSFLayer]] = {
    cls.torch_class: cls
    for cls in (
        SSFBatchNorm3d, SSFConv3d, SSFConvTranspose3d, SSFGroupNorm, SSFInstanceNorm3d,
        SSFLayerNorm, SSFLinear,
    )
}  # fmt: skip


def _conv(case: Case) -> Callable[[], nn.Module]:
    geometry = dict(case.geometry)
    cls = nn.ConvTranspose3d if geometry.pop("transposed", False) else nn.Conv3d
    return lambda: cls(case.inputs, case.outputs, case.kernel, **geometry)


VOLUME = (2, 4, 3, 4, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{case.name: (_conv(case), (case.batch, case.inputs, *case.size)) for case in CASES},
    "no-bias": (lambda: nn.Conv3d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 6, 7)),
    "linear": (lambda: nn.Linear(4, 6), (2, 7, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 6, bias=False), (2, 7, 4)),
    "layer": (lambda: nn.LayerNorm(4), (2, 7, 4)),
    "layer-no-bias": (lambda: nn.LayerNorm(4, bias=False), (2, 7, 4)),
    "layer-plain": (lambda: nn.LayerNorm(4, elementwise_affine=False), (2, 7, 4)),
    "instance": (lambda: nn.InstanceNorm3d(4, affine=True), VOLUME),
    "instance-plain": (lambda: nn.InstanceNorm3d(4), VOLUME),
    "instance-statistics": (lambda: nn.InstanceNorm3d(4, track_running_stats=True), VOLUME),
    "batch": (lambda: nn.BatchNorm3d(4), VOLUME),
    "batch-plain": (lambda: nn.BatchNorm3d(4, affine=False), VOLUME),
    "group": (lambda: nn.GroupNorm(2, 4), VOLUME),
    "group-plain": (lambda: nn.GroupNorm(2, 4, affine=False), VOLUME),
}
SOME = ["k3", "groups", "transposed-k3s2-groups", "linear", "layer", "layer-plain", "instance"]
SOME += ["instance-plain", "batch", "batch-plain", "group", "group-plain"]


def torch_layer(name: str, dtype: torch.dtype) -> Any:
    """In evaluation mode, frozen but for the bias, with values that are not the initial ones."""
    torch.manual_seed(0)
    base = LAYERS[name][0]().eval().requires_grad_(False)
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    base.to(dtype)
    if base.bias is not None:
        base.bias.requires_grad_()
    return base


def ssf_layer(name: str, dtype: torch.dtype, start: bool = False) -> Any:
    base = torch_layer(name, dtype)
    layer = TWINS[type(base)].convert_(base, dtype=torch.promote_types(dtype, torch.float32))
    if layer.bias is not None:
        layer.bias.requires_grad_()
    if not start:
        with torch.no_grad():
            torch.manual_seed(1)
            layer.ssf_scale.uniform_(0.5, 1.5)
            layer.ssf_shift.normal_(std=0.1)
    return layer


def batch(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(LAYERS[name][1], dtype=torch.float64).to(dtype)


def two_passes(base: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * layer(x) + shift."""
    y = base(x)
    view = (-1,) if isinstance(base, (nn.Linear, nn.LayerNorm)) else (-1, 1, 1, 1)
    return y * scale.view(view) + shift.view(view)


def results(layer: Any, x: Tensor, pair: list[Tensor], run: Callable[..., Tensor]) -> list[Tensor]:
    """Output and gradients of x, the pair and the bias, if there is one."""
    x = x.detach().requires_grad_()
    y = run(x)
    grad_y = (torch.arange(y.numel()) % 7 - 2).view(y.shape).to(y.dtype)
    wanted = [x, *pair] + ([] if layer.bias is None else [layer.bias])
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_y)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(name: str, dtype: torch.dtype) -> None:
    layer, x = ssf_layer(name, dtype), batch(name, dtype)
    pair = [layer.ssf_scale, layer.ssf_shift]
    ours = results(layer, x, pair, layer)
    both = []
    for kind in (torch.float64, dtype):
        base = torch_layer(name, dtype).to(kind)
        own = [p.detach().to(kind).requires_grad_() for p in pair]
        both.append(results(base, x.to(kind), own, lambda x, b=base, o=own: two_passes(b, x, *o)))
    for position, (got, exact, theirs) in enumerate(zip(ours, *both, strict=True)):
        if dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
            continue
        factor = 2.0 if position == 0 else 3.0
        assert_twice_torch(got.to(dtype), theirs, exact, factor, f"{name} {position}")
    assert ours[2].dtype == ours[3].dtype == layer.ssf_scale.dtype
    assert layer.weight is None or not layer.weight.requires_grad


@pytest.mark.parametrize("name", SOME)
def test_gradcheck(name: str) -> None:
    layer, x = ssf_layer(name, torch.float64), batch(name)[:1].requires_grad_()
    names = [n for n, p in layer.named_parameters() if p.requires_grad]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(n) for n in names]
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_the_layer_to_the_last_bit(name: str) -> None:
    """Batch 2 in float64: torch and the layer run the same kernel, but for one norm."""
    base, layer = torch_layer(name, torch.float64), ssf_layer(name, torch.float64, start=True)
    x = batch(name)
    assert isinstance(layer, type(base)) and type(layer).torch_class is type(base)
    if name == "group-plain":  # torch takes another loop when there is no weight
        torch.testing.assert_close(layer(x), base(x), rtol=1e-14, atol=1e-15)
    else:
        assert torch.equal(layer(x), base(x))
    added = set(layer.state_dict()) - set(base.state_dict())
    assert added == {"ssf_scale", "ssf_shift"}
    assert (layer.ssf_scale == 1).all() and not layer.ssf_shift.any()
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in added})


def test_both_learn_at_the_first_step() -> None:
    for name in SOME:
        layer = ssf_layer(name, torch.float64, start=True)
        layer(batch(name)).square().sum().backward()
        assert layer.ssf_scale.grad.all() and layer.ssf_shift.grad.all(), name


def test_what_is_kept() -> None:
    for name in ("k3", "transposed-k2s2", "linear"):
        layer = ssf_layer(name, torch.float32)
        x = batch(name, torch.float32).requires_grad_()
        assert (
            saved_bytes(lambda x=x, f=layer: f(x)) == layer(x).nbytes
        )  # y, as the next layer does
        with torch.no_grad():
            layer.ssf_scale[0] = 0.0  # y says nothing about that channel any more
        assert saved_bytes(lambda x=x, f=layer: f(x)) == x.nbytes
    layer = ssf_layer("batch", torch.float32)
    x = batch("batch", torch.float32).requires_grad_()
    layer.bias.requires_grad_(False)
    # mean, variance, scaled weight and shifted bias: four numbers per channel
    assert saved_bytes(lambda: layer(x)) == x.nbytes + 4 * 4 * 4
    layer.fold_()
    assert saved_bytes(lambda: layer(x)) == 4 * 4


def test_a_pair_can_be_shared() -> None:
    first = SSFLinear.convert_(nn.Linear(4, 6))
    second = SSFLinear.convert_(nn.Linear(5, 6), first.ssf_scale, first.ssf_shift)
    assert second.ssf_scale is first.ssf_scale and second.ssf_shift is first.ssf_shift
    net = nn.ModuleList([first, second])
    trained = [p for p in net.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(first.ssf_scale), id(first.ssf_shift)]
    with torch.no_grad():
        first.ssf_scale.fill_(2.0)
    x = torch.randn(3, 5)
    want = 2 * nn.functional.linear(x, second.weight, second.bias)
    torch.testing.assert_close(second(x), want)
    twin = copy.deepcopy(net)
    assert twin[0].ssf_scale is twin[1].ssf_scale is not first.ssf_scale
    second.release_(merge=True)
    assert first.ssf_scale.requires_grad and isinstance(first, SSFLinear)
    half = SSFLayerNorm.convert_(nn.LayerNorm(6), shift=first.ssf_shift)
    assert half.ssf_shift is first.ssf_shift and (half.ssf_scale == 1).all()


def test_constructors_are_those_of_torch() -> None:
    for layer, text in (
        (SSFConv3d(4, 6, 3, stride=2, dtype=torch.bfloat16), "SSFConv3d(4, 6"),
        (SSFConvTranspose3d(4, 6, 2, stride=2), "SSFConvTranspose3d(4, 6"),
        (SSFLinear(4, 6, bias=False), "SSFLinear(in_features=4"),
        (SSFLayerNorm(6), "SSFLayerNorm((6,)"),
        (SSFInstanceNorm3d(6), "SSFInstanceNorm3d(6"),
        (SSFBatchNorm3d(6), "SSFBatchNorm3d(6"),
        (SSFGroupNorm(3, 6), "SSFGroupNorm(3, 6"),
    ):
        assert text in repr(layer) and layer.ssf_scale.shape == layer.ssf_shift.shape == (6,)
        assert layer.ssf_scale.dtype == torch.float32
        trained = {n for n, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"ssf_scale", "ssf_shift"}


def test_in_place_on_the_device_and_in_the_dtype_of_the_layer() -> None:
    conv = nn.Conv3d(4, 8, 3, device="meta", dtype=torch.float64)
    net = nn.Sequential(conv)
    assert SSFConv3d.convert_(conv) is conv is net[0]
    assert conv.ssf_scale.is_meta and conv.ssf_scale.dtype == torch.float64
    norm = SSFBatchNorm3d.convert_(nn.BatchNorm3d(4, affine=False, device="meta"))
    assert norm.ssf_shift.is_meta  # as its statistics
    norm = SSFInstanceNorm3d.convert_(nn.InstanceNorm3d(4), device="meta", dtype=torch.float64)
    assert norm.ssf_scale.is_meta and norm.ssf_scale.dtype == torch.float64


def test_refusals_change_nothing() -> None:
    with pytest.raises(TypeError, match="got Conv3d, wanted a plain torch.nn.Linear"):
        SSFLinear.convert_(nn.Conv3d(4, 8, 3))
    with pytest.raises(ValueError, match=r"normalized_shape: got \(3, 4\), wanted one axis"):
        SSFLayerNorm.convert_(norm := nn.LayerNorm((3, 4)))
    assert type(norm) is nn.LayerNorm and norm.weight.requires_grad
    for make in (SSFBatchNorm3d.convert_, lambda bn: SSFBatchNorm3d(4, track_running_stats=False)):
        with pytest.raises(ValueError, match="track_running_stats"):
            make(bn := nn.BatchNorm3d(4, track_running_stats=False))
    assert type(bn) is nn.BatchNorm3d
    with pytest.raises(ValueError, match=r"scale: got shape \(4,\), wanted \(8,\)"):
        SSFConv3d.convert_(conv := nn.Conv3d(4, 8, 3), nn.Parameter(torch.ones(4)))
    assert type(conv) is nn.Conv3d and conv.weight.requires_grad


def test_batch_norm_stays_in_evaluation_mode() -> None:
    layer = SSFBatchNorm3d.convert_(nn.BatchNorm3d(4).train())
    before = copy.deepcopy(layer.state_dict())
    assert not layer.training and not layer.train().training
    layer(torch.randn(VOLUME))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_keeps_torchs_statistics(training: bool) -> None:
    base = nn.InstanceNorm3d(4, affine=True, track_running_stats=True).train(training)
    layer = SSFInstanceNorm3d.convert_(copy.deepcopy(base))
    x = torch.randn(VOLUME) + 1
    assert torch.equal(layer(x), base(x)) and torch.equal(layer(x[0]), base(x[0]))
    assert torch.equal(layer.running_mean, base.running_mean)
    assert bool(layer.running_mean.any()) is training


def test_transposed_output_size() -> None:
    layer = SSFConvTranspose3d(4, 8, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 4, 4, 4)
    assert layer(x, output_size=(8, 7, 8)).shape[2:] == (8, 7, 8)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(name: str, twin: Any) -> None:
    layer, x = ssf_layer(name, torch.float64), batch(name)
    other = twin(layer)
    assert type(other) is type(layer) and torch.equal(other(x), layer(x))
    assert other.ssf_scale.requires_grad and other.training == layer.training


@pytest.mark.parametrize("name", SOME)
def test_autocast(name: str) -> None:
    layer, x = ssf_layer(name, torch.float32), batch(name, torch.float32)
    base, pair = torch_layer(name, torch.float32), (layer.ssf_scale, layer.ssf_shift)
    for narrow in (torch.float32, torch.bfloat16):  # a convolution in front hands on bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            want = base(x.to(narrow))
            y = layer(x.to(narrow))
            y.float().square().mean().backward()
        assert y.dtype == want.dtype
        exact = two_passes(base, x, *pair)
        torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.1)
    assert layer.ssf_scale.grad.dtype == layer.ssf_shift.grad.dtype == torch.float32


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_break(name: str, folded: bool, autocast: bool) -> None:
    layer, x = ssf_layer(name, torch.float32), batch(name, torch.float32).requires_grad_()
    if folded:
        layer.fold_()
    torch._dynamo.reset()
    runs = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        wanted = [x] if folded else [x, layer.ssf_scale, layer.ssf_shift]
        runs.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), wanted)])
    tolerance = 3e-2 if autocast else 1e-5
    for eager, traced in zip(*runs, strict=True):
        assert eager.dtype == traced.dtype
        torch.testing.assert_close(traced, eager, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["instance-plain", "batch-plain", "group-plain", "layer-plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_norms_without_tensors_follow_x(name: str, dtype: torch.dtype) -> None:
    """Their pair is float32 whatever the network is."""
    layer, x = ssf_layer(name, torch.float32).to(torch.float32), batch(name, dtype)
    if "batch" in name:
        for statistic in ("running_mean", "running_var"):
            setattr(layer, statistic, getattr(layer, statistic).to(dtype))
    want = layer(x)
    assert want.dtype == dtype
    layer.fold_()
    assert torch.equal(layer(x), want)


def test_metatensor() -> None:
    data = pytest.importorskip("monai.data")
    for name in ("k3", "instance-plain"):
        layer, x = ssf_layer(name, torch.float32), batch(name, torch.float32)
        y = layer(data.MetaTensor(x))
        assert isinstance(y, data.MetaTensor)
        torch.testing.assert_close(y.as_tensor(), layer(x))
