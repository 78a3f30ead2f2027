"""norm_act inside PyTorch: autocast, compile, checkpoint, hooks, subclasses, misuse of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from norm_act_cases import ACTIVATIONS, NORMS, ORDERS, gradients, keywords, tensors, torch_norm_act
from torch.utils.checkpoint import checkpoint

from petite_fast.ops import norm_act

OPS = torch.ops.petite_fast
SIZE = (2, 6, 3, 4, 5)


def size_for(norm: str) -> tuple[int, ...]:
    return (2, 12, 6) if norm == "layer" else SIZE


def single(norm: str, activation: str, **more: Any) -> dict[str, torch.Tensor]:
    return {n: v.float() for n, v in tensors(norm, activation, size_for(norm), **more).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm: str, channels_last: bool, dtype: torch.dtype) -> None:
    values = {n: v.to(dtype) for n, v in tensors(norm, "prelu", size_for(norm)).items()}
    x = values["x"]
    if channels_last and norm != "layer":
        x = x.to(memory_format=torch.channels_last_3d)
    wide = torch.promote_types(dtype, torch.float32)
    given = [values.get("running_mean"), values.get("running_var")]
    unsafe = torch.tensor([1, 4])
    spec = (norm, 2 if norm == "group" else 1, 1e-5, "leaky_relu", 0.1)
    affine = (values["weight"], values["bias"])
    for act_first, keeps_xhat, channels in ((False, True, None), (True, False, unsafe)):
        residual = None if act_first else torch.randn_like(x)
        arguments = (
            x, *affine, *given, values["slope"], residual, channels, *spec, act_first, keeps_xhat,
            True, dtype,
        )  # fmt: skip
        torch.library.opcheck(OPS.norm_act, arguments)
        y, mean, var, xhat, sign = OPS.norm_act(*arguments)
        if norm == "fixed":
            mean, var = (t.to(wide) for t in given)
        source = "xhat" if keeps_xhat else "y"
        wants = [True, not act_first, True, True, not act_first]
        torch.library.opcheck(
            OPS.norm_act_backward,
            (
                torch.randn_like(y), y if source == "y" else None, xhat, sign, residual, mean, var,
                *affine, values["slope"], channels, *spec, act_first, source, wants, dtype,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_compile_fullgraph(norm: str, activation: str, order: str) -> None:
    values = single(norm, activation, residual=order == "norm_act")
    names = [n for n in values if not n.startswith("running")]
    arguments = keywords(norm, activation, order)

    def run(**given: torch.Tensor) -> torch.Tensor:
        return norm_act(**given, **arguments)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager = gradients(run, values, {}, names, torch.float32)
    traced = gradients(compiled, values, {}, names, torch.float32)
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-5)


def test_compile_updates_the_running_statistics() -> None:
    values = single("batch", "")
    buffers = [[torch.zeros(6), torch.ones(6)] for _ in range(2)]
    arguments = keywords("batch", "relu")
    compiled = torch.compile(norm_act, fullgraph=True, backend="aot_eager")
    for function, (mean, var) in zip((norm_act, compiled), buffers, strict=True):
        function(**values, running_mean=mean, running_var=var, **arguments)
    torch.testing.assert_close(buffers[1], buffers[0])
    assert (buffers[1][0] != 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_gives_torchs_dtypes(norm: str, activation: str, order: str) -> None:
    for x_dtype in (torch.float32, torch.bfloat16, torch.float64):
        for residual_dtype in (None, torch.float32, torch.bfloat16):
            if residual_dtype and (order == "act_norm" or x_dtype == torch.float64):
                continue
            values = single(norm, activation, residual=residual_dtype is not None)
            values["x"] = values["x"].to(x_dtype)
            if x_dtype == torch.float64:
                values = {n: v.double() for n, v in values.items()}
            if residual_dtype:
                values["residual"] = values["residual"].to(residual_dtype)
            names = [n for n in values if not n.startswith("running")]
            for name in names:
                values[name].requires_grad_()
            arguments = keywords(norm, activation, order)
            with torch.autocast("cpu", torch.bfloat16):
                ours = norm_act(**values, **arguments)
                theirs = torch_norm_act(**values, **arguments)
            assert ours.dtype == theirs.dtype, (x_dtype, residual_dtype)
            tolerance = 1e-9 if x_dtype == torch.float64 else 0.05
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
            for name, grad in zip(
                names,
                torch.autograd.grad(ours.square().sum(), [values[n] for n in names]),
                strict=True,
            ):
                assert grad.dtype == values[name].dtype
                assert torch.isfinite(grad).all()


@pytest.mark.parametrize("norm", NORMS)
def test_meta_tensor(norm: str) -> None:
    values = single(norm, "leaky_relu", residual=True)
    plain = norm_act(**values, **keywords(norm, "leaky_relu"))
    values["x"] = MetaTensor(values["x"], meta={"key": "value"})
    y = norm_act(**values, **keywords(norm, "leaky_relu"))
    assert isinstance(y, MetaTensor) and y.meta["key"] == "value"
    torch.testing.assert_close(y.as_tensor(), plain)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("norm", NORMS)
def test_checkpoint(norm: str, activation: str, order: str) -> None:
    values = single(norm, activation)
    values["weight"][1] = 0
    names = [n for n in values if not n.startswith("running")]
    arguments = keywords(norm, activation, order)

    def recomputed(**given: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda: norm_act(**given, **arguments) * 2, use_reentrant=False) / 2

    plain = gradients(norm_act, values, arguments, names, torch.float32)
    again = gradients(recomputed, values, {}, names, torch.float32)
    for name, value in plain.items():
        assert torch.equal(again[name], value)


def test_saved_tensor_hooks_see_everything() -> None:
    values = single("instance", "leaky_relu", residual=True)
    values["weight"][0] = 0
    arguments = keywords("instance", "leaky_relu")
    plain = gradients(norm_act, values, arguments, ["x", "weight", "residual"], torch.float32)
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooked = gradients(norm_act, values, arguments, ["x", "weight", "residual"], torch.float32)
    for name, value in plain.items():
        assert torch.equal(hooked[name], value)
    assert packed.count(torch.Size(SIZE)) == 2  # y and the residual


@pytest.mark.parametrize("norm", NORMS)
def test_writing_to_the_output_before_backward_is_an_error(norm: str) -> None:
    values = single(norm, "leaky_relu")
    values["x"].requires_grad_()
    values["weight"].requires_grad_()  # fixed statistics need y, too
    y = norm_act(**values, **keywords(norm, "leaky_relu"))
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_writing_to_an_output_that_is_not_kept_is_fine() -> None:
    values = single("fixed", "relu")
    x = values["x"].requires_grad_()
    arguments = keywords("fixed", "relu")
    (plain,) = torch.autograd.grad(norm_act(**values, **arguments).sum(), x)
    (doubled,) = torch.autograd.grad(norm_act(**values, **arguments).mul_(2).sum(), x)
    torch.testing.assert_close(doubled, 2 * plain)


def test_a_second_derivative_is_refused() -> None:
    values = single("instance", "leaky_relu")
    x = values["x"].requires_grad_()
    y = norm_act(**values, **keywords("instance", "leaky_relu"))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_training_a_chain_of_blocks_as_torch_does() -> None:
    def train(function: Any) -> list[float]:
        torch.manual_seed(0)
        x = torch.randn(2, 6, 4, 4, 4)
        kernels = [torch.randn(6, 6, 3, 3, 3).div_(9).requires_grad_() for _ in range(3)]
        affine = [torch.ones(6).requires_grad_() for _ in range(3)]
        optimiser = torch.optim.SGD([*kernels, *affine], lr=0.05)
        losses = []
        for _ in range(5):
            h, before = x, None
            for kernel, weight in zip(kernels, affine, strict=True):
                h = F.conv3d(h, kernel, padding=1)
                h = function(h, "instance", weight=weight, activation="leaky_relu", residual=before)
                before = h
            loss = (h - x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    ours, theirs = train(norm_act), train(torch_norm_act)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
