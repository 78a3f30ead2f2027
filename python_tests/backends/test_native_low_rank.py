"""Low-rank products of the native backend against float64, beside the eager backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conv_cases import assert_twice_torch
from torch.nn import functional as F

from petite_fast.backends import eager, native, native_low_rank
from petite_fast.ops import library

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
OPS = torch.ops.petite_fast


class Form(NamedTuple):
    """A convolution with a weight of `r` rows, and the outputs of B."""

    channels: int
    outputs: int
    r: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (1, 1, 1)
    batch: int = 1


TWOS, NONE, ONE = (2, 2, 2), (0, 0, 0), (1, 1, 1)
FORMS = {
    "one voxel": Form(1, 1, 1, (1, 1, 1)),
    "one row": Form(3, 2, 2, (1, 1, 17)),
    "odd": Form(7, 5, 3, (3, 7, 17), batch=3),
    "valid": Form(3, 5, 4, (7, 17, 5), padding=NONE, batch=2),
    "padding 2": Form(2, 3, 5, (3, 2, 7), padding=(2, 2, 2)),
    "flat": Form(2, 3, 6, (2, 7, 9), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    "even kernel": Form(3, 3, 7, (5, 4, 3), (2, 2, 2), padding=NONE),
    "stride 2": Form(7, 9, 9, (7, 8, 17), stride=TWOS, batch=2),
    "stride 2 valid": Form(3, 4, 12, (7, 6, 5), stride=TWOS, padding=NONE),
    "stride 2 of 1": Form(17, 3, 8, (4, 7, 8), ONE, TWOS, NONE, 2),
    "pointwise": Form(17, 3, 32, (3, 7, 7), ONE, padding=NONE),
    "pointwise padded": Form(2, 3, 2, (3, 2, 7), ONE),
    "padding 3": Form(2, 3, 4, (3, 2, 7), padding=(3, 3, 3)),
    "row tiles": Form(3, 4, 8, (4, 33, 40)),
    "plane tiles": Form(2, 2, 8, (40, 5, 6)),
    "stride 2 tiles": Form(2, 2, 8, (17, 40, 41), stride=TWOS),
    "channels in parts": Form(300, 17, 8, (7, 9, 8)),
    "outputs in parts": Form(3, 400, 8, (6, 7, 8)),
}


@pytest.fixture
def instruction_sets() -> Iterator[list[str]]:
    info = native.build_info()
    yield list(info["isas_usable"])
    native._load()[0].set_isa(info["isa"])


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(form: Form, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, ...]:
    """grad_y, x, t, lora_A, lora_B; the first three in the layout."""
    torch.manual_seed(form.channels + form.r)
    x = torch.randn(form.batch, form.channels, *form.size)
    a = torch.randn(form.r, form.channels, *form.kernel) * (form.channels * 9) ** -0.5
    b = torch.randn(form.outputs, form.r)
    t = F.conv3d(x, a, None, form.stride, form.padding)
    volumes = [torch.randn(form.batch, form.outputs, *t.shape[2:]), x, t]
    if layout == "last":
        volumes = [v.to(memory_format=torch.channels_last_3d) for v in volumes]
    if layout == "view":
        volumes = [F.pad(v, (1, 2, 0, 1))[..., :-1, 1:-2] for v in volumes]
    return (*(v.to(dtype) for v in volumes), a.to(dtype), b.to(dtype))


def gradients(module: Any, form: Form, given: Any, wants: tuple[bool, ...], keep: str) -> Any:
    grad_y, x, t, a, b = given
    x, t = (x, None) if keep == "x" else (None, t)
    arguments = (grad_y, x, t, a, b, form.stride, form.padding, *wants)
    if module is native_low_rank:
        assert module.can_run_low_rank_gradient(*arguments) == (True, "")
    return module.low_rank_gradient(*arguments)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "last"), (torch.float32, "view")],
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_error_is_at_most_twice_torchs(
    form: Form, dtype: torch.dtype, layout: str, instruction_sets: list[str]
) -> None:
    given = draw(form, dtype, layout)
    exact_given = [v.double() for v in given]
    _, x, t, a, _ = given
    for keep, wants in (("x", (True, True, True)), ("t", (False, True, False))):
        exact = gradients(eager, form, exact_given, wants, keep)
        theirs = gradients(eager, form, given, wants, keep)
        for isa in instruction_sets:
            native._load()[0].set_isa(isa)
            ours = gradients(native_low_rank, form, given, wants, keep)
            for mine, other, wanted in zip(ours, theirs, exact, strict=True):
                assert mine.dtype == other.dtype == torch.float32
                assert_twice_torch(mine, other, wanted)
    low = (form.stride, form.padding)
    exact_t = eager.low_rank_input(exact_given[1], exact_given[3], *low)
    other_t = eager.low_rank_input(x, a, *low)
    for isa in instruction_sets:
        native._load()[0].set_isa(isa)
        assert native_low_rank.can_run_low_rank_input(x, a, *low) == (True, "")
        mine_t = native_low_rank.low_rank_input(x, a, *low)
        assert mine_t.dtype == dtype and mine_t.stride() == other_t.stride()
        assert_twice_torch(mine_t, other_t, exact_t)


@pytest.mark.parametrize("name", ["odd", "one voxel", "stride 2 tiles", "plane tiles"])
def test_threads(name: str, threads: int) -> None:
    form = FORMS[name]
    given = draw(form, torch.float32, "contiguous")
    exact = gradients(eager, form, [v.double() for v in given], (True, True, True), "x")
    theirs = gradients(eager, form, given, (True, True, True), "x")
    first = gradients(native_low_rank, form, given, (True, True, True), "x")
    again = gradients(native_low_rank, form, given, (True, True, True), "x")
    for mine, twice, other, wanted in zip(first, again, theirs, exact, strict=True):
        assert torch.equal(mine, twice)
        assert_twice_torch(mine, other, wanted)
    t = native_low_rank.low_rank_input(*given[1:4:2], form.stride, form.padding)
    assert_twice_torch(t, given[2], eager.low_rank_input(
        given[1].double(), given[3].double(), form.stride, form.padding))  # fmt: skip


@pytest.mark.parametrize(
    "wants", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_one_gradient_alone(wants: tuple[bool, ...]) -> None:
    form = FORMS["odd"]
    given = draw(form, torch.float32, "contiguous")
    together = gradients(native_low_rank, form, given, (True, True, True), "x")
    alone = gradients(native_low_rank, form, given, wants, "x")
    for want, mine, wanted in zip(wants, alone, together, strict=True):
        torch.testing.assert_close(mine, wanted if want else torch.empty(0))


def test_without_b_the_gradient_is_the_weights() -> None:
    x, grad_y = torch.randn(2, 5, 6, 7, 9), torch.randn(2, 4, 6, 7, 9)
    arguments = (grad_y, x, None, torch.empty(4, 5, 3, 3, 3), None, ONE, ONE, True, False, False)
    ours, theirs = (module.low_rank_gradient(*arguments) for module in (native_low_rank, eager))
    exact = eager.low_rank_gradient(grad_y.double(), x.double(), *arguments[2:])
    assert_twice_torch(ours[0], theirs[0], exact[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_spreads_as_in_torch(value: float, which: int) -> None:
    form = FORMS["odd"]
    given = draw(form, torch.float32, "contiguous")
    given[which][0, 1, 1, 2, 0] = value
    ours = gradients(native_low_rank, form, given, (True, True, True), "x")
    theirs = gradients(eager, form, given, (True, True, True), "x")
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isfinite(), other.isfinite())
    t = native_low_rank.low_rank_input(given[1], given[3], form.stride, form.padding)
    wanted = eager.low_rank_input(given[1], given[3], form.stride, form.padding)
    assert torch.equal(t.isfinite(), wanted.isfinite())


def test_batch_of_none() -> None:
    form = FORMS["odd"]
    grad_y, x, t, a, b = draw(form, torch.float32, "contiguous")
    given = (grad_y[:0], x[:0], t[:0], a, b)
    low = (x[:0], a, form.stride, form.padding)
    assert native_low_rank.can_run_low_rank_input(*low) == (False, "a tensor is empty")
    grads = gradients(library, form, given, (True, True, True), "x")
    for grad, like in zip(grads, (a, b, torch.zeros(form.outputs)), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
    assert library.low_rank_input(*low).shape == t[:0].shape


def test_what_has_no_kernel() -> None:
    def reason(x: torch.Tensor, *size: int, stride: int = 1) -> str:
        a = torch.empty(size, dtype=x.dtype)
        return native_low_rank.can_run_low_rank_input(x, a, (stride,) * 3, NONE)[1]

    x = torch.zeros(1, 2, 8, 8, 8)
    assert "float64" in reason(x.double(), 4, 2, 3, 3, 3)
    assert "(4, 2, 4, 4, 4)" in reason(x, 4, 2, 4, 4, 4)
    assert "(33, 2, 1, 1, 1)" in reason(x, 33, 2, 1, 1, 1)
    assert "stride (3, 3, 3)" in reason(x, 4, 2, 3, 3, 3, stride=3)
    assert "meta" in reason(x.to("meta"), 4, 2, 3, 3, 3)


def test_the_module_refuses_wrong_sizes() -> None:
    module, _ = native._load()
    x, a = torch.zeros(1, 2, 4, 4, 4), torch.zeros(54, 3)
    empty = native._operand(None)
    absent = (empty, False)

    def call(shape: Any, t: torch.Tensor, a: torch.Tensor, floats: int) -> None:
        workspace = torch.empty(floats)
        module.low_rank(
            shape, (native._operand(x), False), absent, (native._operand(t), False),
            native._operand(a), *[empty] * 4, native._operand(workspace), 1,
        )  # fmt: skip

    good: Any = ((1, 2, 3, 3), (4, 4, 4), (4, 4, 4), (3, 3, 3), ONE, ONE)
    floats = module.low_rank_workspace(good, 1)
    t = torch.zeros(1, 3, 4, 4, 4)
    call(good, t, a, floats)
    for arguments, words in (
        ((good, t[:, :2], a, floats), "t: must have 192"),
        ((good, t, a[:53], floats), "a: must have 162"),
        ((good, t, a, floats - 1), "workspace: must have"),
        (((*good[:2], (4, 4, 3), *good[3:]), t, a, floats), "does not fit the geometry, got 3"),
        (((*good[:3], (4, 3, 3), *good[4:]), t, a, floats), "geometry"),
        ((((1, 0, 3, 3), *good[1:]), t, a, floats), "positive, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call(*arguments)


@pytest.mark.parametrize(("keep", "layout"), [("x", "last"), ("t", "contiguous")])
def test_opcheck(keep: str, layout: str) -> None:
    form = FORMS["stride 2"]
    grad_y, x, t, a, b = draw(form, torch.float32, layout)
    torch.library.opcheck(OPS.low_rank_input, (x, a, form.stride, form.padding))
    kept = (x, None) if keep == "x" else (None, t)
    arguments = (grad_y, *kept, a, b, form.stride, form.padding, keep == "x", True, True)
    torch.library.opcheck(OPS.low_rank_gradient, arguments)
