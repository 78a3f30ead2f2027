"""The oracle: every op as a few lines of plain PyTorch, differentiable any number of times.

Tests compare the ops with these functions in float64; nothing else uses them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from petite_fast.backends.geometry import make_geometry, pad_input


def effective_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scale: float = 1.0,
    gamma: torch.Tensor | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> torch.Tensor:
    """W_eff = gamma * (W + scale * B.A), shapes as in `petite_fast.ops.effective_weight`."""
    if lora_A is not None and lora_B is not None:
        if transposed:
            low_rank = torch.einsum("qc,q...->c...", lora_A.flatten(1), lora_B)
        else:
            low_rank = torch.einsum("oq,q...->o...", lora_B, lora_A)
        weight = weight + scale * low_rank
    if gamma is not None:
        if transposed:
            per_group = gamma.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (weight.unflatten(0, (groups, -1)) * per_group).flatten(0, 1)
        else:
            weight = weight * gamma.view(-1, *[1] * (weight.dim() - 1))
    return weight


def effective_bias(
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """b_eff = gamma * b + beta."""
    if bias is not None and gamma is not None:
        bias = gamma * bias
    if beta is None:
        return bias
    return beta if bias is None else bias + beta


def adapted_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scale: float = 1.0,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """y = conv(x, W_eff, b_eff); arguments as in `petite_fast.ops.adapted_conv`."""
    g = make_geometry(
        weight.shape[2:], stride, padding, dilation, groups, transposed, output_padding,
        padding_mode,
    )  # fmt: skip
    w = effective_weight(weight, lora_A, lora_B, scale, gamma, groups=groups, transposed=transposed)
    b = effective_bias(bias, gamma, beta)
    if transposed:
        return F.conv_transpose3d(
            x, w, b, g.stride, g.padding, g.output_padding, groups, g.dilation
        )
    return F.conv3d(pad_input(x, g), w, b, g.stride, g.padding, g.dilation, groups)


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scale: float = 1.0,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W_eff^T + b_eff; arguments as in `petite_fast.ops.adapted_linear`."""
    w = effective_weight(weight, lora_A, lora_B, scale, gamma)
    return F.linear(x, w, effective_bias(bias, gamma, beta))


def quantise(x: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes floor(127 x / scale + u) and scales max |x|, per block; x contiguous.

    `uniform` has one number for every element of the blocks, [blocks, 256].
    """
    blocks, length = uniform.shape
    rows = F.pad(x.flatten(), (0, blocks * length - x.numel())).view(blocks, length)
    scales = rows.abs().amax(1)
    levels = 127 * rows / scales.where(scales > 0, 1.0).unsqueeze(1)
    return (levels + uniform).floor().clamp(-127, 127).flatten(), scales


def scale_shift(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, channel_dim: int = 1
) -> torch.Tensor:
    """y = gamma * x + beta per channel."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return x * gamma.view(shape) + beta.view(shape)


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str = "gelu",
    channel_dim: int = -1,
) -> torch.Tensor:
    """y = x + Wu act(Wd x + bd) + bu on the channel axis."""
    tokens = x.movedim(channel_dim, -1)
    hidden = F.linear(tokens, down_weight, down_bias)
    hidden = F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
    return x + F.linear(hidden, up_weight, up_bias).movedim(-1, channel_dim)


def norm_act(
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
    slope: float | torch.Tensor = 0.01,
    order: str = "norm_act",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(norm(x) + residual) or norm(act(x)); arguments as in `petite_fast.ops.norm_act`."""
    axis = -1 if norm == "layer" else 1

    def channels(vector: torch.Tensor) -> torch.Tensor:
        shape = [1] * x.dim()
        shape[axis] = -1
        return vector.view(shape)

    def act(x: torch.Tensor) -> torch.Tensor:
        if activation == "gelu":
            return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))
        if activation == "prelu" and isinstance(slope, torch.Tensor):
            return torch.where(x > 0, x, x * channels(slope))
        factor = {"identity": 1.0, "relu": 0.0}.get(activation, slope)
        return torch.where(x > 0, x, x * factor)

    if order == "act_norm":
        x = act(x)
    grouped = x.unflatten(1, (groups, -1)) if norm == "group" else x
    axes = {"layer": [-1], "batch": [d for d in range(x.dim()) if d != 1]}
    over = axes.get(norm, list(range(2, grouped.dim())))
    if norm == "batch" and not training and running_mean is not None and running_var is not None:
        mean, var = channels(running_mean), channels(running_var)
    else:
        mean = grouped.mean(over, keepdim=True)
        var = (grouped - mean).square().mean(over, keepdim=True)
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            for running, new in ((running_mean, mean), (running_var, var * count / (count - 1))):
                running.copy_((1 - momentum) * running + momentum * new.detach().flatten())
    y = ((grouped - mean) / (var + eps).sqrt()).reshape(x.shape)
    y = y if weight is None else y * channels(weight)
    y = y if bias is None else y + channels(bias)
    y = y if residual is None else y + residual
    return y if order == "act_norm" else act(y)
