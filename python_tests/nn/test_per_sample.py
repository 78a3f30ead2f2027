"""A batch with an adapter for every sample: each comes out as it would by itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conv_cases import CASES, Case
from torch import Tensor, nn

from petite_fast.nn import LoRAConv3d, LoRAConvTranspose3d, LoRALinear

N = 3
CROSSING = [
    Case("crossing", 4, 8, (3, 3, 3), (5, 6, 7), {"padding": 1, "groups": 2, "crossing": True}),
    Case(
        "crossing-reflect", 4, 8, (3, 3, 3), (5, 6, 7),
        {"padding": 1, "stride": 2, "groups": 4, "padding_mode": "reflect", "crossing": True},
    ),
]  # fmt: skip


def conv_layer(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    geometry = dict(case.geometry)
    cls = LoRAConvTranspose3d if geometry.pop("transposed", False) else LoRAConv3d
    layer = cls(case.inputs, case.outputs, case.kernel, **geometry, r=4, dtype=dtype, **options)
    return layer.eval()


def linear_layer(parts: str = "qkv") -> Any:
    torch.manual_seed(0)
    return LoRALinear(5, 12, r=2, dtype=torch.float64, qkv_parts=parts).eval()


def pairs(layer: Any, count: int = N) -> list[tuple[Tensor, Tensor]]:
    """The last one is no adapter at all."""
    torch.manual_seed(1)
    made = [(torch.randn_like(layer.lora_A), torch.randn_like(layer.lora_B)) for _ in range(count)]
    return [*made[:-1], (made[-1][0], torch.zeros_like(layer.lora_B))]


def one_by_one(layer: Any, x: Tensor, adapters: list[tuple[Tensor, Tensor]]) -> Tensor:
    outputs = []
    for sample, (a, b) in zip(x, adapters, strict=True):
        values = {"lora_A": a, "lora_B": b}
        outputs.append(torch.func.functional_call(layer, values, (sample[None],)))
    return torch.cat(outputs)


@pytest.mark.parametrize("case", [*CASES, *CROSSING], ids=lambda c: c.name)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(case: Case, channels_last: bool) -> None:
    layer = conv_layer(case)
    x = torch.randn(N, case.inputs, *case.size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    adapters = pairs(layer)
    with torch.no_grad():
        alone = layer(x)
        want = one_by_one(layer, x, adapters)
        layer.per_sample = adapters
        got = layer(x)
        layer.per_sample = None
        assert torch.equal(layer(x), alone)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[0], alone[0])


@pytest.mark.parametrize("parts", ["qkv", "qk"])
@pytest.mark.parametrize("shape", [(N, 7, 5), (N, 5), (N, 2, 3, 5)])
def test_linear(parts: str, shape: tuple[int, ...]) -> None:
    layer = linear_layer(parts)
    x, adapters = torch.randn(shape, dtype=torch.float64), pairs(layer)
    with torch.no_grad():
        want = one_by_one(layer, x, adapters)
        layer.per_sample = adapters
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_output_size_and_a_bias_that_trains() -> None:
    layer = conv_layer(next(c for c in CASES if c.name == "transposed-k3s2-groups"))
    x = torch.randn(N, 4, 3, 4, 5, dtype=torch.float64)
    layer.bias.requires_grad_()
    layer.per_sample = pairs(layer)
    y = layer(x, output_size=(5, 8, 9))
    assert y.shape[2:] == (5, 8, 9)
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, y[:, 0].numel()))


@pytest.mark.parametrize("name", ["groups", "reflect", "transposed-k2s2", "crossing", "linear"])
def test_gradients(name: str) -> None:
    case = next((c for c in [*CASES, *CROSSING] if c.name == name), None)
    layer = linear_layer("qk") if case is None else conv_layer(case)
    shape = (N, 7, 5) if case is None else (N, case.inputs, *case.size)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    adapters = [(a.requires_grad_(), b.requires_grad_()) for a, b in pairs(layer)]
    want = one_by_one(layer, x, adapters)
    layer.per_sample = adapters
    got, inputs = layer(x), [x, *(t for pair in adapters for t in pair)]
    direction = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, direction),
        torch.autograd.grad(want, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["k3", "crossing", "linear"])
def test_autocast_and_compile(name: str) -> None:
    case = next((c for c in [*CASES, *CROSSING] if c.name == name), None)
    layer = (linear_layer("qk") if case is None else conv_layer(case)).float()
    x = torch.randn((N, 7, 5) if case is None else (N, case.inputs, *case.size))
    layer.per_sample = pairs(layer)
    with torch.no_grad():
        want = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.02 * float(want.abs().max()))


def test_it_is_not_copied_pickled_or_saved() -> None:
    layer = linear_layer()
    layer.per_sample = pairs(layer)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.per_sample is None and layer.per_sample is not None
    layer.release_(merge=False)
    assert set(layer.__dict__) == set(nn.Linear(5, 12).__dict__)


def test_refusals() -> None:
    layer, x = conv_layer(CASES[0], lora_dropout=0.5), torch.randn(N, 4, 5, 6, 7).double()
    layer.per_sample = pairs(layer)
    with pytest.raises(ValueError, match="got 3 pairs for 2 samples"):
        layer(x[:2])
    with pytest.raises(ValueError, match="wanted a batch"):
        layer(x[0])
    with pytest.raises(ValueError, match="lora_dropout=0.5, wanted eval"):
        layer.train()(x)
    layer.eval().fold_()
    with pytest.raises(ValueError, match="folded layer"):
        layer(x)
    layer.unfold_()
    layer.per_sample[1] = (layer.lora_A, layer.lora_B[:, :2])
    with pytest.raises(ValueError, match="per_sample: got shapes"):
        layer(x)
    linear = linear_layer()
    linear.per_sample = pairs(linear)
    with pytest.raises(ValueError, match="wanted a batch"):
        linear(torch.randn(5).double())
