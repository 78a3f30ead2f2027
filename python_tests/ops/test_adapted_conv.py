"""adapted_conv against the float64 reference: values, gradients, dtypes, layouts, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from conv_cases import Case, assert_twice_torch, conv_tensors, leaves
from torch.nn import functional as F

from petite_fast.ops import adapted_conv, reference

conv_module = importlib.import_module("petite_fast.ops.adapted_conv")
ALL = ["x", "weight", "bias", "lora_A", "lora_B", "gamma", "beta"]
# What trains: every row of the saved-tensor table, and everything at once.
TRAINED = {
    "lora": ["x", "lora_A", "lora_B"],
    "lora-fa": ["x", "lora_B"],
    "a-only": ["x", "lora_A"],
    "bitfit": ["x", "bias"],
    "ssf": ["x", "gamma", "beta"],
    "frozen": ["x"],
    "first-layer": ["lora_A", "lora_B", "bias"],
    "all": ALL,
}


@pytest.fixture(params=[True, False], ids=["low-rank", "full"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Force one of the two weight gradients."""
    monkeypatch.setattr(
        conv_module.ConvMap, "low_rank_is_faster", lambda self, weight, r: request.param
    )
    return bool(request.param)


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
def test_values_and_gradients_float64(case: Case, trained: list[str], path: bool) -> None:
    tensors = conv_tensors(case, torch.float64)
    inputs = leaves(tensors, trained)
    arguments = {**tensors, "scale": 0.7, **case.geometry}
    ours, wanted = adapted_conv(**arguments), reference.adapted_conv(**arguments)
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)
    grad_y = torch.randn_like(wanted)
    for name, a, b in zip(
        trained,
        torch.autograd.grad(ours, inputs, grad_y),
        torch.autograd.grad(wanted, inputs, grad_y),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_twice_the_error_of_torch(
    case: Case, dtype: torch.dtype, channels_last: bool, path: bool
) -> None:
    exact = conv_tensors(case, torch.float64)
    low = conv_tensors(case, dtype)
    plain = conv_tensors(case, dtype)
    if channels_last:
        for tensors in (low, plain):
            tensors["x"] = tensors["x"].to(memory_format=torch.channels_last_3d)
    # The adapters stay float32 beside a half-precision base, as users keep them.
    for name in ("lora_A", "lora_B", "gamma", "beta"):
        low[name] = exact[name].to(torch.float32)
    results = []
    for run, tensors in (
        (reference.adapted_conv, exact),
        (reference.adapted_conv, plain),
        (adapted_conv, low),
    ):
        inputs = leaves(tensors, ALL[:5])
        y = run(**{**tensors, "scale": 0.7, **case.geometry})
        grad_y = torch.ones_like(y) + torch.arange(y.shape[1]).view(-1, 1, 1, 1).to(y)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, grad_y)])
    for position, (wanted, theirs, ours) in enumerate(zip(*results, strict=True)):
        name = ["output", *ALL][position]
        assert_twice_torch(ours, theirs, wanted, 3.0 if position else 2.0, name)


@pytest.mark.parametrize("trained", [["x", "lora_A", "lora_B"], ["gamma", "beta"], ALL])
def test_gradcheck(case: Case, trained: list[str]) -> None:
    if case.name == "k16-s16":
        pytest.skip("65,536 weights are too many for finite differences; the reference covers it")
    tensors = conv_tensors(case._replace(batch=1, size=(3, 4, 3)), torch.float64)
    names = list(tensors)
    leaves(tensors, trained)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return adapted_conv(**dict(zip(names, values, strict=True)), scale=0.7, **case.geometry)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch_sizes(batch: int) -> None:
    case = Case("k3", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1}, batch=batch)
    tensors = conv_tensors(case, torch.float32)
    inputs = leaves(tensors, ["x", "lora_A", "lora_B", "bias"])
    y = adapted_conv(**tensors, padding=1)
    assert y.shape == (batch, 6, 5, 6, 7)
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert torch.isfinite(gradient).all()


def test_small_gamma_keeps_x_and_is_right() -> None:
    case = Case("k3", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1})
    tensors = conv_tensors(case, torch.float64)
    tensors["gamma"][1] = 0.0
    tensors["gamma"][2] = 1e-9
    (gamma,) = leaves(tensors, ["gamma"])
    arguments = {**tensors, **case.geometry}
    ours, wanted = adapted_conv(**arguments), reference.adapted_conv(**arguments)
    grad_y = torch.randn_like(wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, gamma, grad_y) for y in (ours, wanted)), rtol=1e-10, atol=1e-10
    )


def test_unbatched_and_non_contiguous() -> None:
    case = Case("k3", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1})
    tensors = conv_tensors(case, torch.float64)
    x = tensors.pop("x")
    batched = adapted_conv(x, **tensors, padding=1)
    torch.testing.assert_close(adapted_conv(x[0], **tensors, padding=1), batched[0])
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    torch.testing.assert_close(adapted_conv(wide[..., ::2], **tensors, padding=1), batched)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(24, 24, 24), (7, 9, 11)])
def test_batch_one_routes_to_onednn(shape: tuple[int, int, int], channels_last: bool) -> None:
    """The small batch-1 case equals torch's own path, forward and backward, in float32."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, *shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    w = torch.randn(8, 8, 3, 3, 3) / 15
    x.requires_grad_()
    w.requires_grad_()
    double = [t.detach().double().requires_grad_() for t in (x, w)]
    ours = adapted_conv(x, w, padding=1)
    theirs = F.conv3d(x, w, padding=1)
    exact = F.conv3d(*double, padding=1)
    assert ours.is_contiguous(memory_format=torch.channels_last_3d) == channels_last
    grad_y = torch.randn_like(theirs)
    ours_all = [ours, *torch.autograd.grad(ours, (x, w), grad_y)]
    theirs_all = [theirs, *torch.autograd.grad(theirs, (x, w), grad_y)]
    exact_all = [exact, *torch.autograd.grad(exact, double, grad_y.double())]
    for a, b, c in zip(ours_all, theirs_all, exact_all, strict=True):
        assert_twice_torch(a, b, c, 3.0)


def test_batch_one_does_not_call_vol2col() -> None:
    """No slow_conv3d in the trace of a small batch-1 step."""
    x = torch.randn(1, 8, 10, 10, 10, requires_grad=True)
    w, a = torch.randn(8, 8, 3, 3, 3), torch.randn(2, 8, 3, 3, 3, requires_grad=True)
    b = torch.randn(8, 2, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        adapted_conv(x, w, lora_A=a, lora_B=b, padding=1).sum().backward()
    names = {event.key for event in trace.key_averages()}
    assert not [name for name in names if "slow_conv" in name], names
    assert any("mkldnn" in name for name in names), names


def test_second_derivative_is_refused() -> None:
    x = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    y = adapted_conv(x, torch.randn(2, 2, 3, 3, 3))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_deterministic() -> None:
    case = Case("k3", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1, "padding_mode": "circular"})
    runs = []
    for _ in range(2):
        tensors = conv_tensors(case, torch.float32)
        inputs = leaves(tensors, ALL)
        y = adapted_conv(**tensors, **case.geometry)
        runs.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 3, 4, 4, 4)}, r"x: got shape \(1, 3, 4, 4, 4\), wanted \[N, 4"),
        ({"bias": torch.zeros(5)}, r"bias: got shape \(5,\), wanted \(6,\)"),
        ({"gamma": torch.zeros(5)}, "gamma: got"),
        ({"lora_A": None}, "both or neither"),
        ({"lora_B": torch.zeros(6, 9)}, r"lora_B: got shape \(6, 9\), wanted \(6, 3\)"),
        ({"lora_A": torch.zeros(3, 4, 1, 1, 1)}, "lora_A: got"),
        ({"groups": 4}, "weight: got 6 rows"),
        ({"stride": 0}, "stride: got 0"),
        ({"stride": (1, 2)}, "stride: got"),
        ({"padding": "full"}, "padding: got 'full'"),
        ({"padding": -1}, "non-negative"),
        ({"padding": "same", "stride": 2}, "wants stride 1"),
        ({"padding_mode": "mirror"}, "padding_mode: got 'mirror'"),
        ({"output_padding": 1}, "output_padding: got 1"),
        ({"dilation": 0}, "dilation: got 0"),
        ({"weight": torch.zeros(6, 4, 3, 3)}, "five dimensions"),
    ],
)
def test_bad_arguments(change: dict[str, object], words: str) -> None:
    case = Case("k3", 4, 6, (3, 3, 3), (5, 6, 7), {})
    with pytest.raises(ValueError, match=words):
        adapted_conv(**{**conv_tensors(case, torch.float32), **change})  # type: ignore[arg-type]


def test_mixed_dtypes_without_autocast() -> None:
    with pytest.raises(TypeError, match="x: got torch.float64, wanted torch.float32"):
        adapted_conv(torch.zeros(1, 2, 3, 3, 3, dtype=torch.float64), torch.zeros(2, 2, 1, 1, 1))
