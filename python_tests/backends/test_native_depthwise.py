"""Depthwise convolutions of the native backend against torch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.backends import eager, native, native_depthwise
from petite_fast.ops import dispatch, library

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

ISAS = native.build_info()["isas_usable"] if native.available()[0] else []
DTYPES = [torch.float32, torch.bfloat16]
ONE = [1, 1, 1]
NONE = [0, 0, 0]


class Case(NamedTuple):
    """One depthwise convolution."""

    batch: int
    channels: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    channels_last: bool = False


# Rows shorter than four results, of several blocks; planes in bands; lanes in part; groups of four
# vectors of channels and of less; sizes that a stride does not reach the end of.
CASES = {
    "one voxel": Case(3, 17, (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "two voxels stride 2": Case(1, 20, (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    "odd": Case(2, 7, (3, 7, 17), (1, 1, 1), (1, 1, 1)),
    "odd stride 2": Case(2, 7, (3, 7, 17), (2, 2, 2), (1, 1, 1)),
    "even stride 2": Case(1, 33, (8, 4, 10), (2, 2, 2), (0, 0, 0)),
    "valid": Case(3, 3, (3, 4, 5), (1, 1, 1), (0, 0, 0)),
    "mixed": Case(1, 5, (9, 3, 8), (1, 2, 1), (0, 1, 1)),
    "mixed stride 2": Case(1, 5, (4, 9, 9), (2, 1, 2), (1, 0, 0)),
    "deep": Case(1, 16, (17, 6, 6), (1, 1, 1), (1, 1, 1)),
    "bands": Case(1, 3, (4, 60, 90), (1, 1, 1), (1, 1, 1)),
    "bands stride 2": Case(1, 3, (5, 61, 180), (2, 2, 2), (1, 1, 1)),
    "last one voxel": Case(2, 17, (2, 1, 1), (1, 1, 1), (1, 1, 1), True),
    "last odd": Case(3, 17, (3, 7, 17), (1, 1, 1), (1, 1, 1), True),
    "last stride 2": Case(2, 70, (7, 3, 9), (2, 2, 2), (1, 1, 1), True),
    "last few": Case(2, 3, (3, 4, 5), (2, 2, 2), (0, 1, 0), True),
    "last wide": Case(1, 130, (4, 4, 4), (1, 1, 1), (1, 1, 1), True),
    "last bands": Case(1, 66, (3, 20, 40), (1, 1, 1), (1, 1, 1), True),
}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), native.build_info()["isa"]
    yield
    torch.set_num_threads(threads)
    native._load()[0].set_isa(isa)


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        last = case.channels_last and len(shape) == 5 and shape[1] > 1
        return tensor.to(memory_format=torch.channels_last_3d) if last else tensor

    small = [
        (n + 2 * p - 3) // s + 1
        for n, s, p in zip(case.size, case.stride, case.padding, strict=True)
    ]
    return {
        "x": normal(case.batch, case.channels, *case.size),
        "weight": normal(case.channels, 1, 3, 3, 3),
        "bias": normal(case.channels),
        "grad_y": normal(case.batch, case.channels, *small),
    }


def run(module: Any, case: Case, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The three maps and the transposed convolution, by one backend."""
    s, p, c = case.stride, case.padding, case.channels
    x, weight, bias, grad_y = t["x"], t["weight"], t["bias"], t["grad_y"]
    extra = [
        n - ((m - 1) * a - 2 * b + 3)
        for n, m, a, b in zip(x.shape[2:], grad_y.shape[2:], s, p, strict=True)
    ]
    return {
        "y": module.conv(x, weight, bias, s, p, ONE, False, NONE, c),
        "grad_x": module.conv_grad_input(grad_y, weight, list(x.shape), s, p, ONE, False, NONE, c),
        "grad_weight": module.conv_grad_weight(grad_y, x, list(weight.shape), s, p, ONE, c),
        "transposed": module.conv(grad_y, weight, bias, s, p, ONE, True, extra, c),
        "transposed grad": module.conv_grad_input(
            x, weight, list(grad_y.shape), s, p, ONE, True, extra, c
        ),
    }


def exact(case: Case, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return run(eager, case, {name: tensor.double() for name, tensor in t.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = make(case, dtype)
    wanted, torchs = exact(case, tensors), run(eager, case, tensors)
    for isa, threads in [*zip(ISAS, itertools.repeat(1)), (ISAS[-1], 2), (ISAS[-1], 5)]:
        native._load()[0].set_isa(isa)
        torch.set_num_threads(threads)
        for key, ours in run(native_depthwise, case, tensors).items():
            what = f"{key}, {isa}, {threads} threads"
            assert_twice_torch(ours, torchs[key], wanted[key], name=what)
            assert ours.dtype == dtype
            layout = eager.conv_layout(tensors["x"], tensors["grad_y"])
            assert key == "grad_weight" or ours.is_contiguous(memory_format=layout), what


@pytest.mark.parametrize("channels_last", [False, True])
def test_random_shapes(channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(24):
        padding = (draw(0, 1), draw(0, 1), draw(0, 1))
        size = tuple(max(draw(1, 2, 3, 5, 8, 13, 20), 3 - 2 * p) for p in padding)
        stride = (draw(1, 2), draw(1, 2), draw(1, 2))
        case = Case(draw(1, 2, 3), draw(1, 2, 16, 31, 50), size, stride, padding, channels_last)  # type: ignore[arg-type]
        tensors = make(case, torch.float32, seed)
        torch.set_num_threads(draw(1, 2, 5))
        native._load()[0].set_isa(ISAS[seed % len(ISAS)])
        wanted, torchs = exact(case, tensors), run(eager, case, tensors)
        for key, ours in run(native_depthwise, case, tensors).items():
            assert_twice_torch(ours, torchs[key], wanted[key], name=f"{key} of {case}")


def grad_of_taps(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """grad_weight by definition: torch's own multiplies the padding too."""
    x, grad_y = tensors["x"].double(), tensors["grad_y"].double()
    grad = torch.zeros(case.channels, 27, dtype=torch.float64)
    for i, tap in enumerate(itertools.product(range(3), repeat=3)):
        g, source = grad_y, x
        for axis, k in enumerate(tap):
            at = torch.arange(g.shape[axis + 2]) * case.stride[axis] + k - case.padding[axis]
            inside = ((at >= 0) & (at < case.size[axis])).nonzero().flatten()
            g = g.index_select(axis + 2, inside)
            source = source.index_select(axis + 2, at[inside])
        grad[:, i] = (g * source).sum((0, 2, 3, 4))
    return grad.view(-1, 1, 3, 3, 3)


@pytest.mark.parametrize("name", ["odd", "odd stride 2", "last odd", "last stride 2"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_finite(name: str, value: float) -> None:
    """An infinity at the border must not meet the padding: its product with zero is no number."""
    case = CASES[name]
    tensors = make(case, torch.float32)
    tensors["x"][0, 1, 0, 0, -1] = value
    tensors["grad_y"][0, 2, -1, 0, 0] = value
    wanted = exact(case, tensors)
    wanted["grad_weight"] = grad_of_taps(case, tensors)
    for key, ours in run(native_depthwise, case, tensors).items():
        torch.testing.assert_close(ours.isfinite(), wanted[key].isfinite(), msg=key)
        torch.testing.assert_close(ours.isnan(), wanted[key].isnan(), msg=key)


def test_views() -> None:
    case = CASES["odd"]
    plain = make(case, torch.float32)
    wanted = run(native_depthwise, case, plain)
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in plain.items()}
    for key, ours in run(native_depthwise, case, strided).items():
        torch.testing.assert_close(ours, wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_deterministic(threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case(2, 33, (9, 12, 20), (1, 1, 1), (1, 1, 1))
    tensors = make(case, torch.float32)
    first = run(native_depthwise, case, tensors)
    for _ in range(3):
        for key, again in run(native_depthwise, case, tensors).items():
            assert torch.equal(first[key], again), key


def test_ops_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
    case = CASES["even stride 2"]
    tensors = make(case, torch.float32)
    wanted = run(native_depthwise, case, tensors)
    for key, ours in run(library, case, tensors).items():
        assert torch.equal(ours, wanted[key]), key


def reason(x: torch.Tensor, weight: torch.Tensor, groups: int, **changes: Any) -> str:
    g = {"stride": ONE, "padding": ONE, "dilation": ONE} | changes
    possible, text = native_depthwise.can_run_conv(
        x, weight, None, g["stride"], g["padding"], g["dilation"], False, NONE, groups
    )
    assert possible == (not text)
    return text


def test_refuses() -> None:
    x, weight = torch.zeros(1, 4, 9, 9, 9), torch.zeros(4, 1, 3, 3, 3)
    assert not reason(x, weight, 4)
    assert "depthwise" in reason(x, torch.zeros(4, 2, 3, 3, 3), 2)
    assert "depthwise" in reason(x, torch.zeros(8, 1, 3, 3, 3), 4)
    for changes in ({"stride": [1, 1, 3]}, {"padding": [2, 1, 1]}, {"dilation": [1, 2, 1]}):
        assert "geometry" in reason(x, weight, 4, **changes)
    assert "geometry" in reason(x, torch.zeros(4, 1, 1, 3, 3), 4)
    assert "float64" in reason(x.double(), weight.double(), 4)
    assert "bfloat16" in reason(x, weight.bfloat16(), 4)
    assert "empty" in reason(x[:0], weight, 4)
    last = x.to(memory_format=torch.channels_last_3d)
    assert "too few" in reason(last, weight, 4)
    assert not reason(last[..., :4], weight, 4)
    assert dispatch.choose("conv", last, weight, None, ONE, ONE, ONE, False, NONE, 4) is eager.conv


def test_binding_checks_sizes() -> None:
    module = native._load()[0]
    x, weight = torch.zeros(1, 2, 4, 4, 4), torch.zeros(2, 27)
    y = torch.empty_like(x)
    given = [native._operand(t) for t in (x, weight, None, y)]
    axes = [(4, 4, 1, 1)] * 3
    module.depthwise((1, 2, axes, False), False, *given, 1)
    for shape in (
        (1, 3, axes, False),
        (0, 2, axes, False),
        (1, 2, [(4, 4, 1, 1), (4, 4, 1, 1), (4, 5, 1, 1)], False),
        (1, 2, [(4, 2, 3, 1), (4, 4, 1, 1), (4, 4, 1, 1)], False),
        (1, 2, [(4, 6, 1, 2), (4, 4, 1, 1), (4, 4, 1, 1)], False),
    ):
        with pytest.raises(ValueError, match="got"):
            module.depthwise(shape, False, *given, 1)
    with pytest.raises(ValueError, match="null"):
        module.depthwise_grad_weight((1, 2, axes, False), given[0], (0, 0, 0), given[1], 1)
