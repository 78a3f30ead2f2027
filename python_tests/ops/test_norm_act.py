"""norm_act against the formula in float64, with every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_act_cases import (
    ACTIVATIONS,
    NORMS,
    ORDERS,
    check,
    gradients,
    keywords,
    tensors,
    torch_norm_act,
)

from petite_fast.ops import norm_act, reference

SIZE = (2, 6, 3, 4, 5)
TRAINABLE = ("x", "weight", "bias", "slope", "residual")
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def size_for(norm: str) -> tuple[int, ...]:
    return (2, 12, 6) if norm == "layer" else SIZE


def names(values: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in TRAINABLE if name in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_error_is_at_most_twice_torchs(
    norm: str, activation: str, order: str, dtype: torch.dtype
) -> None:
    arguments = keywords(norm, activation, order)
    for layout in LAYOUTS if norm != "layer" else LAYOUTS[:1]:
        for residual in (False, True) if order == "norm_act" else (False,):
            values = tensors(norm, activation, size_for(norm), residual=residual)
            check(values, arguments, names(values), dtype, layout)
            check(values, arguments, ["x"], dtype, layout)
        values = tensors(norm, activation, size_for(norm), affine=False)
        check(values, arguments, names(values), dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "prelu"])
@pytest.mark.parametrize("norm", NORMS)
def test_channels_that_cannot_be_read_back(
    norm: str, activation: str, order: str, dtype: torch.dtype
) -> None:
    values = tensors(norm, activation, size_for(norm))
    values["weight"][:3] = torch.tensor([0.0, 1e-6, -0.009])
    values["bias"][3] = 40
    arguments = keywords(norm, activation, order)
    for layout in LAYOUTS if norm != "layer" else LAYOUTS[:1]:
        check(values, arguments, names(values), dtype, layout)
    values["weight"].zero_()
    check(values, arguments, ["x", "weight"], dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_channels_just_safe_enough(norm: str) -> None:
    values = tensors(norm, "leaky_relu", size_for(norm))
    values["weight"] = 0.0101 * values["weight"].sign()
    values["bias"] = 9.9 * values["weight"]
    check(values, keywords(norm, "leaky_relu"), names(values), torch.float32)
    values = tensors(norm, "leaky_relu", size_for(norm), residual=True)
    values["weight"] = 0.2 * values["weight"].sign()
    values["bias"] = 4.9 * values["weight"]
    check(values, keywords(norm, "leaky_relu"), names(values), torch.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", NORMS)
def test_slopes_that_cannot_be_divided_by(norm: str, order: str) -> None:
    values = tensors(norm, "prelu", size_for(norm))
    values["slope"][:3] = torch.tensor([0.0, 1e-9, -0.5])
    arguments = keywords(norm, "prelu", order)
    check(values, arguments, names(values), torch.float32)
    check(values, arguments, ["x", "weight"], torch.float32)
    del values["slope"]
    for slope in (0, -0.3):
        arguments = keywords(norm, "leaky_relu", order, slope=slope)
        check(values, arguments, names(values), torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_prelu_with_one_slope(norm: str) -> None:
    values = tensors(norm, "prelu", size_for(norm), residual=True)
    values["slope"] = values["slope"][:1]
    check(values, keywords(norm, "prelu"), names(values), torch.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm: str, activation: str, order: str) -> None:
    values = tensors(
        norm, activation, (2, 3, 4) if norm == "layer" else (2, 4, 2, 2, 1),
        residual=order == "norm_act",
    )  # fmt: skip
    values["weight"][1] = 0
    trained = names(values)
    fixed = {name: value for name, value in values.items() if name not in trained}
    inputs = [values[name].requires_grad_() for name in trained]

    def run(*given: torch.Tensor) -> torch.Tensor:
        arguments = dict(zip(trained, given, strict=True)) | fixed
        return norm_act(**arguments, **keywords(norm, activation, order))

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("trained", ["weight", "bias", "slope", "residual", "bias residual"])
@pytest.mark.parametrize("norm", NORMS)
def test_each_gradient_alone(norm: str, trained: str) -> None:
    values = tensors(norm, "prelu", size_for(norm), residual=True)
    check(values, keywords(norm, "prelu"), trained.split(), torch.float32)
    if trained in ("weight", "bias"):
        for activation in ("identity", "gelu"):
            values = tensors(norm, activation, size_for(norm))
            for order in ORDERS:
                check(values, keywords(norm, activation, order), [trained], torch.float32)


@pytest.mark.parametrize("voxels", [(1, 2, 1), (3, 3, 3), (1, 7, 17)])
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 17])
@pytest.mark.parametrize("norm", NORMS)
def test_odd_sizes(norm: str, channels: int, voxels: tuple[int, int, int]) -> None:
    size = (3, math.prod(voxels), channels + 1) if norm == "layer" else (3, channels, *voxels)
    values = tensors(norm, "leaky_relu", size)
    arguments = keywords(norm, "leaky_relu")
    arguments["groups"] = channels if norm == "group" else 1
    # A pair of values is +-1 whatever they are: no gradient of x to speak of but rounding.
    trained = ["weight", "bias"] if math.prod(voxels) == 2 or channels == 1 else names(values)
    for layout in LAYOUTS if norm != "layer" else LAYOUTS[:1]:
        check(values, arguments, trained, torch.float32, layout)


@pytest.mark.parametrize("norm", ["group", "batch", "fixed", "layer"])
@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_fewer_dimensions(norm: str, dimensions: int) -> None:
    values = tensors(norm, "leaky_relu", (5, 6, 4, 3)[: 2 + dimensions])
    check(values, keywords(norm, "leaky_relu"), names(values), torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_memory_that_is_not_dense(norm: str) -> None:
    values = tensors(norm, "leaky_relu", size_for(norm), residual=True)
    arguments = keywords(norm, "leaky_relu")
    plain = gradients(norm_act, values, arguments, ["x", "residual"], torch.float32)
    x, residual = values["x"].float(), values["residual"].float()
    x = x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    wider = torch.stack([residual, residual], -1)
    residual = wider[..., 0].requires_grad_()
    assert not x.is_contiguous() and not residual.is_contiguous()
    rest = {n: v.float() for n, v in values.items() if n not in ("x", "residual")}
    y = norm_act(x, residual=residual, **rest, **arguments)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).float()
    grad_y = grad_y.transpose(-1, -2).contiguous().transpose(-1, -2)
    grad_x, grad_residual = torch.autograd.grad(y, (x, residual), grad_y)
    torch.testing.assert_close(y.detach(), plain["y"])
    torch.testing.assert_close(grad_x, plain["x"])
    torch.testing.assert_close(grad_residual, plain["residual"])


@pytest.mark.parametrize("norm", NORMS[:4])
def test_channels_last_stays(norm: str) -> None:
    values = tensors(norm, "leaky_relu", SIZE)
    x = values.pop("x").float().to(memory_format=torch.channels_last_3d).requires_grad_()
    rest = {name: value.float() for name, value in values.items()}
    y = norm_act(x, **rest, **keywords(norm, "leaky_relu"))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_running_statistics_are_torchs(order: str, dtype: torch.dtype, training: bool) -> None:
    ours, theirs = [
        {"running_mean": torch.ones(6, dtype=dtype), "running_var": torch.full((6,), 2.0).to(dtype)}
        for _ in range(2)
    ]
    arguments = keywords(
        "batch", "leaky_relu", order, training=training, momentum=0.3, slope=0.2, eps=1e-3
    )
    for seed in range(3):
        values = {n: v.to(dtype) for n, v in tensors("batch", "", SIZE, seed=seed).items()}
        y = norm_act(**values, **ours, **arguments)
        torch.testing.assert_close(y, torch_norm_act(**values, **theirs, **arguments))
    for name, buffer in ours.items():
        torch.testing.assert_close(buffer, theirs[name])
    assert training == bool((ours["running_mean"] != 1).all())


def test_batch_norm_without_buffers_uses_the_batch() -> None:
    values = {n: v.float() for n, v in tensors("batch", "", SIZE).items()}
    arguments = keywords("batch", "identity")
    torch.testing.assert_close(
        norm_act(**values, **arguments), torch_norm_act(**values, **arguments)
    )


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "layer"])
def test_statistics_of_numbers_far_from_zero(norm: str, scale: float) -> None:
    values = tensors(norm, "identity", (2, 40, 48) if norm == "layer" else (2, 4, 8, 9, 10))
    values["x"] = (values["x"] + 1000) * scale
    arguments = keywords(norm, "identity", eps=1e-30)
    for layout in LAYOUTS if norm != "layer" else LAYOUTS[:1]:
        check(values, arguments, [], torch.float32, layout)


@pytest.mark.parametrize("size", [(0, 6, 3, 3, 3), (2, 6, 0, 3, 3)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_voxels(norm: str, order: str, size: tuple[int, ...]) -> None:
    x = torch.zeros(size if norm != "layer" else (0, 5, 6), requires_grad=True)
    weight = torch.ones(6, requires_grad=True)
    more: dict[str, Any] = {}
    if norm in ("batch", "fixed"):
        more = {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    y = norm_act(x, weight=weight, **more, **keywords(norm, "leaky_relu", order))
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert torch.equal(weight.grad, torch.zeros(6))
    if more:
        assert torch.equal(more["running_mean"], torch.zeros(6))
        assert torch.equal(more["running_var"], torch.ones(6))


def test_a_single_value_is_refused_as_in_torch() -> None:
    one = torch.randn(1, 4, 1, 1, 1)
    for norm, groups in (("instance", 1), ("batch", 1), ("group", 4)):
        arguments = {"groups": groups, "training": True}
        with pytest.raises(ValueError, match="wanted more than 1"):
            norm_act(one, norm, **arguments)
        with pytest.raises(ValueError, match="more than 1"):
            torch_norm_act(one, norm, **arguments)
    with pytest.raises(ValueError, match="voxel"):
        norm_act(torch.randn(2, 4), "instance")
    torch.testing.assert_close(norm_act(one, "group", groups=2), F.group_norm(one, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm": "switch"}, ValueError, "norm: got 'switch', wanted one of"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
        ({"order": "both"}, ValueError, "order: got 'both'"),
        ({"x": torch.ones(2, 4, 3, dtype=torch.long)}, TypeError, "x: got torch.int64"),
        ({"x": torch.ones(4)}, ValueError, r"x: got shape \(4,\), wanted \[N, C, ...\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: got shape \(3,\), wanted \(4,\)"),
        ({"bias": torch.ones(4, 1)}, ValueError, r"bias: got shape \(4, 1\), wanted \(4,\)"),
        ({"running_mean": torch.ones(4)}, ValueError, "running_mean, running_var: got tensors"),
        ({"norm": "group", "groups": 3}, ValueError, "groups: got 3, wanted a divisor of 4"),
        ({"norm": "batch"}, ValueError, "running_mean, running_var: got None, wanted both"),
        ({"activation": "prelu"}, TypeError, "slope: got float, wanted a tensor"),
        ({"slope": torch.ones(1)}, TypeError, "slope: got a tensor, wanted a number"),
        (
            {"activation": "prelu", "slope": torch.ones(2)},
            ValueError,
            r"slope: got shape \(2,\), wanted \(1,\) or \(4,\)",
        ),
        ({"residual": torch.ones(2, 4, 1)}, ValueError, r"residual: got shape \(2, 4, 1\)"),
        (
            {"residual": torch.ones(2, 4, 3), "order": "act_norm"},
            ValueError,
            "residual: got a tensor with order 'act_norm'",
        ),
    ],
)
def test_misuse(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(2, 4, 3), "norm": "instance"}
    with pytest.raises(error, match=message):
        norm_act(**{**arguments, **changes})


def test_the_reference_is_torch() -> None:
    for norm in NORMS:
        for activation in ACTIVATIONS:
            for order in ORDERS:
                values = tensors(
                    norm, activation, size_for(norm), residual=order == "norm_act", seed=3
                )
                arguments = keywords(norm, activation, order)
                torch.testing.assert_close(
                    reference.norm_act(**values, **arguments), torch_norm_act(**values, **arguments)
                )
