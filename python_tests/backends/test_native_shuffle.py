"""Convolutions whose kernel is their stride on the native backend, against float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.backends import eager, native, native_shuffle
from petite_fast.ops import adapted_conv, dispatch

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


class Blocks(NamedTuple):
    """Weight [rows, channels, *kernel] between a coarse volume and the fine one."""

    rows: int
    channels: int
    kernel: tuple[int, int, int]
    coarse: tuple[int, int, int]
    batch: int = 1
    rest: tuple[int, int, int] = (0, 0, 0)  # of the fine volume, behind the last block


CASES = {
    "k2": Blocks(7, 3, (2, 2, 2), (3, 5, 17), 3),
    "k2 wide": Blocks(16, 17, (2, 2, 2), (7, 3, 33)),
    "k2 one": Blocks(1, 1, (2, 2, 2), (1, 1, 1)),
    "k2 rest": Blocks(3, 2, (2, 2, 2), (2, 3, 7), 2, (1, 0, 1)),
    "k3": Blocks(5, 4, (3, 3, 3), (2, 1, 7)),
    "k4": Blocks(2, 3, (4, 4, 4), (2, 3, 17)),
    "k5": Blocks(2, 3, (5, 5, 5), (1, 2, 3)),
    "k122": Blocks(4, 3, (1, 2, 2), (5, 3, 2)),
    "k221": Blocks(4, 3, (2, 2, 1), (5, 3, 19)),
    "k2 8 16": Blocks(3, 2, (2, 8, 16), (3, 2, 1)),
    "k16": Blocks(6, 1, (16, 16, 16), (2, 1, 3), 2),
    "k17": Blocks(2, 1, (1, 1, 17), (2, 3, 2)),
    "pieces": Blocks(4, 64, (2, 2, 2), (23, 13, 17)),  # several of them
}


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(case: Blocks, channels_last: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        t = torch.randn(size, generator=generator, dtype=torch.float64)
        form = torch.channels_last_3d if channels_last and t.dim() == 5 else None
        return t if form is None else t.contiguous(memory_format=form)

    fine = [n * k + r for n, k, r in zip(case.coarse, case.kernel, case.rest, strict=True)]
    scale = (case.channels * math.prod(case.kernel)) ** -0.5
    return {
        "coarse": normal(case.batch, case.rows, *case.coarse),
        "fine": normal(case.batch, case.channels, *fine),
        "weight": normal(case.rows, case.channels, *case.kernel).contiguous() * scale,
        "row bias": normal(case.rows),
        "channel bias": normal(case.channels),
    }


def results(backend: Any, case: Blocks, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All the products of one backend."""
    geometry = (case.kernel, (0, 0, 0), (1, 1, 1))
    coarse, fine, weight = t["coarse"], t["fine"], t["weight"]
    last = ((0, 0, 0), 1)
    found = {
        "plain": backend.conv(fine, weight, t["row bias"], *geometry, False, *last),
        "plain, no bias": backend.conv(fine, weight, None, *geometry, False, *last),
        "transposed": backend.conv(coarse, weight, t["channel bias"], *geometry, True, *last),
        "transposed, no bias": backend.conv(coarse, weight, None, *geometry, True, *last),
        "plain grad_x": backend.conv_grad_input(
            coarse, weight, fine.shape, *geometry, False, *last
        ),
        "grad_weight": backend.conv_grad_weight(coarse, fine, weight.shape, *geometry, 1),
    }
    if not any(case.rest):
        found["transposed grad_x"] = backend.conv_grad_input(
            fine, weight, coarse.shape, *geometry, True, *last
        )
    return found


def check(case: Blocks, given: dict[str, torch.Tensor]) -> None:
    exact = results(eager, case, {k: v.double() for k, v in given.items()})
    given = {k: v.float() for k, v in given.items()}
    torch_float = results(eager, case, given)
    for name, ours in results(native_shuffle, case, given).items():
        assert_twice_torch(ours, torch_float[name], exact[name], name=name)
        strides = zip(ours.shape, ours.stride(), torch_float[name].stride(), strict=True)
        assert all(a == b for n, a, b in strides if n > 1), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_float64(case: Blocks, channels_last: bool) -> None:
    check(case, tensors(case, channels_last))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    module, _ = native._load()
    before = module.build_info()["isa"]
    if isa not in module.build_info()["isas_usable"]:
        pytest.skip(f"this CPU does not run {isa}")
    module.set_isa(isa)
    try:
        for case, channels_last in itertools.product(CASES.values(), [False, True]):
            check(case, tensors(case, channels_last))
    finally:
        module.set_isa(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads(threads: Any, count: int) -> None:
    threads(count)
    for name, channels_last in itertools.product(["k2", "k2 wide", "pieces"], [False, True]):
        given = tensors(CASES[name], channels_last)
        check(CASES[name], given)
        single = {k: v.float() for k, v in given.items()}
        first, second = (results(native_shuffle, CASES[name], single) for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, second[key]), key


def test_views_that_are_not_contiguous() -> None:
    case = CASES["k2"]
    given = tensors(case, False)
    for name in ("coarse", "fine", "weight"):
        wide = torch.zeros(*given[name].shape[:-1], 2 * given[name].shape[-1]).double()
        wide[..., ::2] = given[name]
        given[name] = wide[..., ::2]
    check(case, given)
    given["fine"] = given["fine"].contiguous(memory_format=torch.channels_last_3d)
    check(case, given)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_go_where_torch_sends_them(value: float, channels_last: bool) -> None:
    case = CASES["k2 rest"]
    given = {k: v.float() for k, v in tensors(case, channels_last).items()}
    given["coarse"][0, 0, 1, 1, 1] = value
    given["fine"][0, 0, 1, 1, 1] = value
    wanted = results(eager, case, given)
    for name, ours in results(native_shuffle, case, given).items():
        assert torch.equal(ours.isfinite(), wanted[name].isfinite()), name


def reason(op: str, *args: Any) -> str:
    return getattr(native_shuffle, f"can_run_{op}")(*args)[1]


def test_what_is_refused(threads: Any) -> None:
    threads(1)
    x, w, zero, one, two = torch.randn(1, 4, 6, 6, 6), torch.randn(4, 3, 2, 2, 2), *(
        (n, n, n) for n in range(3)
    )  # fmt: skip
    assert reason("conv", x, w, None, two, zero, one, True, zero, 1) == ""
    assert "overlap" in reason("conv", x, w, None, one, zero, one, True, zero, 1)
    assert "overlap" in reason("conv", x, w, None, two, one, one, True, zero, 1)
    assert "overlap" in reason("conv", x, w, None, two, zero, one, True, zero, 2)
    assert "dilated" in reason("conv", x, w, None, two, zero, two, True, zero, 1)
    assert "output_padding" in reason("conv", x, w, None, two, zero, one, True, one, 1)
    assert "float64" in reason("conv", x.double(), w, None, two, zero, one, True, zero, 1)
    assert "float64" in reason("conv", x, w, w.double(), two, zero, one, True, zero, 1)
    assert "empty" in reason("conv", x[:0], w, None, two, zero, one, True, zero, 1)
    assert "device" in reason("conv", x.to("meta"), w, None, two, zero, one, True, zero, 1)
    plain = w.transpose(0, 1)
    assert "small" in reason("conv", x, plain, None, two, zero, one, False, zero, 1)
    assert "fit" in reason("conv", x[..., :1], plain, None, two, zero, one, False, zero, 1)
    fine, weight = torch.randn(1, 3, 12, 12, 12), (two, zero, one, 1)
    assert "small" in reason("conv_grad_weight", x, fine, w.shape, *weight)
    assert reason("conv_grad_weight", x, fine[:, :2], (4, 2, 2, 2, 2), *weight) == ""
    large = torch.empty(1, 4, 96, 96, 96)
    assert reason("conv", large, plain, None, two, zero, one, False, zero, 1) == ""
    threads(2)  # which read each other's part of the blocks
    assert "small" in reason("conv", large, plain, None, two, zero, one, False, zero, 1)
    larger = torch.empty(3, 4, 96, 96, 96)
    assert reason("conv", larger, plain, None, two, zero, one, False, zero, 1) == ""
    large = large.contiguous(memory_format=torch.channels_last_3d)
    assert "last" in reason("conv", large, plain, None, two, zero, one, False, zero, 1)
    point = torch.randn(4, 3, 1, 1, 1)
    assert "pointwise" in reason("conv", x, point, None, one, zero, one, True, zero, 1)


def test_a_forced_backend_has_aten_for_the_other_geometries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
    x, w = torch.randn(1, 4, 6, 6, 6), torch.randn(4, 3, 2, 2, 2)
    rest = ((0, 0, 0), (1, 1, 1), True, (0, 0, 0), 1)
    assert dispatch.choose("conv", x, w, None, (2, 2, 2), *rest) is native_shuffle.conv
    assert dispatch.choose("conv", x, w, None, (1, 1, 1), *rest) is eager.conv


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"form": 3}, "form code"),
        ({"channels": 0}, "channels must be positive"),
        ({"block": (2, 2, 9)}, "a block must be positive"),
        ({"first": 4}, "rows must be"),
        ({"rows": 5}, "rows must be"),
        ({"threads": 0}, "threads must be positive"),
        ({"volume": (0, 0, 0)}, "must not be null"),
        ({"matrix": native._operand(torch.empty(7))}, "matrix: must have 192 elements"),
        ({"bias": native._operand(torch.empty(4))}, "bias: must have 3 elements"),
        ({"bias": native._operand(torch.empty(3).double())}, "bias: must be float32"),
    ],
)
def test_a_wrong_call_is_an_error(wrong: dict[str, Any], message: str) -> None:
    module, _ = native._load()
    volume, matrix = torch.zeros(3, 4, 4, 8), torch.zeros(3 * 64 * 2 // 2)
    call = {
        "form": 0, "to_volume": False, "channels": 3, "block": (2, 2, 2), "size": (4, 4, 8),
        "first": 0, "rows": 2, "volume": native._operand(volume),
        "matrix": native._operand(matrix), "bias": (0, 0, 0), "threads": 1,
    }  # fmt: skip
    module.shuffle(*call.values())
    with pytest.raises(ValueError, match=message):
        module.shuffle(*(call | wrong).values())


@pytest.mark.usefixtures("free_choice")
@pytest.mark.parametrize("transposed", [False, True])
def test_an_adapted_step_uses_it(transposed: bool) -> None:
    """Forward, grad_x and LoRA's gradients of both kinds; nothing goes to a deconvolution.

    The transposed one's weight gradients are a plain convolution's, of a small volume here.
    """
    x = torch.randn(1, 8, 6, 6, 6, requires_grad=True)
    w = torch.randn(8, 8, 2, 2, 2)
    a = torch.randn((2, 8, 1, 1, 1) if transposed else (2, 8, 2, 2, 2), requires_grad=True)
    b = torch.randn((2, 8, 2, 2, 2) if transposed else (8, 2), requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        y = adapted_conv(x, w, lora_A=a, lora_B=b, stride=2, transposed=transposed)
        y.sum().backward()
    names = {event.key for event in trace.key_averages()}
    banned = ["slow_conv", "convolution_transpose"]
    if not transposed:
        banned.append("convolution_backward")
    assert not [name for name in names if any(b in name for b in banned)], names
