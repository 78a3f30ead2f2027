"""bottleneck on tokens and on volumes: the reference, memory, layouts, precision, compile."""

from __future__ import annotations

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.ops import bottleneck, reference, saved_bytes

C, H = 6, 3
SHAPES = {
    "tokens": (-1, (2, 7, C)),
    "one-token": (-1, (C,)),
    "matrix": (1, (5, C)),
    "line": (1, (2, C, 9)),
    "volume": (1, (2, C, 3, 4, 5)),
    "volume-batch1": (1, (1, C, 3, 4, 5)),
    "voxel": (1, (2, C, 1, 1, 1)),
    "empty": (1, (0, C, 3, 4, 5)),
}
LAYOUTS = ["contiguous", "channels_last", "permuted"]
CASES = [(n, k) for n, (_, s) in SHAPES.items() for k in (LAYOUTS if len(s) > 2 else LAYOUTS[:1])]


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (H, C), (H,), (C, H), (C,))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in another memory order."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.mT.contiguous().mT if layout == "permuted" else x


def step(function, values, activation, channel_dim):  # type: ignore[no-untyped-def]
    """Output and the gradients of everything."""
    leaves = [v.detach().requires_grad_() for v in values]
    y = function(*leaves, activation=activation, channel_dim=channel_dim)
    grad_y = (torch.arange(y.numel()) % 5 - 1).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_the_reference(name: str, layout: str, activation: str, dtype: torch.dtype) -> None:
    channel_dim, shape = SHAPES[name]
    values = tensors(shape, dtype)
    values[0] = laid_out(values[0], layout)
    exact = step(reference.bottleneck, [v.double() for v in values], activation, channel_dim)
    theirs = step(reference.bottleneck, values, activation, channel_dim)
    ours = step(bottleneck, values, activation, channel_dim)
    for position, (got, plain, wanted) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert got.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
        else:
            assert_twice_torch(got, plain, wanted, 3.0 if position else 2.0, f"{name} {position}")
    assert ours[0].stride() == values[0].stride()


@pytest.mark.parametrize(
    ("channel_dim", "shape"), [(-1, (2, 3, C)), (1, (5, C)), (1, (2, C, 4)), (1, (2, C, 1, 2, 2))]
)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_gradcheck(channel_dim: int, shape: tuple[int, ...], activation: str) -> None:
    values = [v.requires_grad_() for v in tensors(shape, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: bottleneck(*t, activation, channel_dim), values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_x_only(layout: str) -> None:
    x, *weights = tensors((2, C, 3, 4, 5), torch.float32)
    x = laid_out(x, layout).requires_grad_()
    parameters = [torch.nn.Parameter(w) for w in weights]
    assert saved_bytes(lambda: bottleneck(x, *parameters, channel_dim=1)) == x.nbytes


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_does_not_copy_the_volume(layout: str) -> None:
    """Forward: up(act(down(x))) and y are as large as x, down(x) and act half of it: no more."""
    x, *weights = tensors((2, C, 16, 16, 16), torch.float32)
    x = laid_out(x, layout)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        bottleneck(x, *weights, channel_dim=1)
    sizes = [e.self_cpu_memory_usage for e in trace.events() if e.self_cpu_memory_usage > 0]
    assert sum(sizes) < 3.1 * x.nbytes


@pytest.mark.parametrize("name", ["tokens", "volume"])
def test_autocast(name: str) -> None:
    channel_dim, shape = SHAPES[name]
    values = tensors(shape, torch.float32)
    exact = step(reference.bottleneck, values, "gelu", channel_dim)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(bottleneck, values, "gelu", channel_dim)
    for got, wanted in zip(ours, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["tokens", "volume"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(name: str, layout: str, autocast: bool) -> None:
    channel_dim, shape = SHAPES[name]
    values = tensors(shape, torch.float32)
    values[0] = laid_out(values[0], layout)
    torch._dynamo.reset()
    compiled = torch.compile(bottleneck, fullgraph=True, backend="aot_eager")
    runs = []
    for function in (bottleneck, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            runs.append(step(function, values, "gelu", channel_dim))
    tolerance = 2e-2 if autocast else 1e-5
    for eager, traced in zip(*runs, strict=True):
        torch.testing.assert_close(
            traced, eager, rtol=tolerance, atol=tolerance * float(eager.abs().max())
        )


@pytest.mark.parametrize("name", ["tokens", "volume", "empty"])
def test_opcheck(name: str) -> None:
    channel_dim, shape = SHAPES[name]
    x, *weights = tensors(shape, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        form = ("gelu", channel_dim == 1, dtype)
        torch.library.opcheck(torch.ops.petite_fast.bottleneck, (x, *weights, *form))
        for grad_y in (torch.randn_like(x), torch.ones(()).expand(shape)):
            arguments = (grad_y, x, *weights[:3], *form)
            torch.library.opcheck(torch.ops.petite_fast.bottleneck_backward, arguments)


def test_refusals() -> None:
    x, *weights = tensors((2, C, 3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match="channel_dim: got 2, wanted 1 or -1"):
        bottleneck(x, *weights, channel_dim=2)
    with pytest.raises(ValueError, match=r"x: got shape .* wanted \[\.\.\., 6\]"):
        bottleneck(x, *weights)
    for bad in (x[:, :5], x[0, :, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"x: got shape .* wanted \[N, 6, \.\.\.\]"):
            bottleneck(bad, *weights, channel_dim=1)
    with pytest.raises(ValueError, match="up_bias: got shape"):
        bottleneck(x, *weights[:3], weights[3][:2], channel_dim=1)
    with pytest.raises(TypeError, match="x: got torch.float64"):
        bottleneck(x.double(), *weights, channel_dim=1)
