"""norm_act through torch's own functions, and the tensors that its tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from conv_cases import assert_twice_torch, leaves

from petite_fast.ops import norm_act, reference

NORMS = ["instance", "group", "batch", "fixed", "layer"]
ACTIVATIONS = ["identity", "leaky_relu", "relu", "gelu", "prelu"]
ORDERS = ["norm_act", "act_norm"]


def keywords(norm: str, activation: str, order: str = "norm_act", **more: Any) -> dict[str, Any]:
    """Arguments that are not tensors; "fixed" is a batch norm that does not train."""
    given = {
        "norm": "batch" if norm == "fixed" else norm,
        "groups": 2 if norm == "group" else 1,
        "training": norm == "batch",
        "activation": activation,
        "order": order,
    }
    return {**given, **more}


def tensors(
    norm: str,
    activation: str,
    size: Sequence[int],
    *,
    residual: bool = False,
    affine: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """x, weight, bias, slope, residual and buffers in float64, as far as they are asked for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = size[-1 if norm == "layer" else 1]
    made = {"x": 2 * normal(*size) + 0.5}
    if affine:
        made["weight"] = (0.5 + normal(channels).abs()) * normal(channels).sign()
        made["bias"] = 0.5 * normal(channels)
    if activation == "prelu":
        made["slope"] = 0.05 + normal(channels).abs()
    if residual:
        made["residual"] = normal(*size)
    if norm == "fixed":
        made["running_mean"] = normal(channels)
        made["running_var"] = 0.5 + normal(channels).abs()
    return made


def torch_norm_act(
    x: torch.Tensor,
    norm: str,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    slope: Any = 0.01,
    order: str = "norm_act",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in torch's functions."""

    def act(x: torch.Tensor) -> torch.Tensor:
        if activation == "prelu":
            if norm == "layer":  # torch's channels are axis 1
                return F.prelu(x.movedim(-1, 1), slope).movedim(1, -1)
            return F.prelu(x, slope)
        if activation == "leaky_relu":
            return F.leaky_relu(x, slope)
        return {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu}[activation](x)

    x = act(x) if order == "act_norm" else x
    if norm == "instance":
        y = F.instance_norm(x, None, None, weight, bias, eps=eps)
    elif norm == "group":
        y = F.group_norm(x, groups, weight, bias, eps)
    elif norm == "layer":
        y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y if order == "act_norm" else act(y)


def gradients(
    function: Callable[..., torch.Tensor],
    values: dict[str, torch.Tensor],
    arguments: dict[str, Any],
    trained: Sequence[str],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, torch.Tensor]:
    """{"y": y, name: gradient} of `function` in `dtype`, for one fixed gradient of y."""
    given = {name: value.to(dtype, copy=True) for name, value in values.items()}
    if layout is not torch.contiguous_format:
        for name in ("x", "residual"):
            if name in given:
                given[name] = given[name].to(memory_format=layout)
    inputs = leaves(given, trained)
    y = function(**given, **arguments)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(y, inputs, grad_y) if inputs else ()
    return {"y": y.detach(), **dict(zip(trained, found, strict=True))}


def check(
    values: dict[str, torch.Tensor],
    arguments: dict[str, Any],
    trained: Sequence[str],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    """The error rule: twice torch's error for y, three times for gradients."""
    # What the low precision makes of the inputs is not the op's error.
    values = {name: value.to(dtype).double() for name, value in values.items()}
    exact = gradients(reference.norm_act, values, arguments, trained, torch.float64)
    # With x: torch 2.13 crashes in a group norm's backward that wants the weight's gradient alone.
    with_x = [*trained, *({"x"} - set(trained))]
    same = gradients(torch_norm_act, values, arguments, with_x, dtype, layout)
    ours = gradients(norm_act, values, arguments, trained, dtype, layout)
    for name, value in exact.items():
        factor = 2.0 if name == "y" else 3.0
        assert_twice_torch(ours[name], same[name], value, factor, name)
