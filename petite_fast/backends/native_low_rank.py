"""Products of convolutions with few rows on the native CPU kernel of csrc/cpu/low_rank.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petite_fast.backends import eager, native
from petite_fast.backends.geometry import ConvGeometry

MAX_RANK = 32
DTYPES = (torch.float32, torch.bfloat16)
_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fits(kernel: Sequence[int], stride: Sequence[int], r: int) -> bool:
    """Whether there is a kernel for r rows of such a convolution without groups or dilation."""
    return max(kernel) <= 3 and max(stride) <= 2 and 0 < r <= MAX_RANK


def _can_run(
    lora_A: torch.Tensor, stride: Sequence[int], *tensors: torch.Tensor | None
) -> tuple[bool, str]:
    if not fits(lora_A.shape[2:], stride, lora_A.shape[0]):
        size = tuple(lora_A.shape)
        return False, f"no kernel for a weight of {size} with stride {tuple(stride)}"
    return native.takes(DTYPES, lora_A, *tensors)


def can_run_low_rank_input(
    x: torch.Tensor, lora_A: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[bool, str]:
    """Whether `low_rank_input` takes these arguments, and why not."""
    return _can_run(lora_A, stride, x)


def low_rank_input(
    x: torch.Tensor, lora_A: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    """As `eager.low_rank_input`; only for what `can_run_low_rank_input` accepts."""
    r, channels, *kernel = lora_A.shape
    size = ConvGeometry.of_weight_op(stride, padding).output_size(x.shape[2:], kernel)
    layout = eager.conv_layout(x, lora_A)
    t = torch.empty((x.shape[0], r, *size), dtype=x.dtype, memory_format=layout)
    shape = ((x.shape[0], channels, r, r), x.shape[2:], size, kernel, stride, padding)
    _run(shape, x=x, t=t, a=_factors(lora_A))
    return t


def can_run_low_rank_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    want_A: bool,
    want_B: bool,
    want_bias: bool,
) -> tuple[bool, str]:
    """Whether `low_rank_gradient` takes these arguments, and why not."""
    return _can_run(lora_A, stride, grad_y, x, t)


def low_rank_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    want_A: bool,
    want_B: bool,
    want_bias: bool,
) -> _Gradients:
    """As `eager.low_rank_gradient`; only for what `can_run_low_rank_gradient` accepts."""
    r, channels, *kernel = lora_A.shape
    makes_t = want_B and t is None
    grad_a = torch.empty(lora_A.shape if want_A else 0)
    grad_b = torch.empty((grad_y.shape[1], r) if want_B else 0)
    grad_bias = torch.empty(grad_y.shape[1] if want_bias else 0)
    sizes = (grad_y.shape[0], channels, grad_y.shape[1], r)
    output = grad_y.shape[2:]
    shape: Any = (sizes, output, output, (1, 1, 1), (1, 1, 1), (0, 0, 0))
    if want_A or makes_t:
        assert x is not None
        shape = (sizes, x.shape[2:], output, kernel, stride, padding)
    finite = _run(
        shape,
        x=x if want_A or makes_t else None,
        grad_y=grad_y,
        t=t if want_B else None,
        a=_factors(lora_A) if makes_t else None,
        b=lora_B.float().contiguous() if want_A and lora_B is not None else None,
        grad_a=grad_a if want_A else None,
        grad_b=grad_b if want_B else None,
        grad_bias=grad_bias if want_bias else None,
    )
    if not finite:  # An infinity in x or grad_y spreads further than it does in torch.
        return eager.low_rank_gradient(
            grad_y, x, t, lora_A, lora_B, stride, padding, want_A, want_B, want_bias
        )
    return grad_a, grad_b, grad_bias


def _factors(weight: torch.Tensor) -> torch.Tensor:
    """[r, C, k] -> [C * k, r] in float32."""
    return weight.float().flatten(1).t().contiguous()


def _run(shape: Any, **tensors: torch.Tensor | None) -> bool:
    """Call the kernel; whether the gradients are finite."""
    module, _ = native._load()
    threads = torch.get_num_threads()
    workspace = torch.empty(module.low_rank_workspace(shape, threads))
    volumes = [_volume(tensors.get(name)) for name in ("x", "grad_y", "t")]
    names = ("a", "b", "grad_a", "grad_b", "grad_bias")
    operands = [native._operand(tensors.get(name)) for name in names]
    arguments = [(native._operand(t), last) for t, last in volumes]
    finite: bool = module.low_rank(
        shape, *arguments, *operands, native._operand(workspace), threads
    )
    return finite


def _volume(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
    """The tensor, dense, and whether its channels are last in memory."""
    if tensor is None or tensor.is_contiguous():
        return tensor, False
    if tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return tensor, True
    return tensor.contiguous(), False
