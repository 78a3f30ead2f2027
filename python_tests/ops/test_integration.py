"""The ops inside PyTorch: opcheck, compile, autocast, tensor subclasses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conv_cases import Case, conv_tensors
from monai.data import MetaTensor

from petite_fast.ops import (
    adapted_conv,
    adapted_linear,
    bottleneck,
    frozen_batch_norm,
    reference,
    scale_shift,
)

OPS = torch.ops.petite_fast
ONES, ZEROS, TWOS = [1, 1, 1], [0, 0, 0], [2, 2, 2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("batch", [1, 2])
def test_opcheck_conv(layout: torch.memory_format, batch: int) -> None:
    x = torch.randn(batch, 4, 5, 6, 7).to(memory_format=layout)
    w = torch.randn(6, 4, 3, 3, 3)
    y = OPS.conv(x, w, None, TWOS, ONES, ONES, False, ZEROS, 1)
    torch.library.opcheck(OPS.conv, (x, w, torch.randn(6), TWOS, ONES, ONES, False, ZEROS, 1))
    torch.library.opcheck(OPS.conv, (y, w, None, TWOS, ONES, ONES, True, ONES, 1))
    torch.library.opcheck(
        OPS.conv_grad_input, (y, w, list(x.shape), TWOS, ONES, ONES, False, ZEROS, 1)
    )
    torch.library.opcheck(OPS.conv_grad_weight, (y, x, list(w.shape), TWOS, ONES, ONES, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_effective_weight(dtype: torch.dtype, transposed: bool) -> None:
    w = torch.randn(6, 4, 3, 3, 3)
    a = torch.randn(2, 6, 1, 1, 1) if transposed else torch.randn(2, 4, 3, 3, 3)
    b = torch.randn(2, 4, 3, 3, 3) if transposed else torch.randn(6, 2)
    gamma = torch.rand(4 if transposed else 6)
    torch.library.opcheck(OPS.effective_weight, (w, a, b, 0.5, gamma, 1, transposed, dtype))


def _parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    case = Case("k3", 4, 4, (3, 3, 3), (5, 6, 7), {})
    tensors = conv_tensors(case, torch.float32)
    for name in ("x", "lora_A", "lora_B", "gamma", "beta", "bias"):
        tensors[name].requires_grad_()
    return tensors


def _conv(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return adapted_conv(**t, padding=1)


def _conv_lora(t: dict[str, torch.Tensor]) -> torch.Tensor:
    plain = {k: v for k, v in t.items() if k not in ("gamma", "beta")}
    return adapted_conv(**plain, padding=1, padding_mode="reflect")


def _linear(t: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = t["x"].flatten(2).transpose(1, 2)
    weight, a = t["weight"][:, :, 0, 0, 0], t["lora_A"][:, :, 0, 0, 0]
    return adapted_linear(tokens, weight, t["bias"], lora_A=a, lora_B=t["lora_B"], gamma=t["gamma"])


def _norms(t: dict[str, torch.Tensor]) -> torch.Tensor:
    mean, var = t["beta"].detach(), t["gamma"].detach()
    return scale_shift(
        frozen_batch_norm(t["x"], mean, var, t["gamma"], t["beta"]), t["gamma"], t["beta"]
    )


def _bottleneck(t: dict[str, torch.Tensor]) -> torch.Tensor:
    down, up = t["lora_B"].t(), t["lora_B"]
    return bottleneck(t["x"].movedim(1, -1), down, up[0], up, t["bias"])


STEPS = [_conv, _conv_lora, _linear, _norms, _bottleneck]


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_compile_fullgraph(
    step: Callable[[dict[str, torch.Tensor]], torch.Tensor], autocast: bool
) -> None:
    tensors = _parameters()
    inputs = [t for t in tensors.values() if t.requires_grad]

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(tensors)
        loss = y.float().square().sum()
        return [
            y,
            *(g for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None),
        ]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tolerance = 2e-2 if autocast else 1e-5
    eager, traced = run(step), run(compiled)
    assert len(eager) == len(traced) > 1
    for a, b in zip(traced, eager, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_autocast_dtypes(step: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> None:
    tensors = _parameters()
    full = step(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y = step(tensors)
        # Backward inside the context, as PETITE's loop does: parameters still get float32.
        y.float().sum().backward()
    if step is not _norms:
        assert y.dtype == torch.bfloat16 or step is _bottleneck
    torch.testing.assert_close(
        y.float(), full, rtol=0.05, atol=0.05 * float(full.detach().abs().max())
    )
    assert all(t.grad is None or t.grad.dtype == torch.float32 for t in tensors.values())
    assert tensors["x"].grad is not None


def test_autocast_builds_the_weight_in_float32() -> None:
    """W_eff is rounded once: a small update survives when W is large."""
    w = torch.full((1, 1, 1, 1, 1), 1.0)
    a, b = torch.full((1, 1, 1, 1, 1), 2.0**-9), torch.ones(1, 1)
    x = torch.ones(1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted_conv(x, w, lora_A=a, lora_B=b, scale=3.0)
    assert float(y) == float(torch.tensor(1.0 + 3 * 2.0**-9).bfloat16())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_meta_tensor(step: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> None:
    tensors = _parameters()
    plain = step(tensors)
    tensors["x"] = MetaTensor(tensors["x"], meta={"key": "value"})
    y = step(tensors)
    assert isinstance(y, MetaTensor)
    assert y.meta["key"] == "value"
    torch.testing.assert_close(y.as_tensor(), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_against_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = {
        "x": (2, 3, 5, 8), "weight": (6, 8), "bias": (6,), "lora_A": (2, 8), "lora_B": (6, 2),
        "gamma": (6,), "beta": (6,),
    }  # fmt: skip
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    trained_sets: list[list[str]] = [
        ["x", "lora_A", "lora_B"], ["lora_B"], ["x", "gamma"], ["bias", "beta"], list(shapes),
    ]  # fmt: skip
    for trained in trained_sets:
        ours = {n: v.to(dtype).requires_grad_(n in trained) for n, v in values.items()}
        exact = {n: v.clone().requires_grad_(n in trained) for n, v in values.items()}
        y, wanted = adapted_linear(**ours, scale=0.5), reference.adapted_linear(**exact, scale=0.5)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        grad = torch.randn_like(wanted)
        a = torch.autograd.grad(y, [ours[n] for n in trained], grad.to(dtype))
        b = torch.autograd.grad(wanted, [exact[n] for n in trained], grad)
        for left, right in zip((y, *a), (wanted, *b), strict=True):
            scale = float(right.detach().abs().max())
            torch.testing.assert_close(left.double(), right, rtol=tolerance, atol=tolerance * scale)


def test_small_ops_gradcheck() -> None:
    torch.manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, gamma, beta = make(2, 3, 2, 2, 2), make(3), make(3)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    check = torch.autograd.gradcheck
    assert check(scale_shift, (x, gamma, beta))
    assert check(lambda *t: scale_shift(*t, channel_dim=-1), (make(2, 5, 3), gamma, beta))
    assert check(lambda a, w, b: frozen_batch_norm(a, mean, var, w, b), (x, gamma, beta))
    assert check(lambda a: frozen_batch_norm(a, mean, var, None, None), (x,))
    for activation in ("gelu", "relu"):
        assert check(
            lambda *t, act=activation: bottleneck(*t, activation=act),
            (make(2, 4, 6), make(3, 6), make(3), make(6, 3), make(6)),
        )
    y = frozen_batch_norm(x, mean, var, gamma, beta)
    assert torch.equal(y, torch.nn.functional.batch_norm(x, mean, var, gamma, beta))
    tokens, dw, db, uw, ub = make(2, 6), make(3, 6), make(3), make(6, 3), make(6)
    torch.testing.assert_close(
        bottleneck(tokens, dw, db, uw, ub), reference.bottleneck(tokens, dw, db, uw, ub)
    )
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        bottleneck(tokens, dw, db, uw, ub, "tanh")
    with pytest.raises(ValueError, match="gamma: got shape"):
        scale_shift(x, beta[:2], beta)
