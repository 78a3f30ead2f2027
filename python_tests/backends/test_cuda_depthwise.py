"""Depthwise convolutions on CUDA against torch in float64: the kernels' phases run on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conv_cases import assert_twice_torch
from torch._subclasses.fake_tensor import FakeTensorMode

from petite_fast.backends import cuda_depthwise, eager, native, triton
from petite_fast.ops import dispatch

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE, TWO, NONE = (1, 1, 1), (2, 2, 2), (0, 0, 0)
Triple = tuple[int, int, int]


class Case(NamedTuple):
    """One depthwise convolution."""

    batch: int
    channels: int
    size: Triple
    stride: Triple
    padding: Triple


# Channels that fill no 16 bytes, part of a tile of 32, one tile and more; rows and columns in part
# of a tile and beyond one; chunks of planes; padding that no tap needs.
CASES = {
    "one voxel": Case(1, 1, (1, 1, 1), ONE, ONE),
    "one channel": Case(3, 1, (3, 2, 17), ONE, ONE),
    "three channels": Case(1, 3, (7, 3, 17), ONE, ONE),
    "eight channels": Case(3, 8, (3, 7, 2), ONE, ONE),
    "twenty channels": Case(1, 20, (2, 17, 7), ONE, ONE),
    "two tiles of channels": Case(1, 64, (7, 3, 17), ONE, ONE),
    "chunks": Case(1, 8, (17, 17, 17), ONE, ONE),
    "valid": Case(3, 3, (3, 7, 17), ONE, NONE),
    "wide padding": Case(1, 8, (1, 2, 3), ONE, (2, 3, 4)),
    "mixed padding": Case(1, 20, (3, 17, 7), ONE, (0, 2, 1)),
    "one voxel, stride 2": Case(3, 8, (1, 1, 1), TWO, ONE),
    "one channel, stride 2": Case(1, 1, (7, 17, 3), TWO, ONE),
    "three channels, stride 2": Case(3, 3, (2, 3, 7), TWO, ONE),
    "twenty channels, stride 2": Case(1, 20, (3, 7, 17), TWO, ONE),
    "two tiles, stride 2": Case(1, 64, (7, 3, 17), TWO, ONE),
    "chunks, stride 2": Case(1, 8, (17, 17, 17), TWO, ONE),
    "end not reached": Case(1, 8, (8, 4, 10), TWO, NONE),
    "wide padding, stride 2": Case(1, 8, (1, 2, 3), TWO, (2, 3, 4)),
    "mixed padding, stride 2": Case(1, 3, (17, 7, 2), TWO, (0, 2, 1)),
}


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        return tensor.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor

    small = [
        (n + 2 * p - 3) // s + 1
        for n, s, p in zip(case.size, case.stride, case.padding, strict=True)
    ]
    return {
        "x": normal(case.batch, case.channels, *case.size),
        "weight": normal(case.channels, 1, 3, 3, 3).contiguous(),
        "bias": normal(case.channels),
        "grad_y": normal(case.batch, case.channels, *small),
    }


def calls(case: Case, t: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """The three maps and the transposed convolution: op and arguments."""
    s, p, c = case.stride, case.padding, case.channels
    x, weight, bias, grad_y = t["x"], t["weight"], t["bias"], t["grad_y"]
    extra = [
        n - ((m - 1) * a - 2 * b + 3)
        for n, m, a, b in zip(x.shape[2:], grad_y.shape[2:], s, p, strict=True)
    ]
    plain, transposed = (s, p, ONE, False, NONE, c), (s, p, ONE, True, extra, c)
    return {
        "y": ("conv", (x, weight, bias, *plain)),
        "grad_x": ("conv_grad_input", (grad_y, weight, list(x.shape), *plain)),
        "grad_weight": ("conv_grad_weight", (grad_y, x, list(weight.shape), s, p, ONE, c)),
        "transposed": ("conv", (grad_y, weight, bias, *transposed)),
        "transposed grad": ("conv_grad_input", (x, weight, list(grad_y.shape), *transposed)),
    }


def run(module: Any, case: Case, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: getattr(module, op)(*given) for key, (op, given) in calls(case, t).items()}


def check(case: Case, tensors: dict[str, torch.Tensor]) -> None:
    wanted = run(eager, case, {name: tensor.double() for name, tensor in tensors.items()})
    torchs = run(eager, case, tensors)
    for key, ours in run(cuda_depthwise, case, tensors).items():
        assert_twice_torch(ours, torchs[key], wanted[key], name=key)
        assert ours.dtype == tensors["x"].dtype
        assert key == "grad_weight" or ours.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def launch(op: str, arguments: tuple[Any, ...], device: torch.device) -> None:
        getattr(native._load()[0].testing, f"emulate_{op}")(*arguments)

    monkeypatch.setattr(cuda_depthwise, "_launch", launch)
    yield


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], make(CASES[name], dtype))


@pytest.mark.usefixtures("emulated")
def test_volumes_that_are_not_aligned() -> None:
    """Views that start in the middle of 16 bytes are read and written element by element."""
    case = CASES["eight channels"]
    tensors = make(case, torch.bfloat16)
    wanted = run(cuda_depthwise, case, tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 5 and name != "weight":
            moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
            tensors[name] = moved.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
            assert tensors[name].data_ptr() % 16
    for key, ours in run(cuda_depthwise, case, tensors).items():
        assert torch.equal(ours, wanted[key]), key


@pytest.mark.usefixtures("emulated")
def test_blocks_with_several_items() -> None:
    """So many channels that there are fewer blocks than parts of the volume."""
    case = Case(5, 32 * 128, (1, 2, 1), ONE, ONE)
    t = make(case, torch.float32)
    shape = cuda_depthwise._shape(
        t["x"].shape, t["grad_y"].shape[2:], cuda_depthwise.ConvGeometry(ONE, ONE),
        torch.channels_last_3d,
    )  # fmt: skip
    floats = native._load()[0].depthwise_workspace(shape, native._operand(t["x"]))
    assert floats == 4 * 27 * case.channels
    op, arguments = calls(case, t)["grad_weight"]
    exact = eager.conv_grad_weight(t["grad_y"].double(), t["x"].double(), *arguments[2:])
    ours = cuda_depthwise.conv_grad_weight(*arguments)
    assert_twice_torch(ours, getattr(eager, op)(*arguments), exact)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["three channels", "twenty channels, stride 2"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_finite(name: str, value: float) -> None:
    """What is not finite stays in its channel, and reaches where it would reach in torch."""
    case = CASES[name]
    tensors = make(case, torch.float32)
    tensors["x"][0, 1, 0, 0, -1] = value
    tensors["grad_y"][0, 2, -1, 0, 0] = value
    wanted = run(eager, case, {name: tensor.double() for name, tensor in tensors.items()})
    for key, ours in run(cuda_depthwise, case, tensors).items():
        if key == "grad_weight":
            ours, exact = (t.isfinite().flatten(1).all(1) for t in (ours, wanted[key]))
            assert torch.equal(ours, exact)
        else:
            torch.testing.assert_close(ours.isfinite(), wanted[key].isfinite(), msg=key)
            torch.testing.assert_close(ours.isnan(), wanted[key].isnan(), msg=key)


@pytest.mark.parametrize("name", ["three channels", "eight channels", "three channels, stride 2"])
def test_nothing_is_written_around_the_target(name: str) -> None:
    case = CASES[name]
    t = make(case, torch.bfloat16)
    shape = cuda_depthwise._shape(
        t["x"].shape, t["grad_y"].shape[2:], cuda_depthwise.ConvGeometry(case.stride, case.padding),
        torch.channels_last_3d,
    )  # fmt: skip
    for adjoint, source, target in ((False, "x", "grad_y"), (True, "grad_y", "x")):
        size = t[target].numel()
        canvas = torch.full((size + 128,), 99.0, dtype=torch.bfloat16)
        out = canvas[64:-64]
        native._load()[0].testing.emulate_depthwise(
            shape, adjoint, native._operand(t[source]), native._operand(t["weight"]),
            native._operand(None), native._operand(out),
        )  # fmt: skip
        assert (canvas[:64] == 99).all() and (canvas[-64:] == 99).all()
        assert not (out == 99).any()


def test_binding_checks_sizes() -> None:
    run = native._load()[0].testing.emulate_depthwise
    x, weight = torch.zeros(1, 2, 4, 4, 4), torch.zeros(2, 27)
    out, wide = torch.empty_like(x), x.double()  # addresses are passed: they must live on
    given = [native._operand(t) for t in (x, weight, None, out)]
    axes = [(4, 4, 1, 1)] * 3
    run((1, 2, axes, True), False, *given)
    for shape, text in [
        ((1, 2, axes, False), "channels-last"),
        ((1, 3, axes, True), "elements, got"),
        ((1, 2, [*axes[:2], (7, 4, 2, 1)], True), "one stride"),
        ((1, 2, [*axes[:2], (4, 5, 1, 1)], True), "do not fit together"),
        ((1, 2, [*axes[:2], (4, 0, 1, -1)], True), "padding"),
        ((1, 2, [(4, 4, 1, 1), *[(2**17, 2**17, 1, 1)] * 2], True), "too many elements"),
    ]:
        with pytest.raises(ValueError, match=text):
            run(shape, False, *given)
    double = native._operand(wide)
    with pytest.raises(ValueError, match="float64"):
        run((1, 2, axes, True), False, double, *given[1:3], double)


def test_shared_memory_exists() -> None:
    """The smallest of the GPUs it is compiled for has 163 KiB, of which a block keeps 1."""
    sizes = native._load()[0].testing.depthwise_shared_bytes()
    assert len(sizes) == 15 and max(sizes.values()) <= 163 * 1024
    halves = [size for name, size in sizes.items() if "float32 grad_weight" not in name]
    assert max(halves) <= (164 * 1024) // 2 - 1024  # two blocks at a time


@pytest.mark.usefixtures("free_choice")
def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_available", lambda device: (True, ""))

    def reason(x: torch.Tensor, weight: torch.Tensor, groups: int, **changes: Any) -> str:
        g = {"bias": None, "stride": ONE, "padding": ONE, "dilation": ONE} | changes
        possible, text = cuda_depthwise.can_run_conv(
            x, weight, g["bias"], g["stride"], g["padding"], g["dilation"], False, NONE, groups
        )
        assert possible == (not text)
        return text

    assert "device 'cpu'" in reason(torch.zeros(1, 4, 9, 9, 9), torch.zeros(4, 1, 3, 3, 3), 4)
    monkeypatch.setattr(triton, "available", lambda device: (False, "not asked here"))
    with FakeTensorMode():
        plain = torch.empty(1, 4, 9, 9, 9, device="cuda")
        x, weight = plain.to(memory_format=torch.channels_last_3d), plain.new_empty(4, 1, 3, 3, 3)
        numbers = (ONE, ONE, ONE, False, NONE, 4)
        assert reason(x, weight, 4).startswith("not measured yet")
        assert dispatch.choose("conv", x, weight, None, *numbers) is eager.conv
        monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
        assert dispatch.choose("conv", x, weight, None, *numbers) is cuda_depthwise.conv
        size = list(x.shape)
        chosen = dispatch.choose("conv_grad_input", x, weight, size, *numbers)
        assert chosen is cuda_depthwise.conv_grad_input
        chosen = dispatch.choose("conv_grad_weight", x, x, list(weight.shape), ONE, ONE, ONE, 4)
        assert chosen is cuda_depthwise.conv_grad_weight
        assert reason(x, weight, 4, stride=TWO, padding=(0, 5, 1)) == ""
        assert reason(plain, weight, 4) == "the kernel wants channels_last_3d"
        assert "depthwise" in reason(x, plain.new_empty(4, 2, 3, 3, 3), 2)
        for changes in ({"stride": (1, 2, 2)}, {"stride": (3, 3, 3)}, {"dilation": (1, 2, 1)}):
            assert "geometry" in reason(x, weight, 4, **changes)
        assert "geometry" in reason(x, plain.new_empty(4, 1, 1, 3, 3), 4)
        assert "float64" in reason(x.double(), weight.double(), 4)
        assert "bfloat16" in reason(x, weight.bfloat16(), 4)
        assert "bfloat16" in reason(x, weight, 4, bias=plain.new_empty(4, dtype=torch.bfloat16))
        assert "cpu" in reason(x, torch.empty(4, 1, 3, 3, 3), 4)
        empty = torch.empty(0, 4, 9, 9, 9, device="cuda")
        assert "empty" in reason(empty, weight, 4)
        large = torch.empty(1, 64, 1, 2**13, 2**13, device="cuda")
        large = large.to(memory_format=torch.channels_last_3d)
        assert "a plane has more than" in reason(large, plain.new_empty(64, 1, 3, 3, 3), 64)


GPU_CASES = [
    *CASES.values(),
    Case(2, 32, (48, 50, 46), ONE, ONE),
    Case(1, 96, (33, 48, 31), TWO, ONE),
    Case(0, 8, (4, 4, 4), ONE, ONE),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_cuda(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
    tensors = make(case, dtype, "cuda")
    if not native.cuda_available(0)[0]:
        pytest.skip(native.cuda_available(0)[1])
    for op, arguments in calls(case, tensors).values():
        possible, reason = getattr(cuda_depthwise, f"can_run_{op}")(*arguments)
        assert possible == (case.batch > 0), reason
    if case.batch:
        check(case, tensors)
        first, again = (run(cuda_depthwise, case, tensors) for _ in range(2))
        assert all(torch.equal(first[key], again[key]) for key in first)
