"""norm_act against its formula in float64 and against torch's layers: values, gradients, bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import assert_twice_torch

from petite_fast.ops import norm_act, reference, saved_bytes

C, SIZE = 6, (3, 5, 7)
NORMS: dict[str, dict[str, Any]] = {
    "instance": {}, "group": {"groups": 3}, "batch": {"training": True}, "fixed": {}, "layer": {},
}  # fmt: skip
ACTIVATIONS: dict[str, Any] = {
    "identity": {}, "leaky_relu": {"slope": 0.2}, "relu": {}, "gelu": {}, "prelu": {},
}  # fmt: skip
AFFINES = ["absent", "plain", "trained", "edge"]


def tensors(norm: str, activation: str, affine: str, order: str, residual: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (2, *SIZE, C) if norm == "layer" else (2, C, *SIZE)
    found: dict[str, Any] = {"x": draw(*shape)}
    if affine != "absent":
        found["weight"] = 1 + 0.3 * draw(C)
        found["bias"] = 0.3 * draw(C)
    if affine == "edge":  # nothing, almost nothing, negative; a shift that hides the scale
        found["weight"] = torch.tensor([0.0, 1e-5, -1.2, 0.7, 1.0, -0.02], dtype=torch.float64)
        found["bias"] = torch.tensor([0.3, -0.2, 0.1, 50.0, 0.0, 0.1], dtype=torch.float64)
    if norm == "fixed":
        found["running_mean"] = 0.3 * draw(C)
        found["running_var"] = 0.5 + draw(C).abs()
    if activation == "prelu":
        found["slope"] = 0.1 + 0.2 * draw(C).abs()
    if residual:
        found["residual"] = draw(*shape)
    return found


def call(function, values: dict[str, Any], norm: str, activation: str, order: str):
    values = dict(values)
    options = {**NORMS[norm], **ACTIVATIONS[activation], "order": order, "activation": activation}
    name = "batch" if norm == "fixed" else norm
    return function(values.pop("x"), name, **values, **options)


def cases():
    for norm, activation, affine in itertools.product(NORMS, ACTIVATIONS, AFFINES):
        for order, residual in (("norm_act", False), ("norm_act", True), ("act_norm", False)):
            if not (norm == "layer" and activation == "prelu"):
                yield norm, activation, affine, order, residual


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype, layout) -> None:
    for norm, activation, affine, order, residual in cases():
        exact = tensors(norm, activation, affine, order, residual)
        trained = ["x", *(n for n in ("residual", "slope") if n in exact)]
        if affine in ("trained", "edge"):
            trained += ["weight", "bias"]
        results = []
        for function, kind in (
            (norm_act, dtype), (reference.norm_act, dtype), (reference.norm_act, torch.float64),
        ):  # fmt: skip
            values = {k: v.to(kind) for k, v in exact.items()}
            if function is norm_act and layout == "channels_last":
                for name in ("x", "residual"):
                    if name in values:
                        values[name] = values[name].contiguous(memory_format=torch.channels_last_3d)
            if function is norm_act and layout == "strided":
                values["x"] = torch.stack([values["x"]] * 2, -1)[..., 0]
            for name in trained:
                values[name].requires_grad_()
            y = call(function, values, norm, activation, order)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(kind)
            gradients = torch.autograd.grad(y, [values[n] for n in trained], grad)
            results.append((y, gradients))
        (y, ours), (plain, theirs), (wanted, expected) = results
        what = f"{norm}, {activation}, {affine}, {order}, residual {residual}"
        assert_twice_torch(y, plain, wanted, name=what)
        for name, a, b, c in zip(trained, ours, theirs, expected, strict=True):
            scale = float(c.abs().max())
            if dtype == torch.float64:
                torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-8 * scale, msg=what)
                continue
            # A sign at the kink may fall either way in float32; what is read back from the output
            # is as exact as the output, so a few ulp of the largest value are allowed for.
            error = (a.double() - c).abs()
            allowed = 3 * (b.double() - c).abs().max() + 2e-5 * scale
            assert float(error.max()) <= float(allowed), f"{what}: {name} {float(error.max())}"


@pytest.mark.parametrize("norm", ["instance", "group", "batch", "layer"])
def test_gradcheck(norm) -> None:
    values = tensors(norm, "leaky_relu", "edge", "norm_act", True)
    leaves = [values[n].requires_grad_() for n in ("x", "weight", "bias", "residual")]

    def run(x, weight, bias, residual):
        values = {"x": x, "weight": weight, "bias": bias, "residual": residual}
        return call(norm_act, values, norm, "leaky_relu", "norm_act")

    assert torch.autograd.gradcheck(run, leaves)


def test_equal_to_torchs_layers() -> None:
    x = torch.randn(2, C, *SIZE)
    weight, bias = torch.rand(C) + 0.5, torch.randn(C)
    pairs = [
        (norm_act(x, "instance", weight=weight, bias=bias), F.instance_norm(x, None, None, weight,
                                                                            bias)),
        (norm_act(x, "group", groups=2, activation="relu"), F.relu(F.group_norm(x, 2))),
        (norm_act(x.movedim(1, -1), "layer", weight=weight),
         F.layer_norm(x.movedim(1, -1), (C,), weight)),
    ]  # fmt: skip
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_running_statistics_are_those_of_torch() -> None:
    x = torch.randn(3, C, *SIZE)
    ours, theirs = ([torch.zeros(C), torch.ones(C)] for _ in range(2))
    for _ in range(3):
        y = norm_act(x, "batch", running_mean=ours[0], running_var=ours[1], training=True,
                     momentum=0.3)  # fmt: skip
        z = F.batch_norm(x, *theirs, training=True, momentum=0.3)
        torch.testing.assert_close(y, z)
    torch.testing.assert_close(ours, theirs)


UNIT = 4 * 2 * C * 8**3
STATISTICS = {"instance": 4 * 2 * C, "group": 4 * 2 * 3, "batch": 4 * C}


@pytest.mark.parametrize("norm", STATISTICS)
@pytest.mark.parametrize(
    ("activation", "order", "bits"),
    [("identity", "norm_act", 0), ("leaky_relu", "norm_act", 0), ("leaky_relu", "act_norm", 1),
     ("relu", "norm_act", 1), ("gelu", "norm_act", 0)],
)  # fmt: skip
def test_one_unit_is_kept(norm, activation, order, bits) -> None:
    x = torch.randn(2, C, 8, 8, 8, requires_grad=True)
    options = {**NORMS[norm], **ACTIVATIONS[activation], "activation": activation, "order": order}
    kept = saved_bytes(lambda: norm_act(x, norm, **options))
    assert kept == UNIT + bits * UNIT // 32 + STATISTICS[norm]


def test_fixed_statistics_keep_a_bit() -> None:
    x = torch.randn(2, C, 8, 8, 8, requires_grad=True)
    mean, var = torch.zeros(C), torch.ones(C)
    fixed = {"running_mean": mean, "running_var": var}
    assert saved_bytes(lambda: norm_act(x, "batch", **fixed)) == var.nbytes
    for order in ("norm_act", "act_norm"):
        run = lambda: norm_act(x, "batch", **fixed, activation="relu", order=order)  # noqa: E731, B023
        assert saved_bytes(run) == UNIT // 32 + var.nbytes


def test_unsafe_channels_alone_are_kept_beside_the_output() -> None:
    x = torch.randn(2, C, 8, 8, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(C), requires_grad=False)
    weight[2] = 0.0
    kept = saved_bytes(lambda: norm_act(x, "instance", weight=weight, activation="leaky_relu"))
    index = 8  # one int64
    assert kept == UNIT + UNIT // C + STATISTICS["instance"] + index
    weight[2] = 1.0  # a change is seen
    kept = saved_bytes(lambda: norm_act(x, "instance", weight=weight, activation="leaky_relu"))
    assert kept == UNIT + STATISTICS["instance"]


def test_a_written_output_is_refused_by_autograd() -> None:
    x = torch.randn(1, C, *SIZE, requires_grad=True)
    y = norm_act(x, "instance", activation="leaky_relu")
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_compile_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, C, *SIZE, dtype=torch.float64, requires_grad=True)

    def run(x):
        return norm_act(x, "instance", activation="leaky_relu", slope=0.1)

    grad = torch.randn_like(x)
    (wanted,) = torch.autograd.grad(run(x), x, grad)
    again = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x, grad)[0], wanted)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x), x, grad)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    z = torch.randn(2, C, *SIZE).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(z).dtype == F.instance_norm(z).dtype
        tokens = z.movedim(1, -1)
        assert norm_act(tokens, "layer").dtype == F.layer_norm(tokens, (C,)).dtype


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"norm": "weight"}, ValueError, "norm: got 'weight', wanted one of"),
        ({"norm": "instance", "activation": "elu"}, ValueError, "activation: got 'elu'"),
        ({"norm": "instance", "order": "both"}, ValueError, "order: got 'both'"),
        ({"norm": "instance", "weight": torch.ones(3)}, ValueError, "weight: got shape"),
        ({"norm": "group", "groups": 4}, ValueError, "groups"),
        ({"norm": "batch"}, ValueError, "running_mean"),
        ({"norm": "instance", "activation": "prelu"}, TypeError, "slope"),
    ],
)
def test_refusals(arguments, error, text) -> None:
    with pytest.raises(error, match=text):
        norm_act(torch.randn(1, C, 2, 2, 2), **arguments)
