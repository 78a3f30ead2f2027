"""What norm_act keeps for its backward, to the byte, and when it looks at values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from norm_act_cases import keywords
from torch import nn

from petite_fast.ops import norm_act, norm_act_plan, saved_bytes

N, C, SIZE = 2, 8, (4, 5, 6)
VOXELS = math.prod(SIZE)
ROWS = 30  # of the layer norm
STATISTICS = {"instance": N * C, "group": N * 2, "batch": C, "fixed": C, "layer": N * ROWS}


def unit(norm: str) -> int:
    return N * C * (ROWS if norm == "layer" else VOXELS) * 4


def signs(norm: str) -> int:
    return N * ROWS * 1 if norm == "layer" else N * C * VOXELS // 8


def variance(norm: str) -> int:
    return STATISTICS[norm] * 4


def kept(
    norm: str,
    activation: str,
    order: str = "norm_act",
    *,
    trains: str = "x",
    affine: bool = True,
    residual: bool = False,
    slope: float = 0.01,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes beside the parameters, among them the residual, which somebody else has as well."""
    names = trains.split()
    shape = (N, ROWS, C) if norm == "layer" else (N, C, *SIZE)
    arguments: dict[str, Any] = keywords(norm, activation, order)
    if affine:
        arguments["weight"] = nn.Parameter(torch.ones(C) if weight is None else weight)
        arguments["bias"] = nn.Parameter(torch.zeros(C) if bias is None else bias)
    if activation == "prelu":
        arguments["slope"] = nn.Parameter(torch.full((1,), slope))
    elif activation == "leaky_relu":
        arguments["slope"] = slope
    for name in ("weight", "bias", "slope"):
        if isinstance(arguments.get(name), nn.Parameter):
            arguments[name].requires_grad_(name in names)
    if norm == "fixed":
        arguments["running_mean"] = torch.zeros(C)
        arguments["running_var"] = torch.ones(C)
    if residual:
        arguments["residual"] = torch.randn(shape, dtype=dtype, requires_grad="residual" in names)
    x = torch.randn(shape, dtype=dtype, requires_grad="x" in names)
    return saved_bytes(lambda: norm_act(x, **arguments))


MOVING = ["instance", "group", "batch", "layer"]  # statistics of x
AFFINE = [("x", False), ("x", True), ("x weight bias", True), ("weight", True)]


@pytest.mark.parametrize(("trains", "affine"), AFFINE)
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "prelu"])
@pytest.mark.parametrize("norm", MOVING)
def test_invertible_keeps_y(norm: str, activation: str, trains: str, affine: bool) -> None:
    more = {"trains": trains, "affine": affine}
    assert kept(norm, activation, **more) == unit(norm) + variance(norm)
    with_residual = kept(norm, activation, residual=True, **more)
    assert with_residual == 2 * unit(norm) + variance(norm)


@pytest.mark.parametrize(("trains", "affine"), AFFINE[:3])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "prelu"])
@pytest.mark.parametrize("norm", MOVING)
def test_activation_first_keeps_y_and_signs(
    norm: str, activation: str, trains: str, affine: bool
) -> None:
    wanted = unit(norm) + signs(norm) + variance(norm)
    assert kept(norm, activation, "act_norm", trains=trains, affine=affine) == wanted
    assert kept(norm, "identity", "act_norm", trains=trains, affine=affine) == wanted - signs(norm)
    # Without a gradient of x none goes through the activation.
    assert kept(norm, activation, "act_norm", trains="weight") == wanted - signs(norm)


@pytest.mark.parametrize(("trains", "affine"), AFFINE)
@pytest.mark.parametrize("norm", MOVING)
def test_not_invertible_keeps_xhat(norm: str, trains: str, affine: bool) -> None:
    more = {"trains": trains, "affine": affine}
    xhat = unit(norm) + variance(norm)
    for residual in (False, True):
        assert kept(norm, "relu", residual=residual, **more) == xhat + signs(norm)
        assert kept(norm, "leaky_relu", slope=-1.0, residual=residual, **more) == xhat + signs(norm)
        assert kept(norm, "prelu", slope=0.0, residual=residual, **more) == xhat + signs(norm)
        assert kept(norm, "gelu", residual=residual, **more) == xhat + unit(norm) * residual


@pytest.mark.parametrize("norm", MOVING)
def test_x_where_the_activations_input_is_needed(norm: str) -> None:
    x = unit(norm) + 2 * variance(norm)
    assert kept(norm, "gelu", "act_norm") == x
    assert kept(norm, "prelu", "act_norm", trains="x slope") == x
    assert kept(norm, "prelu", trains="x slope") == unit(norm) + variance(norm)


@pytest.mark.parametrize("norm", [*MOVING, "fixed"])
def test_bias_and_residual_alone_need_no_values(norm: str) -> None:
    assert kept(norm, "identity", trains="bias") == variance(norm)
    assert kept(norm, "leaky_relu", trains="bias") == variance(norm) + signs(norm)
    assert kept(norm, "relu", trains="residual", residual=True) == variance(norm) + signs(norm)
    assert kept(norm, "relu", "act_norm", trains="bias") == variance(norm)


@pytest.mark.parametrize("affine", [False, True])
def test_fixed_statistics_keep_signs(affine: bool) -> None:
    for order in ("norm_act", "act_norm"):
        for activation in ("leaky_relu", "relu", "prelu"):
            got = kept("fixed", activation, order, affine=affine)
            assert got == signs("fixed") + variance("fixed")
        assert kept("fixed", "identity", order, affine=affine) == variance("fixed")
        assert kept("fixed", "gelu", order, affine=affine) == unit("fixed") + 2 * variance("fixed")
    with_residual = kept("fixed", "relu", affine=affine, residual=True)
    assert with_residual == signs("fixed") + variance("fixed")


def test_fixed_statistics_with_a_trained_weight() -> None:
    y, two = unit("fixed") + variance("fixed"), 2 * variance("fixed")
    assert kept("fixed", "leaky_relu", trains="x weight") == y
    assert kept("fixed", "leaky_relu", "act_norm", trains="x weight") == y + signs("fixed")
    assert kept("fixed", "relu", trains="x weight") == unit("fixed") + two + signs("fixed")
    weight = torch.ones(C)
    weight[2] = 1e-3
    unsafe = kept("fixed", "identity", trains="x weight", weight=weight)
    assert unsafe == unit("fixed") + two


@pytest.mark.parametrize("norm", MOVING)
def test_channels_that_cannot_be_read_back_are_kept_beside_y(norm: str) -> None:
    weight, bias = torch.ones(C), torch.zeros(C)
    weight[1], weight[2], bias[5] = 0, -0.009, 10.1
    y = unit(norm) + variance(norm)
    some = kept(norm, "leaky_relu", weight=weight, bias=bias)
    assert some == y + unit(norm) * 3 // C + 3 * 8  # and their indices
    none = kept(norm, "leaky_relu", weight=torch.zeros(C), bias=bias)
    assert none == y + signs(norm)  # xhat instead of y
    # A residual counts as a shift of 1.
    weight = torch.full((C,), 0.11)
    weight[0] = 0.09
    with_residual = kept(norm, "identity", weight=weight, residual=True)
    assert with_residual == y + unit(norm) + unit(norm) // C + 8
    assert kept(norm, "identity", weight=weight) == y


def test_half_precision_keeps_half() -> None:
    got = kept("instance", "leaky_relu", dtype=torch.bfloat16)
    assert got == unit("instance") // 2 + variance("instance")


def test_no_grad_keeps_nothing() -> None:
    with torch.no_grad():
        for norm in STATISTICS:
            assert kept(norm, "relu", trains="x weight bias") == 0


def test_odd_rows_take_whole_bytes() -> None:
    x = torch.randn(2, 3, 1, 1, 9, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return norm_act(x, "batch", running_mean=mean, running_var=var, activation="relu")

    assert saved_bytes(lambda: run(x)) == 2 * 3 * 2 + 12
    last = x.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    assert saved_bytes(lambda: run(last)) == 2 * 9 * 1 + 12


def test_the_output_is_shared_with_whoever_keeps_it_too() -> None:
    x = torch.randn(N, C, *SIZE, requires_grad=True)
    one = saved_bytes(lambda: norm_act(x, "instance", activation="leaky_relu"))
    chain = saved_bytes(lambda: norm_act(x, "instance", activation="leaky_relu").square())
    assert one == chain == unit("instance") + variance("instance")
    frozen = nn.LeakyReLU()(nn.InstanceNorm3d(C)(x))
    assert saved_bytes(lambda: nn.LeakyReLU()(nn.InstanceNorm3d(C)(x))) > 2 * unit("instance")
    assert frozen.shape == x.shape


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every scan of a weight."""
    seen: list[int] = []
    plain = norm_act_plan._find_unsafe

    def counted(*arguments: Any) -> Any:
        seen.append(1)
        return plain(*arguments)

    monkeypatch.setattr(norm_act_plan, "_find_unsafe", counted)
    return seen


def test_weights_are_looked_at_once_per_change(looks: list[int]) -> None:
    x = torch.randn(N, C, *SIZE, requires_grad=True)
    weight, bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def keeps() -> int:
        return saved_bytes(lambda: norm_act(x, "instance", weight=weight, bias=bias))

    y = unit("instance") + variance("instance")
    assert [keeps(), keeps(), len(looks)] == [y, y, 1]
    with torch.no_grad():
        weight[0] = 0
    assert [keeps(), keeps(), len(looks)] == [y + unit("instance") // C + 8] * 2 + [2]
    with torch.no_grad():
        weight[0], bias[1] = 1, 11
    assert [keeps(), len(looks)] == [y + unit("instance") // C + 8, 3]
    bias.data = torch.zeros(C)  # other memory
    assert [keeps(), len(looks)] == [y, 4]
    bias = nn.Parameter(torch.full((C,), 11.0))  # another bias with the same weight
    assert [keeps(), len(looks)] == [y, 5]  # xhat: no channel is safe
    with torch.no_grad():
        norm_act(x, "instance", weight=nn.Parameter(torch.ones(C)))
    assert len(looks) == 5  # nothing is kept, nothing is looked at
