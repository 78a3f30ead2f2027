"""The native backend: kernels of csrc/, called with addresses and sizes. No autograd here.

The module is loaded at first use. Whatever keeps it from loading becomes the reason that
`available` gives; importing petite_fast never fails because of it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch  # before _native: its OpenMP runtime is the one that the kernels' loops run on

from petite_fast import settings
from petite_fast.errors import InputError

# Element-type codes of csrc/common/dtype.h.
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def _load() -> tuple[Any, str]:
    """The compiled module or None, and why there is none.

    Raises:
        InputError: PETITE_FAST_CPU_ISA names a set that this module or CPU does not have.
    """
    try:
        module = importlib.import_module("petite_fast._native")
    except ImportError as error:
        return None, f"petite_fast._native does not load: {error}"
    isa = settings.cpu_isa()
    if isa is not None:
        try:
            module.set_isa(isa)
        except ValueError as error:
            raise InputError(f"PETITE_FAST_CPU_ISA: {error}") from error
    return module, ""


def available() -> tuple[bool, str]:
    """Whether the native module is there, and why not."""
    module, reason = _load()
    return module is not None, reason


def build_info() -> dict[str, Any]:
    """Compiler, instruction sets (built, usable, in use) and CUDA part of the native module.

    Raises:
        RuntimeError: there is no native module; the text is the reason.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return dict(module.build_info())


@functools.cache
def cuda_available(device: int) -> tuple[bool, str]:
    """Whether the native CUDA kernels run on this device, and why not."""
    module, reason = _load()
    if module is None:
        return False, reason
    if not module.build_info()["cuda"]:
        return False, "petite_fast was built without nvcc"
    with torch.cuda.device(device):
        reason = module.cuda_why_not(device)
    return not reason, reason


def takes(dtypes: Sequence[torch.dtype], *tensors: torch.Tensor | None) -> tuple[bool, str]:
    """Whether CPU kernels for these dtypes can take these tensors, and why not."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return False, f"no kernel for device {tensor.device.type!r}"
        if tensor.dtype not in dtypes:
            return False, f"no kernel for {tensor.dtype}"
        if tensor.numel() == 0:
            return False, "a tensor is empty"
    return available()


def can_run_effective_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scale: float,
    gamma: torch.Tensor | None,
    groups: int,
    transposed: bool,
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Whether `effective_weight` takes these arguments, and why not."""
    device = weight.device
    if device.type == "cuda":
        if settings.backend() != "native":
            return False, "not measured yet; PETITE_FAST_BACKEND=native takes it"
        possible, reason = cuda_available(device.index)
    elif device.type == "cpu":
        possible, reason = available()
    else:
        return False, f"no kernel for device {device.type!r}"
    if not possible:
        return False, reason
    if weight.numel() == 0:
        return False, "the weight is empty"
    if dtype not in _CODES:
        return False, f"no kernel for {dtype}"
    for name, tensor in (
        ("weight", weight),
        ("lora_A", lora_A),
        ("lora_B", lora_B),
        ("gamma", gamma),
    ):
        if tensor is None:
            continue
        if tensor.device != device:
            return False, f"{name} is on {tensor.device}, weight on {device}"
        if tensor.dtype not in _CODES:
            return False, f"no kernel for {name} of {tensor.dtype}"
        if not tensor.is_contiguous():
            return False, f"{name} is not contiguous"
    return True, ""


def effective_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scale: float,
    gamma: torch.Tensor | None,
    groups: int,
    transposed: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W_eff = gamma * (W + scale * B.A), in float32 (float64 for float64), rounded once.

    Only for arguments that `can_run_effective_weight` accepts.
    """
    module, _ = _load()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    first, second, *kernel = weight.shape
    inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
    taps = 1
    for size in kernel:
        taps *= size
    arguments = (
        _operand(weight), _operand(lora_A), _operand(lora_B), _operand(gamma), _operand(out),
        inputs, outputs, groups, (taps, 1, 1), 0 if lora_A is None else lora_A.shape[0],
        scale, transposed,
    )  # fmt: skip
    if weight.is_cuda:
        index = weight.device.index
        with torch.cuda.device(index):
            stream = torch.cuda.current_stream(index).cuda_stream
            module.effective_weight_cuda(*arguments, index, stream)
    else:
        module.effective_weight(*arguments, torch.get_num_threads())
    return out


def _operand(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """(address, element-type code, number of elements); address 0 means absent."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), _CODES[tensor.dtype], tensor.numel()
