"""The CUDA norm_act: its kernels on the host, phase by phase, against float64 and eager."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conv_cases import assert_twice_torch
from norm_act_cases import check, keywords, tensors

from petite_fast.backends import cuda_norm_act, eager, native, native_norm_act
from petite_fast.ops import dispatch, norm_act

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last_3d
OPS = ("norm_act", "norm_act_backward", "pack_signs", "unpack_signs")
# Channels that fill octets, that do not, and one; voxels that leave rests; one and many units.
SIZES = [(1, 1, 3, 5, 7), (3, 1, 2, 4, 4), (3, 3, 3, 5, 7), (1, 8, 3, 5, 7), (3, 20, 2, 3, 5),
         (1, 64, 3, 5, 3), (2, 8, 9, 11, 13), (2, 264, 1, 3, 2)]  # fmt: skip


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """CPU tensors go through the CUDA kernels on the host, in blocks of 32 virtual threads."""
    emulate(monkeypatch, 32)
    yield monkeypatch


def emulate(patch: pytest.MonkeyPatch, threads: int) -> None:
    hooks = native._load()[0].testing

    def launch(name: str, device: torch.device, *arguments: Any) -> None:
        block = (threads,) if name.startswith("norm_act") else ()
        getattr(hooks, f"emulate_{name}")(*arguments, *block)

    def workspace(shape: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        doubles = hooks.norm_act_workspace(shape, native._operand(x), threads)
        return cuda_norm_act._empty(doubles, torch.float64, x)

    patch.setattr(cuda_norm_act, "_has_kernels", lambda device: (True, ""))
    patch.setattr(cuda_norm_act, "_launch", launch)
    patch.setattr(cuda_norm_act, "_workspace", workspace)
    for op in OPS:
        row = ("native", getattr(cuda_norm_act, f"can_run_{op}"), getattr(cuda_norm_act, op))
        patch.setitem(dispatch._TABLE, op, [row])


def layout_of(size: tuple[int, ...]) -> torch.memory_format:
    return torch.contiguous_format if size[1] == 1 else LAST


@pytest.mark.usefixtures("free_choice")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((size, torch.float32) for size in SIZES)]
    + [(size, dtype) for dtype in DTYPES[1:] for size in (SIZES[1], SIZES[4], SIZES[5])],
    ids=str,
)
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "fixed"])
def test_op_against_float64(norm: str, size: Any, dtype: torch.dtype, emulated: Any) -> None:
    if norm == "group" and size[1] % 2:
        size = (size[0], 2, *size[2:])
    for activation, order in (
        ("identity", "norm_act"), ("leaky_relu", "norm_act"), ("relu", "norm_act"),
        ("leaky_relu", "act_norm"), ("relu", "act_norm"),
    ):  # fmt: skip
        # A weight's gradient has the rounding of a y of 16 bits that xhat is read from, and with
        # fixed statistics and a ReLU it is read from x, which is eager's.
        exact = dtype == torch.float32 and not (norm == "fixed" and activation == "relu")
        trained = ["x", "weight", "bias"] if exact else ["x", "bias"]
        values = tensors(norm, activation, size)
        with dispatch.explaining() as decisions:
            check(values, keywords(norm, activation, order), trained, dtype, layout_of(size))
        ran = {d.op for d in decisions if d.backend == "native"}
        assert {"norm_act", "norm_act_backward"} <= ran, decisions


@pytest.mark.parametrize("size", SIZES[2:5], ids=str)
@pytest.mark.parametrize("norm", ["instance", "batch", "fixed"])
def test_residual_prelu_and_no_parameters(norm: str, size: Any, emulated: Any) -> None:
    values = tensors(norm, "prelu", size, residual=True)
    arguments = keywords(norm, "prelu")
    for trained in (["x", "residual"], ["residual", "bias"], ["x", "weight"]):
        check(values, arguments, trained, torch.float32, LAST)
    plain = tensors(norm, "leaky_relu", size, affine=False)
    check(plain, keywords(norm, "leaky_relu"), ["x"], torch.float32, LAST)
    emulate(emulated, 256)
    check(values, arguments, ["x", "residual"], torch.float32, LAST)


@pytest.mark.parametrize("norm", ["instance", "batch", "fixed"])
def test_batch_zero_is_eager(norm: str, emulated: Any) -> None:
    values = tensors(norm, "leaky_relu", (0, 8, 3, 5, 7))
    given = {name: value.float() for name, value in values.items()}
    x = given.pop("x").requires_grad_()
    with dispatch.explaining() as decisions:
        y = norm_act(x, **given, **keywords(norm, "leaky_relu"))
        y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert {d.backend for d in decisions if d.op.startswith("norm_act")} == {"eager"}


def drawn(size: Any, dtype: torch.dtype, norm: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    channels = size[1]
    return {
        "x": (2 * normal(size) + 1).to(dtype).contiguous(memory_format=layout_of(size)),
        "grad_y": normal(size).to(dtype).contiguous(memory_format=layout_of(size)),
        "weight": ((0.3 + normal(channels).abs()) * normal(channels).sign()).float(),
        "bias": normal(channels).float(),
        "mean": normal(channels).float(),
        "var": (0.5 + normal(channels).abs()).float(),
    }


# activation, slope, activation first, source of xhat, signs
MODES = {
    "identity": ("identity", 1.0, False, "y", False),
    "leaky": ("leaky_relu", 0.1, False, "y", False),
    "relu": ("leaky_relu", 0.0, False, "xhat", True),
    "leaky first": ("leaky_relu", 0.2, True, "y", True),
    "relu first": ("leaky_relu", 0.0, True, "xhat", True),
    "signs": ("leaky_relu", 0.1, False, "none", True),
}


def forward(module: Any, norm: str, mode: str, v: dict[str, Any], unsafe: Any = None) -> Any:
    activation, slope, first, source, signs = MODES[mode]
    mean, var = (v["mean"], v["var"]) if norm == "fixed" else (None, None)
    return module.norm_act(
        v["x"], v["weight"], v["bias"], mean, var, None, None, unsafe, norm, 1, 1e-5, activation,
        slope, first, source == "xhat", signs, v["x"].dtype,
    )  # fmt: skip


def backward(
    module: Any, norm: str, mode: str, v: dict[str, Any], kept: Any, unsafe: Any = None
) -> Any:
    activation, slope, first, source, _ = MODES[mode]
    y, mean, var, xhat, sign = kept
    if norm == "fixed":
        mean, var = v["mean"], v["var"]
    fixed = norm == "fixed"
    wants = [source != "none" or fixed, not first, source != "none", True, False]
    return module.norm_act_backward(
        v["grad_y"], y if source == "y" else None, xhat if xhat.numel() else None,
        sign if sign.numel() else None, None, mean, var, v["weight"], v["bias"], None, unsafe,
        norm, 1, 1e-5, activation, slope, first, source, wants, v["x"].dtype,
    )  # fmt: skip


def assert_like(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    """Of one form (signs to the bit), and as near as two roundings of one formula are."""
    rough = 64 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        if a.dtype == torch.uint8:
            assert torch.equal(a, b)
            continue
        # Values are of size 1, and so are the terms of a sum that may cancel.
        scale = 1 + (float(b.abs().max()) if b.numel() else 0)
        torch.testing.assert_close(a, b, rtol=rough, atol=rough * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["instance", "batch", "fixed"])
def test_kept_state_is_that_of_eager(
    norm: str, mode: str, dtype: torch.dtype, emulated: Any
) -> None:
    for size in SIZES:
        v = drawn(size, dtype, norm)
        ours, theirs = (forward(m, norm, mode, v) for m in (cuda_norm_act, eager))
        assert_like(ours, theirs, dtype)
        # Each backward from what the other's forward has kept.
        assert_like(
            backward(cuda_norm_act, norm, mode, v, theirs), backward(eager, norm, mode, v, theirs),
            dtype,
        )  # fmt: skip
        assert_like(
            backward(eager, norm, mode, v, ours), backward(cuda_norm_act, norm, mode, v, ours),
            dtype,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["identity", "leaky", "leaky first"])
def test_channels_kept_beside_y(mode: str, dtype: torch.dtype, emulated: Any) -> None:
    for size in (s for s in SIZES if s[1] > 1):
        for unsafe in ([size[1] - 1], sorted({0, size[1] // 2, size[1] - 1})):
            v = drawn(size, dtype, "instance")
            v["weight"][unsafe] = torch.tensor([0.0, 1e-20, -1e-3])[: len(unsafe)]
            index = torch.tensor(unsafe)
            ours = forward(cuda_norm_act, "instance", mode, v, index)
            assert_like(ours, forward(eager, "instance", mode, v, index), dtype)
            assert_like(
                backward(cuda_norm_act, "instance", mode, v, ours, index),
                backward(eager, "instance", mode, v, ours, index),
                dtype,
            )


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_a_large_mean_costs_no_digits(norm: str, mean: float, emulated: Any) -> None:
    for size in (SIZES[0], SIZES[2], SIZES[6]):
        v = drawn(size, torch.float32, norm)
        v["x"] += mean
        wide = {name: t.double() for name, t in v.items()}
        exact = forward(eager, norm, "leaky", wide)
        same = forward(eager, norm, "leaky", v)
        ours = forward(cuda_norm_act, norm, "leaky", v)
        for a, b, c in zip(ours[:3], same[:3], exact[:3], strict=True):
            assert_twice_torch(a, b, c)
        torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [SIZES[1], SIZES[2], SIZES[3]], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("mode", ["leaky", "relu first"])
@pytest.mark.parametrize("norm", ["instance", "batch", "fixed"])
def test_what_is_not_finite_goes_where_it_goes_in_eager(
    norm: str, mode: str, value: float, size: Any, emulated: Any
) -> None:
    for place in ((0, 0, 0, 0, 0), (-1, -1, -1, -1, -1)):
        v = drawn(size, torch.float32, norm)
        v["x"][place] = value
        ours, theirs = (forward(m, norm, mode, v)[0] for m in (cuda_norm_act, eager))
        assert not theirs.isfinite().all()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isposinf(), theirs.isposinf())
        assert torch.equal(ours.isneginf(), theirs.isneginf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 64), (1, 1), (5, 7), (2, 3, 9), (257,), (4, 16)], ids=str)
def test_signs_are_the_bits_of_eager(size: Any, dtype: torch.dtype, emulated: Any) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)
    x.view(-1)[0] = math.nan
    x.view(-1)[-1] = 0
    bits = cuda_norm_act.pack_signs(x)
    assert torch.equal(bits, eager.pack_signs(x))
    assert torch.equal(cuda_norm_act.unpack_signs(bits, size[-1]), x > 0)


def test_more_blocks_change_no_more_than_rounding(emulated: Any) -> None:
    v = drawn((2, 24, 7, 8, 9), torch.float32, "instance")
    results = []
    for threads in (32, 256):
        emulate(emulated, threads)
        kept = forward(cuda_norm_act, "instance", "leaky", v)
        results.append([*kept, *backward(cuda_norm_act, "instance", "leaky", v, kept)])
        again = forward(cuda_norm_act, "instance", "leaky", v)
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    for other in results[1:]:
        assert_like(other, results[0], torch.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["leaky", "relu first"])
def test_nothing_is_written_around_the_outputs(size: Any, mode: str, emulated: Any) -> None:
    canvases: list[torch.Tensor] = []

    def framed(size: Any, dtype: torch.dtype, like: Any = None) -> torch.Tensor:
        shape = (size,) if isinstance(size, int) else tuple(size)
        canvas = torch.full((math.prod(shape) + 128,), 7, dtype=dtype)
        canvases.append(canvas)
        return canvas[64 : 64 + math.prod(shape)].view(shape)

    def framed_like(x: torch.Tensor) -> torch.Tensor:
        flat = framed(x.numel(), x.dtype)
        return flat.as_strided(x.shape, x.stride(), flat.storage_offset())

    v = drawn(size, torch.bfloat16, "instance")
    emulated.setattr(cuda_norm_act, "_empty", framed)
    with emulated.context() as patch:
        patch.setattr(torch, "empty_like", framed_like)
        kept = forward(cuda_norm_act, "instance", mode, v)
        backward(cuda_norm_act, "instance", mode, v, kept)
    assert len(canvases) > 10
    for canvas in canvases:
        assert (canvas[:64] == 7).all() and (canvas[-64:] == 7).all()


def test_refusals_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    v = drawn(SIZES[3], torch.float32, "instance")

    def reason(**changes: Any) -> str:
        given = {"norm": "instance", "activation": "leaky_relu", "residual": None, "mean": None,
                 "unsafe": None, **{k: v[k] for k in ("x", "weight")}, **changes}  # fmt: skip
        possible, text = cuda_norm_act.can_run_norm_act(
            given["x"], given["weight"], None, given["mean"], None, None, given["residual"],
            given["unsafe"], given["norm"], 1, 1e-5, given["activation"], 0.1, False, False, False,
            given.get("dtype", given["x"].dtype),
        )  # fmt: skip
        assert possible == (not text)
        return text

    x = v["x"]
    assert "no CUDA kernel for device 'cpu'" in reason()
    monkeypatch.setattr(cuda_norm_act, "_has_kernels", lambda device: (True, ""))
    assert reason() == ""
    assert "gelu" in reason(activation="gelu")
    assert "'layer'" in reason(norm="layer")
    assert "torch.float64" in reason(x=x.double())
    assert "y is to be" in reason(dtype=torch.bfloat16)
    assert "empty" in reason(x=x[:0])
    assert "not channels-last" in reason(x=x.contiguous())
    assert "does not lie" in reason(residual=x.contiguous())
    assert "residual is torch.float16" in reason(residual=x.half())
    assert "mean and var" in reason(norm="fixed")
    assert "weight is torch.float64" in reason(weight=v["weight"].double())
    one = x[:, :1].contiguous()
    assert reason(x=one, weight=None) == ""
    assert "one channel" in reason(x=one, weight=None, unsafe=torch.tensor([0]))

    def backward_reason(source: str = "y", slope: bool = False, var: Any = v["var"]) -> str:
        return cuda_norm_act.can_run_norm_act_backward(
            v["grad_y"], x, None, None, None, None, var, v["weight"], None, None, None, "instance",
            1, 1e-5, "leaky_relu", 0.1, False, source, [True, False, False, False, slope], x.dtype,
        )[1]  # fmt: skip

    assert backward_reason() == ""
    assert "slope trains" in backward_reason(slope=True)
    assert "reads x" in backward_reason("x")
    assert "var" in backward_reason(var=None)
    assert "contiguous" in cuda_norm_act.can_run_pack_signs(x)[1]
    assert "torch.float64" in cuda_norm_act.can_run_pack_signs(x.double())[1]


def test_a_wrong_size_is_an_error(emulated: Any) -> None:
    v = drawn(SIZES[3], torch.float32, "instance")
    with pytest.raises(ValueError, match="weight: must have 8 elements, got 9"):
        forward(cuda_norm_act, "instance", "leaky", v | {"weight": torch.ones(9)})
    with pytest.raises(ValueError, match="channels must be last"):
        forward(cuda_norm_act, "instance", "leaky", v | {"x": v["x"].contiguous()})
    kept = forward(cuda_norm_act, "instance", "leaky", v)
    short = (kept[0][:, :, :1], *kept[1:])
    with pytest.raises(ValueError, match="y: must have"):
        backward(cuda_norm_act, "instance", "leaky", v, short)


def test_cpu_and_cuda_kernels_keep_the_same(emulated: Any) -> None:
    for size in (s for s in SIZES if s[1] > 1):
        v = drawn(size, torch.float32, "instance")
        ours, cpu = (
            forward(m, "instance", "leaky first", v) for m in (cuda_norm_act, native_norm_act)
        )
        assert_like(ours, cpu, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["instance", "batch", "fixed"])
def test_cuda(norm: str, mode: str, dtype: torch.dtype) -> None:
    possible, why = native.cuda_available(torch.cuda.current_device())
    if not possible:
        pytest.skip(why)
    for size in (*SIZES, (1, 32, 64, 64, 64)):
        v = {name: t.cuda() for name, t in drawn(size, dtype, norm).items()}
        ours, theirs = (forward(m, norm, mode, v) for m in (cuda_norm_act, eager))
        assert_like(ours, theirs, dtype)
        assert_like(
            backward(cuda_norm_act, norm, mode, v, theirs), backward(eager, norm, mode, v, theirs),
            dtype,
        )  # fmt: skip
        again = forward(cuda_norm_act, norm, mode, v)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        bits = cuda_norm_act.pack_signs(v["x"].contiguous())
        assert torch.equal(bits, eager.pack_signs(v["x"].contiguous()))
        assert torch.equal(cuda_norm_act.unpack_signs(bits, size[-1]), v["x"] > 0)
