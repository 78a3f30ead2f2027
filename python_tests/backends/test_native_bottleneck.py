"""The bottleneck adapter on the native backend: float64, sizes, threads, instruction sets, NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.backends import eager_bottleneck, native, native_bottleneck
from petite_fast.ops import bottleneck, dispatch, library

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

NAMES = ("y", "grad_x", "grad_Wd", "grad_bd", "grad_Wu", "grad_bu")
# batch, channels, hidden, size
SIZES = [
    (1, 1, 1, (1, 1, 1)),
    (3, 3, 2, (7, 17, 3)),
    (1, 17, 5, (8, 8, 8)),
    (2, 32, 8, (9, 19, 3)),
    (1, 5, 9, (513, 1, 1)),
    (2, 130, 33, (2, 7, 3)),
    (1, 4, 3, (23, 13, 17)),
]


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(size: Any, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, grad_y, Wd, bd, Wu, bu."""
    batch, channels, hidden, spatial = size
    # With seed 0 the first size has its voxel at the zero of GELU's slope: what is left
    # there is a product's rounding, which baseline, without FMA, makes and torch does not.
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, channels, *spatial)
    weights = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    scales = (1.0, 1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in zip((shapes, shapes, *weights), scales, strict=True)
    ]


def results(backend: Any, given: list[torch.Tensor], activation: str) -> list[torch.Tensor]:
    x, grad_y, *weights = given
    form = (activation, True, x.dtype)
    y = backend.bottleneck(x, *weights, *form)
    return [y, *backend.bottleneck_backward(grad_y, x, *weights[:3], *form)]


def check(given: list[torch.Tensor], activation: str, dtype: torch.dtype) -> None:
    exact = results(eager_bottleneck, [t.double() for t in given], activation)
    given = [t.to(dtype) for t in given]
    theirs = results(eager_bottleneck, given, activation)
    ours = results(native_bottleneck, given, activation)
    for name, mine, plain, wanted in zip(NAMES, ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.stride() == plain.stride(), name
        assert_twice_torch(mine, plain, wanted, 3.0 if name != "y" else 2.0, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_float64(size: Any, activation: str, dtype: torch.dtype) -> None:
    check(tensors(size), activation, dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_instruction_set(isa: str, activation: str) -> None:
    module, _ = native._load()
    info = module.build_info()
    if isa not in info["isas_usable"]:
        pytest.skip(f"this CPU or build has no {isa}")
    try:
        module.set_isa(isa)
        for size in SIZES[1:4]:
            check(tensors(size), activation, torch.float32)
    finally:
        module.set_isa(info["isa"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads(threads: Any, count: int) -> None:
    threads(count)
    given = tensors(SIZES[-1], torch.float32)
    first, second = (results(native_bottleneck, given, "gelu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(tensors(SIZES[-1]), "gelu", torch.float32)


def test_gelu_far_from_zero() -> None:
    """Values and slopes from -100 to 100: no overflow, and the tails are those of erf."""
    x = torch.linspace(-100, 100, 4096).view(1, 1, 16, 16, 16)
    given = [x, torch.ones_like(x), torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1)]
    ours = results(native_bottleneck, [*given, torch.zeros(1)], "gelu")
    exact = results(eager_bottleneck, [t.double() for t in [*given, torch.zeros(1)]], "gelu")
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=1e-6)


def test_views_that_are_not_contiguous() -> None:
    given = tensors((2, 6, 3, (8, 9, 10)), torch.float32)
    wanted = results(native_bottleneck, given, "gelu")
    turned = [t.mT.contiguous().mT for t in given[:2]] + given[2:]
    for name, a, b in zip(NAMES, results(native_bottleneck, turned, "gelu"), wanted, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("which", [0, 1], ids=["x", "grad_y"])
def test_infinities_and_nan_go_where_torch_sends_them(
    value: float, activation: str, which: int
) -> None:
    given = tensors((1, 3, 2, (8, 8, 9)), torch.float32)
    given[which][0, 1, 7, 7, 8] = value  # in the last tile, which is not full
    ours = results(native_bottleneck, given, activation)
    theirs = results(eager_bottleneck, given, activation)
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
        # MKL's gelu(inf) is NaN where the formula gives inf.
        assert activation == "gelu" or torch.equal(a.isnan(), b.isnan()), name


def test_what_is_refused() -> None:
    def refusal(size: Any, volumes: bool = True, dtype: torch.dtype = torch.float32) -> str:
        x, _, *weights = tensors(size, torch.float32)
        return native_bottleneck.can_run_bottleneck(x, *weights, "relu", volumes, dtype)[1]

    assert refusal((1, 8, 2, (8, 8, 8))) == ""
    assert "tokens" in refusal((1, 8, 2, (8, 8, 8)), volumes=False)
    assert "most of a tile" in refusal((1, 8, 2, (3, 3, 3)))
    assert "that many channels" in refusal((1, 257, 2, (16, 16, 16)))
    assert "that many channels" in refusal((1, 129, 2, (8, 8, 8)))
    assert "products are in" in refusal((1, 8, 2, (8, 8, 8)), dtype=torch.bfloat16)
    assert "empty" in refusal((0, 8, 2, (8, 8, 8)))


@pytest.mark.usefixtures("free_choice")
def test_the_op_uses_it() -> None:
    x, grad_y, *weights = tensors((1, 8, 2, (8, 8, 8)), torch.float32)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    with dispatch.explaining() as decisions:
        y = bottleneck(*leaves, channel_dim=1)
        torch.autograd.grad(y, leaves, grad_y)
    assert {(d.op, d.backend) for d in decisions} == {
        ("bottleneck", "native"), ("bottleneck_backward", "native"),
    }  # fmt: skip
    torch.library.opcheck(
        library.bottleneck, (*[t.detach() for t in leaves], "gelu", True, x.dtype)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": (1, 8, 0, 64)}, "sizes must be positive"),
        ({"sizes": (1, 8, 2, 65)}, "must have 520 elements"),
        ({"activation": 2}, "activation must be 0 or 1"),
        ({"threads": 0}, "threads must be positive"),
        ({"workspace": (8, 0, 3)}, "workspace: must have"),
        ({"down": (0, 0, 0)}, "down: must not be null"),
        ({"out": (8, 2, 512)}, "out: must have the dtype of x"),
    ],
)
def test_a_wrong_call_is_an_error(wrong: dict[str, Any], message: str) -> None:
    module, _ = native._load()
    x, y, down, up = torch.zeros(512), torch.zeros(512), torch.zeros(16), torch.zeros(16)
    biases = torch.zeros(2), torch.zeros(8)
    work = torch.zeros(module.bottleneck_workspace((1, 8, 2, 64), 1))
    tensors = {"x": x, "grad_y": None, "out": y, "down": down, "down_bias": biases[0], "up": up,
               "up_bias": biases[1], "grads": None, "workspace": work}  # fmt: skip
    call = {"sizes": (1, 8, 2, 64), "activation": 0}
    call |= {name: native._operand(t) for name, t in tensors.items()} | {"threads": 1}
    module.bottleneck(*call.values())
    with pytest.raises(ValueError, match=message):
        module.bottleneck(*(call | wrong).values())
