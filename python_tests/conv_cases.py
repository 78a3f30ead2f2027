"""Geometries and the error rule that all op tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """One convolution: channels, kernel, input size, geometry."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, int, int]
    size: tuple[int, int, int]
    geometry: dict[str, Any]
    batch: int = 2
    r: int = 3


CASES = [
    Case("k3", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1}),
    Case("k3-batch1", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1}, batch=1),
    Case("k3-valid", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": "valid"}),
    Case("k1", 4, 6, (1, 1, 1), (3, 4, 5), {}),
    Case("k2-same", 4, 6, (2, 2, 2), (5, 6, 7), {"padding": "same"}),
    Case("k133-s122", 4, 6, (1, 3, 3), (5, 6, 7), {"padding": (0, 1, 1), "stride": (1, 2, 2)}),
    Case("k3-s2", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1, "stride": 2}),
    Case("k16-s16", 2, 6, (16, 16, 16), (16, 16, 32), {"stride": 16}),
    Case("dilated", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 2, "dilation": 2}),
    Case("groups", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 1, "groups": 2}),
    Case("depthwise", 4, 4, (3, 3, 3), (5, 6, 7), {"padding": 1, "groups": 4}),
    Case("depthwise-s2", 4, 4, (3, 3, 3), (5, 6, 7), {"padding": 1, "groups": 4, "stride": 2}),
    Case("reflect", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": (1, 2, 1), "padding_mode": "reflect"}),
    Case("replicate", 4, 6, (3, 3, 3), (5, 6, 7), {"padding": 2, "padding_mode": "replicate"}),
    Case("circular", 4, 6, (2, 3, 4), (5, 6, 7), {"padding": "same", "padding_mode": "circular"}),
    Case("transposed-k2s2", 4, 6, (2, 2, 2), (3, 4, 5), {"transposed": True, "stride": 2}),
    Case(
        "transposed-k3s2-groups", 4, 6, (3, 3, 3), (3, 4, 5),
        {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    ),
    Case(
        "transposed-depthwise", 4, 4, (3, 3, 3), (3, 4, 5),
        {"transposed": True, "padding": 1, "dilation": 2, "groups": 4},
    ),
]  # fmt: skip


def conv_tensors(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """x, weight, bias, lora_A, lora_B, gamma, beta for a case, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = case.geometry.get("groups", 1)
    c, o, r, k = case.inputs, case.outputs, case.r, case.kernel
    transposed = case.geometry.get("transposed", False)
    fan_in = c // groups * math.prod(k)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    gain = fan_in**-0.5
    tensors = {
        "x": normal(case.batch, c, *case.size),
        "weight": normal(*((c, o // groups) if transposed else (o, c // groups)), *k, scale=gain),
        "bias": normal(o, scale=0.1),
        "lora_A": normal(*((r, c, 1, 1, 1) if transposed else (r, c // groups, *k)), scale=gain),
        "lora_B": normal(*((r, o // groups, *k) if transposed else (o, r)), scale=0.5),
        "gamma": 0.5 + torch.rand(o, generator=generator, dtype=torch.float64),
        "beta": normal(o, scale=0.1),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def assert_twice_torch(
    ours: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 2.0,
    name: str = "output",
) -> None:
    """|ours - exact| <= factor * |torch - exact| in the largest norm, plus a floor of 4 ulp.

    What torch itself gets NaN or infinite adds nothing to its error: oneDNN's bfloat16 convolutions
    of a few voxels read memory that nobody wrote.
    """
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, wanted {exact.shape}"
    if exact.numel() == 0:
        return
    ours, torch_same_dtype, exact = ours.detach(), torch_same_dtype.detach(), exact.detach()
    error = (ours.double() - exact).abs()
    torch_error = (torch_same_dtype.double() - exact).abs()
    allowed = factor * torch_error.nan_to_num(0.0, 0.0).max()
    floor = 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
    worst = int(error.argmax())
    cosine = torch.nn.functional.cosine_similarity(ours.double().flatten(), exact.flatten(), dim=0)
    assert float(error.max()) <= float(allowed + floor), (
        f"{name}: error {float(error.max()):.3e} at flat index {worst} (ours"
        f" {ours.flatten()[worst]}, exact {exact.flatten()[worst]}), allowed"
        f" {float(allowed + floor):.3e}, cosine {float(cosine):.6f}"
    )


def leaves(tensors: dict[str, torch.Tensor], trained: Sequence[str]) -> list[torch.Tensor]:
    """Those tensors as fresh leaves that require grad; the others do not."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().requires_grad_(name in trained)
    return [tensors[name] for name in trained]
