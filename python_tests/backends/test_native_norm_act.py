"""norm_act of the native backend against the eager one in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conv_cases import assert_twice_torch

from petite_fast.backends import eager, native, native_norm_act

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

DTYPES = [torch.float32, torch.bfloat16]


class Form(NamedTuple):
    """One norm on one memory layout."""

    norm: str
    size: tuple[int, ...]
    groups: int = 1
    channels_last: bool = False


# Rows shorter than a vector, odd, of several tiles (1024 or 2048) and units (8192 or 32768).
FORMS = {
    "instance": Form("instance", (2, 3, 3, 7, 17)),
    "instance small": Form("instance", (3, 2, 1, 1, 3)),
    "instance large": Form("instance", (1, 2, 17, 30, 17)),
    "instance last": Form("instance", (2, 7, 3, 7, 17), channels_last=True),
    "instance last wide": Form("instance", (1, 300, 3, 5, 5), channels_last=True),
    "instance last large": Form("instance", (2, 17, 14, 13, 11), channels_last=True),
    "group": Form("group", (2, 6, 3, 7, 17), 3),
    "group of all": Form("group", (1, 5, 9, 9, 9), 1),
    "group of one last": Form("group", (2, 6, 3, 7, 2), 6, True),
    "batch": Form("batch", (3, 5, 3, 7, 17)),
    "batch one voxel": Form("batch", (17, 3)),
    "fixed": Form("fixed", (2, 3, 3, 7, 17)),
    "fixed large": Form("fixed", (1, 2, 17, 30, 17)),
    "fixed last": Form("fixed", (2, 7, 3, 7, 17), channels_last=True),
    "fixed last large": Form("fixed", (1, 16, 14, 13, 12), channels_last=True),
    "layer": Form("layer", (2, 11, 17)),
    "layer narrow": Form("layer", (701, 3)),
    "layer wide": Form("layer", (3, 2500)),
    "layer many": Form("layer", (2, 200, 96)),
}
# activation, slope, activation first, source of xhat
MODES = {
    "identity": ("identity", 1.0, False, "y"),
    "leaky": ("leaky_relu", 0.01, False, "y"),
    "relu": ("leaky_relu", 0.0, False, "xhat"),
    "leaky first": ("leaky_relu", 0.2, True, "y"),
    "relu first": ("leaky_relu", 0.0, True, "xhat"),
    "signs": ("leaky_relu", 0.1, False, "none"),
    "signs first": ("leaky_relu", 0.1, True, "none"),
}


def in_form(x: torch.Tensor, form: Form) -> torch.Tensor:
    return eager_layout(x) if form.channels_last else x


def eager_layout(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last_3d)


def draw(form: Form, dtype: torch.dtype, per_channel: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(form.norm) + math.prod(form.size))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = form.size[-1 if form.norm == "layer" else 1]
    fixed = form.norm == "fixed"
    weight = (0.3 + normal(channels).abs()) * normal(channels).sign()
    values = {
        "x": in_form(3 * normal(*form.size) + 1, form).to(dtype),
        "grad_y": in_form(normal(*form.size), form).to(dtype),
        "residual": in_form(normal(*form.size), form).to(dtype),
        "weight": weight.float(),
        "bias": normal(channels).float(),
        "mean": normal(channels).float() if fixed else None,
        "var": (0.5 + normal(channels).abs()).float() if fixed else None,
        "slope": (0.1 + normal(channels).abs()).float() if per_channel else None,
        "unsafe": None,
    }
    return values


def forward(function: Callable[..., Any], form: Form, mode: str, given: dict[str, Any]) -> Any:
    activation, slope, act_first, source = MODES[mode]
    arguments = (
        given["x"], given["weight"], given["bias"], given["mean"], given["var"], given["slope"],
        given["residual"], given["unsafe"], form.norm, form.groups, 1e-5, activation, slope,
        act_first, source == "xhat", source == "none" or "xhat" in source or act_first,
        given["x"].dtype,
    )  # fmt: skip
    if function is native_norm_act.norm_act:
        assert native_norm_act.can_run_norm_act(*arguments) == (True, "")
    return function(*arguments)


def backward(
    function: Callable[..., Any], form: Form, mode: str, given: dict[str, Any], kept: Any
) -> Any:
    activation, slope, act_first, source = MODES[mode]
    y, mean, var, xhat, sign = kept
    if form.norm == "fixed":
        mean, var = given["mean"], given["var"]
    fixed = form.norm == "fixed"
    residual = given["residual"] if source == "y" and not act_first else None
    wants = [source != "none" or fixed, not act_first, source != "none", True, False]
    arguments = (
        given["grad_y"], y if source == "y" else None, xhat if xhat.numel() else None,
        sign if sign.numel() else None, residual, mean, var, given["weight"], given["bias"],
        given["slope"], given["unsafe"], form.norm, form.groups, 1e-5, activation, slope,
        act_first, source, wants, given["x"].dtype,
    )  # fmt: skip
    if function is native_norm_act.norm_act_backward:
        assert native_norm_act.can_run_norm_act_backward(*arguments) == (True, "")
    return function(*arguments)


def widened(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in given.items()
    }


def check(form: Form, mode: str, given: dict[str, Any]) -> None:
    """y, statistics and xhat, then the gradients, with what the native forward has kept."""
    if MODES[mode][2]:
        given = given | {"residual": None}
    exact = forward(eager.norm_act, form, mode, widened(given))
    same = forward(eager.norm_act, form, mode, given)
    ours = forward(native_norm_act.norm_act, form, mode, given)
    for name, a, b, c in zip(("y", "mean", "var", "xhat"), ours, same, exact, strict=False):
        assert a.dtype == b.dtype and a.stride() == b.stride(), name
        assert_twice_torch(a, b, c, name=name)
    signs = torch.stack([eager.unpack_signs(t[4], 8 * t[4].shape[-1]) for t in (ours, exact)])
    if MODES[mode][2]:
        assert torch.equal(signs[0], signs[1])
    else:  # a value at the kink may fall on either side
        assert (signs[0] != signs[1]).sum() <= signs[0].numel() * 1e-3
    kept = [t.double() if t.is_floating_point() else t for t in ours]
    exact = backward(eager.norm_act_backward, form, mode, widened(given), kept)
    same = backward(eager.norm_act_backward, form, mode, given, ours)
    ours = backward(native_norm_act.norm_act_backward, form, mode, given, ours)
    names = ("grad_x", "grad_residual", "grad_weight", "grad_bias", "grad_slope")
    for name, a, b, c in zip(names, ours, same, exact, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride(), name
        assert a.dtype == b.dtype or a.numel() == 0, name
        assert_twice_torch(a, b, c, 3.0, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, mode: str, dtype: torch.dtype) -> None:
    slope_per_channel = MODES[mode][0] == "leaky_relu" and dtype == torch.float32
    check(FORMS[form], mode, draw(FORMS[form], dtype, slope_per_channel))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_without_parameters_and_residual(form: str, mode: str) -> None:
    given = draw(FORMS[form], torch.float32, False)
    for name in ("weight", "bias", "residual"):
        given[name] = None
    check(FORMS[form], mode, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["identity", "leaky", "leaky first"])
@pytest.mark.parametrize("form", FORMS)
def test_channels_kept_beside_y(form: str, mode: str, dtype: torch.dtype) -> None:
    channels = len(draw(FORMS[form], dtype, False)["weight"])
    for unsafe in ([channels - 1], sorted({0, channels // 2, channels - 1})):
        given = draw(FORMS[form], dtype, False)
        given["unsafe"] = torch.tensor(unsafe)
        given["weight"][unsafe] = torch.tensor([0.0, 1e-20, -1e-3])[: len(unsafe)]
        check(FORMS[form], mode, given)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["leaky", "relu first", "signs"])
@pytest.mark.parametrize("form", [name for name in FORMS if "large" in name or "of" in name])
def test_threads_do_not_change_the_result(
    form: str, mode: str, set_threads: Callable[[int], None]
) -> None:
    given = draw(FORMS[form], torch.float32, False)
    if MODES[mode][2]:
        given["residual"] = None
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        kept = forward(native_norm_act.norm_act, FORMS[form], mode, given)
        found = backward(native_norm_act.norm_act_backward, FORMS[form], mode, given, kept)
        results.append([*kept, *found])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_not_a_number_stays_in_its_statistic() -> None:
    given = draw(FORMS["instance"], torch.float32, False)
    given["x"][0, 1, 0, 0, 0] = float("nan")
    y = forward(native_norm_act.norm_act, FORMS["instance"], "leaky", given)[0]
    wrong = y.isnan().flatten(2)
    assert wrong[0, 1].all() and wrong.sum() == wrong.shape[2]


@pytest.mark.parametrize("form", ["instance", "instance last", "layer", "fixed last"])
def test_nothing_is_written_around_the_outputs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels write vectors and whole bytes: canaries on both sides show one that goes too far.
    canvases: list[torch.Tensor] = []

    def framed(size: Any, dtype: torch.dtype) -> torch.Tensor:
        shape = (size,) if isinstance(size, int) else tuple(size)
        elements = math.prod(shape)
        canvas = torch.full((elements + 128,), 7, dtype=dtype)
        canvases.append(canvas)
        return canvas[64 : 64 + elements].view(shape)

    def framed_like(x: torch.Tensor) -> torch.Tensor:
        flat = framed(x.numel(), x.dtype)
        return flat.as_strided(x.shape, x.stride(), flat.storage_offset())

    given = draw(FORMS[form], torch.float32, False)
    given["unsafe"] = torch.tensor([1])
    with monkeypatch.context() as patch:
        patch.setattr(native_norm_act, "_empty", framed)
        patch.setattr(torch, "empty_like", framed_like)
        kept = forward(native_norm_act.norm_act, FORMS[form], "leaky", given)
        backward(native_norm_act.norm_act_backward, FORMS[form], "leaky", given, kept)
        first = given | {"residual": None}
        forward(native_norm_act.norm_act, FORMS[form], "relu first", first | {"unsafe": None})
    assert len(canvases) > 12
    for canvas in canvases:
        assert (canvas[:64] == 7).all() and (canvas[-64:] == 7).all()


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name: str, tmp_path: Any) -> None:
    if name not in native.build_info()["isas_usable"]:
        pytest.skip(f"this CPU or build has no {name}")
    tests = ("test_forms", "test_channels_kept_beside_y", "test_expected_instruction_set")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not large"]
        + [f"{__file__}::{test}" for test in tests],
        env={**environment, "PETITE_FAST_CPU_ISA": name, "PETITE_FAST_EXPECT_ISA": name},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


def test_expected_instruction_set() -> None:
    info = native.build_info()
    assert info["isa"] == os.environ.get("PETITE_FAST_EXPECT_ISA", info["isa"])


def test_refusals_have_reasons() -> None:
    form = FORMS["instance"]
    given = draw(form, torch.float32, False)

    def reason(**changes: Any) -> str:
        spec = {"norm": "instance", "activation": "leaky_relu", "dtype": torch.float32}
        values = {**given, **spec, **changes}
        possible, text = native_norm_act.can_run_norm_act(
            values["x"], values["weight"], values["bias"], values["mean"], values["var"],
            values["slope"], values["residual"], None, values["norm"], 1, 1e-5,
            values["activation"], 0.01, False, False, False, values["dtype"],
        )  # fmt: skip
        assert possible == (not text)
        return text

    x = given["x"]
    assert reason() == ""
    assert "gelu" in reason(activation="gelu")
    assert "torch.float64" in reason(x=x.double(), dtype=torch.float64)
    assert "y is to be torch.bfloat16" in reason(dtype=torch.bfloat16)
    assert "neither contiguous" in reason(x=x.transpose(-1, -2))
    assert "residual does not lie" in reason(residual=eager_layout(given["residual"]))
    assert "residual is torch.bfloat16" in reason(residual=given["residual"].bfloat16())
    assert "weight is torch.float64" in reason(weight=given["weight"].double())
    assert "'meta'" in reason(x=x.to("meta"))
    assert "empty" in reason(x=x[:0])
    assert "'batch' in channels-last" in reason(x=eager_layout(x), norm="batch")
    assert "mean and var" in reason(norm="fixed")
    wide = torch.randn(2, 5000)
    assert "5000 channels" in reason(
        x=wide, norm="layer", weight=None, bias=None, residual=None, dtype=torch.float32
    )


def test_backward_refusals_have_reasons() -> None:
    form = FORMS["instance"]
    given = draw(form, torch.float32, False)
    y, _, var, _, _ = forward(native_norm_act.norm_act, form, "leaky", given)

    def reason(source: str = "y", slope: bool = False, var: Any = var, dtype: Any = y.dtype) -> str:
        possible, text = native_norm_act.can_run_norm_act_backward(
            given["grad_y"], y, None, None, given["residual"], None, var, given["weight"],
            given["bias"], None, None, "instance", 1, 1e-5, "leaky_relu", 0.01, False, source,
            [True, False, False, False, slope], dtype,
        )  # fmt: skip
        assert possible == (not text)
        return text

    assert reason() == ""
    assert "slope trains" in reason(slope=True)
    assert "reads x" in reason(source="x")
    assert "var" in reason(var=None)
    assert "grad_x is to be torch.bfloat16" in reason(dtype=torch.bfloat16)


def test_a_wrong_size_is_an_error_and_not_a_read_past_the_end() -> None:
    given = draw(FORMS["instance"], torch.float32, False)

    def run(**changes: Any) -> None:
        forward_arguments = {**given, **changes}
        native_norm_act.norm_act(
            forward_arguments["x"], forward_arguments["weight"], forward_arguments["bias"], None,
            None, None, forward_arguments["residual"], forward_arguments["unsafe"], "instance", 1,
            1e-5, "leaky_relu", 0.1, False, False, False, torch.float32,
        )  # fmt: skip

    run()
    with pytest.raises(ValueError, match="weight: must have 3 elements, got 4"):
        run(weight=torch.ones(4))
    with pytest.raises(ValueError, match="residual: must have"):
        run(residual=given["residual"][:1])
    with pytest.raises(ValueError, match="residual: has another dtype"):
        run(residual=given["residual"].bfloat16())
    with pytest.raises(ValueError, match="kept channels must ascend and exist, got 3"):
        run(unsafe=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="kept channels must ascend and exist, got 1"):
        run(unsafe=torch.tensor([2, 1]))
