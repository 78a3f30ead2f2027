"""Convolutions of few channels to many on the native backend, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.backends import eager, native, native_stem
from petite_fast.backends.geometry import ConvGeometry
from petite_fast.ops import dispatch

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


class Stem(NamedTuple):
    """[batch, inputs, *size] -> outputs channels."""

    inputs: int
    outputs: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    batch: int = 1


CASES = {
    "whole vectors": Stem(1, 32, (3, 7, 48)),
    "several slabs": Stem(1, 8, (2, 67, 32), batch=3),
    "odd": Stem(2, 17, (3, 7, 17), batch=3),
    "small": Stem(4, 9, (1, 2, 3)),
    "one voxel": Stem(1, 8, (1, 1, 1)),
    "valid": Stem(3, 8, (5, 6, 19), padding=(0, 0, 0)),
    "strided": Stem(1, 33, (7, 9, 35), stride=(2, 2, 2)),
    "strided valid": Stem(2, 8, (6, 8, 16), stride=(2, 2, 2), padding=(0, 0, 0)),
    "uneven": Stem(2, 10, (7, 6, 40), (2, 3, 5), (2, 1, 3), (0, 2, 1), (1, 2, 2)),
    "dilated": Stem(1, 8, (5, 9, 21), padding=(2, 2, 2), dilation=(2, 2, 2)),
    "all padding": Stem(1, 8, (2, 2, 2), padding=(4, 4, 4)),
    "large kernel": Stem(1, 8, (8, 9, 10), (7, 7, 7), (2, 2, 2), (3, 3, 3)),
    "flat kernel": Stem(4, 12, (3, 9, 18), (1, 3, 3), padding=(0, 1, 1)),
}


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(case: Stem) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = normal(case.batch, case.inputs, *case.size)
    geometry = ConvGeometry.of_weight_op(case.stride, case.padding, case.dilation)
    size = geometry.output_size(x.shape[2:], case.kernel)
    return {
        "x": x,
        "weight": normal(case.outputs, case.inputs, *case.kernel) / math.prod(case.kernel) ** 0.5,
        "bias": normal(case.outputs),
        "grad_y": normal(case.batch, case.outputs, *size),
    }


def results(backend: Any, case: Stem, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    geometry = (case.stride, case.padding, case.dilation)
    rest = (*geometry, False, (0, 0, 0), 1)
    return {
        "y": backend.conv(t["x"], t["weight"], t["bias"], *rest),
        "y without bias": backend.conv(t["x"], t["weight"], None, *rest),
        "grad_x": backend.conv_grad_input(t["grad_y"], t["weight"], t["x"].shape, *rest),
        "grad_weight": backend.conv_grad_weight(
            t["grad_y"], t["x"], t["weight"].shape, *geometry, 1
        ),
    }


def check(case: Stem, given: dict[str, torch.Tensor]) -> None:
    exact = results(eager, case, {k: v.double() for k, v in given.items()})
    given = {k: v.float() for k, v in given.items()}
    torch_float = results(eager, case, given)
    for name, ours in results(native_stem, case, given).items():
        assert_twice_torch(ours, torch_float[name], exact[name], name=name)
        assert ours.is_contiguous(), name


def test_grad_x_of_channels_last_volumes() -> None:
    for name in ("odd", "several slabs", "strided"):
        case, given = CASES[name], tensors(CASES[name])
        last = torch.channels_last_3d
        given["grad_y"] = given["grad_y"].contiguous(memory_format=last)
        rest = (case.stride, case.padding, case.dilation, False, (0, 0, 0), 1)
        size = given["x"].shape
        exact = eager.conv_grad_input(given["grad_y"], given["weight"], size, *rest)
        arguments = (given["grad_y"].float(), given["weight"].float(), size, *rest)
        torch_float = eager.conv_grad_input(*arguments)
        ours = native_stem.conv_grad_input(*arguments)
        assert_twice_torch(ours, torch_float, exact)
        assert ours.is_contiguous(memory_format=last)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_float64(case: Stem) -> None:
    check(case, tensors(case))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    module, _ = native._load()
    before = module.build_info()["isa"]
    if isa not in module.build_info()["isas_usable"]:
        pytest.skip(f"this CPU does not run {isa}")
    module.set_isa(isa)
    try:
        for case in CASES.values():
            check(case, tensors(case))
    finally:
        module.set_isa(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads(threads: Any, count: int) -> None:
    threads(count)
    for case in (CASES["several slabs"], CASES["odd"], CASES["one voxel"]):
        given = tensors(case)
        check(case, given)
        single = {k: v.float() for k, v in given.items()}
        first, second = (results(native_stem, case, single) for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, second[key]), key


def test_views_that_are_not_contiguous() -> None:
    case = CASES["odd"]
    given = tensors(case)
    for name, tensor in given.items():
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1]).double()
        wide[..., ::2] = tensor
        given[name] = wide[..., ::2]
    check(case, given)


@pytest.mark.parametrize("name", ["valid", "odd", "strided", "strided valid"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinities_and_nan_reach_what_they_touch(name: str, value: float) -> None:
    case = CASES[name]
    for place in ((0, 0, 0, 0, 0), (-1, -1, -1, -1, -1), (0, 0, 1, 2, -2)):
        given = {k: v.float() for k, v in tensors(case).items()}
        given["x"][place] = value
        # Which sums see the place: the same convolution of a 1 there and 0 elsewhere, ones around.
        seen = {k: torch.ones_like(v) for k, v in given.items()}
        seen["x"] = torch.zeros_like(given["x"])
        seen["x"][place] = 1
        seen["bias"].zero_()
        wanted = results(eager, case, seen)
        found = results(native_stem, case, given)
        given["grad_y"][place] = value
        seen["grad_y"].zero_()
        found["grad_x"] = results(native_stem, case, given)["grad_x"]
        seen["grad_y"][place] = 1
        wanted["grad_x"] = results(eager, case, seen)["grad_x"]
        for key, ours in found.items():
            assert torch.equal(~ours.isfinite(), wanted[key] > 0.5), key


def reason(op: str, *args: Any) -> str:
    return getattr(native_stem, f"can_run_{op}")(*args)[1]


def test_what_is_refused() -> None:
    x, w = torch.randn(1, 1, 5, 5, 32), torch.randn(8, 1, 3, 3, 3)
    one, two, zero = (1, 1, 1), (2, 2, 2), (0, 0, 0)
    rest = (one, one, one, False, zero, 1)
    assert reason("conv", x, w, None, *rest) == ""
    assert "strided" in reason("conv", x, w, None, two, *rest[1:])
    assert "transposed" in reason("conv", x, w, None, one, one, one, True, zero, 1)
    assert "float64" in reason("conv", x.double(), w, None, *rest)
    assert "float64" in reason("conv", x, w, w.double(), *rest)
    assert "empty" in reason("conv", x[:0], w, None, *rest)
    assert "device" in reason("conv", x.to("meta"), w, None, *rest)
    assert "channels" in reason("conv", x, w[:7], None, *rest)
    assert "channels" in reason("conv", x.expand(1, 5, -1, -1, -1), w.expand(8, 5, -1, -1, -1),
                                None, *rest)  # fmt: skip
    assert "kernel" in reason("conv", x, torch.randn(8, 1, 5, 5, 5), None, one, two, *rest[2:])
    assert "fit" in reason("conv", x[..., :1, :], w, None, one, zero, *rest[2:])
    assert "vectors" in reason("conv", x[..., :17], w, None, *rest)
    last = torch.randn(1, 2, 5, 5, 32).contiguous(memory_format=torch.channels_last_3d)
    assert "last" in reason("conv", last, torch.randn(8, 2, 3, 3, 3), None, *rest)
    grad_y = torch.randn(1, 8, 5, 5, 32)
    assert reason("conv_grad_weight", grad_y, x, w.shape, one, one, one, 1) == ""
    assert "strided" in reason("conv_grad_weight", grad_y, x, w.shape, two, one, one, 1)
    assert reason("conv_grad_input", grad_y, w, x.shape, *rest) == ""
    assert reason("conv_grad_input", grad_y[..., :17], w, x[..., :17].shape, *rest) == ""
    large = torch.randn(8, 2, 7, 7, 7)
    assert "large" in reason("conv_grad_input", grad_y, large, x.shape, *rest)
    assert "pointwise" in reason("conv_grad_input", grad_y, w[..., :1, :1, :1], x.shape, *rest)


@pytest.mark.usefixtures("free_choice")
def test_dispatch_chooses_it() -> None:
    x, w = torch.randn(1, 1, 5, 5, 32), torch.randn(8, 1, 3, 3, 3)
    one = (1, 1, 1)
    chosen = dispatch.choose("conv", x, w, None, one, one, one, False, (0, 0, 0), 1)
    assert chosen is native_stem.conv
    grad_y = torch.randn(1, 8, 5, 5, 32)
    chosen = dispatch.choose("conv_grad_weight", grad_y, x, w.shape, one, one, one, 1)
    assert chosen is native_stem.conv_grad_weight
    size = (1, 1, 5, 5, 32)
    chosen = dispatch.choose("conv_grad_input", grad_y, w, size, one, one, one, False, one, 1)
    assert chosen is native_stem.conv_grad_input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"geometry": 0}, "sizes must be positive"),
        ({"kernel": (9, 9, 9)}, "the kernel must fit"),
        ({"kernel": (8, 8, 9)}, "too many taps"),
        ({"x": native._operand(torch.empty(3))}, "x: must have"),
        ({"weight": (0, 0, 0)}, "either weight or grad_y"),
        ({"bias": native._operand(torch.empty(8).double())}, "bias: must be float32"),
        ({"out": native._operand(torch.empty(3))}, "out: must have"),
        ({"workspace": native._operand(torch.empty(3))}, "workspace: must have"),
        ({"threads": 0}, "threads must be positive"),
    ],
)
def test_a_wrong_call_is_an_error(wrong: dict[str, Any], message: str) -> None:
    module, _ = native._load()
    kernel = wrong.pop("kernel", (3, 3, 3))
    size = (8, 8, 8) if kernel == (9, 9, 9) else (8, 8, 9)
    one = (1, 1, 1)
    geometry = ((wrong.pop("geometry", 1), 1, 8), size, kernel, one, (0, 0, 0), one)
    x, weight = torch.zeros(1, 1, *size), torch.zeros(8, 1, 3, 3, 3)
    out = torch.zeros(8, *(n - 2 for n in size))
    workspace = torch.empty(
        module.stem_workspace(((1, 1, 8), size, one, one, (0, 0, 0), one), False, 1) * 64
    )
    call = {
        "geometry": geometry, "x": native._operand(x), "weight": native._operand(weight),
        "bias": (0, 0, 0), "grad_y": (0, 0, 0), "out": native._operand(out),
        "workspace": native._operand(workspace), "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        module.stem(*(call | wrong).values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": 2, "rows": 3}, "rows must be"),
        ({"rows": 0}, "rows must be"),
        ({"matrix": native._operand(torch.empty(3))}, "matrix: must have 162 elements"),
        ({"grad_x": native._operand(torch.empty(3))}, "grad_x: must have 60 elements"),
        ({"grad_x": (0, 0, 0)}, "grad_x: must not be null"),
        ({"threads": 0}, "threads must be positive"),
    ],
)
def test_a_wrong_shift_is_an_error(wrong: dict[str, Any], message: str) -> None:
    module, _ = native._load()
    one, matrix, grad_x = (1, 1, 1), torch.zeros(162), torch.zeros(60)
    call = {
        "geometry": ((1, 1, 8), (3, 4, 5), (3, 3, 3), one, (0, 0, 0), one), "first": 0, "rows": 2,
        "matrix": native._operand(matrix), "grad_x": native._operand(grad_x),
        "threads": 1,
    }  # fmt: skip
    module.shift_add(*call.values())
    with pytest.raises(ValueError, match=message):
        module.shift_add(*(call | wrong).values())
