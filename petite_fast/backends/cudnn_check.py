"""Whether cuDNN's 3-D convolutions are right on a device: looked at once, and a way round them.

Some releases were not (cuDNN 9.8 to 9.15, by device and dtype: pytorch#163539, pytorch#167024). So
the first convolution of a dtype on a device is preceded by a small one, forward and both
gradients, compared with float64 on the CPU. Where that is wrong, convolutions of that dtype run
with cuDNN off, and there is one warning. What is wrong for large volumes only is not found.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

Convolve = Callable[..., tuple[torch.Tensor, ...]]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
BATCH, INPUTS, OUTPUTS, SIDE, KERNEL = 2, 16, 24, 9, 3

logger = logging.getLogger("petite_fast")
_right: dict[tuple[int, torch.dtype], bool] = {}  # what was found: device number and dtype
_no_cudnn = threading.Lock()


def guard(x: torch.Tensor) -> AbstractContextManager[None]:
    """The context in which convolutions of x are right: cuDNN off where it is not to be trusted."""
    if x.device.type != "cuda" or x.dtype not in DTYPES or is_right(x.device, x.dtype):
        return contextlib.nullcontext()
    return without_cudnn()


def is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN's convolutions of a dtype are right on a CUDA device.

    Where it cannot be looked at (no memory, or a graph is being captured) the answer is yes, and
    the next call looks again.
    """
    key = (device.index, dtype)
    known = _right.get(key)
    if known is not None:
        return known
    if not torch.backends.cudnn.enabled or torch.cuda.is_current_stream_capturing():
        return True
    try:
        wrong = find_wrong(device, dtype)
    except torch.OutOfMemoryError:
        return True
    if wrong:
        logger.warning(
            "cuDNN %s computes 3-D convolutions of %s wrongly on %s (%s): they run without cuDNN,"
            " slower; another release of torch brings another cuDNN",
            torch.backends.cudnn.version(), str(dtype)[6:], device, ", ".join(wrong),
        )  # fmt: skip
    _right[key] = not wrong
    return not wrong


def find_wrong(
    device: torch.device, dtype: torch.dtype, convolve: Convolve | None = None
) -> list[str]:
    """Which of y, grad_x and grad_weight of a small convolution are wrong, in either layout.

    Wrong is an error above what rounding makes, relative to the norm: two ulp, for float32 those of
    TensorFloat-32 with room; or a call that fails.

    Args:
        device: where the convolution runs.
        dtype: of its tensors.
        convolve: what is asked, by default torch; see `convolution`.
    """
    most = max(2 * torch.finfo(dtype).eps, 2**-8)
    generator = torch.Generator().manual_seed(0)  # the user's random numbers stay theirs
    sizes = (
        (BATCH, INPUTS, SIDE, SIDE, SIDE), (OUTPUTS, INPUTS, KERNEL, KERNEL, KERNEL), (OUTPUTS,),
        (BATCH, OUTPUTS, SIDE, SIDE, SIDE),
    )  # fmt: skip
    tensors = [
        torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
        for size in sizes
    ]
    wrong = []
    with torch.no_grad():
        exact = convolution(*(tensor.double() for tensor in tensors))
        for layout in LAYOUTS:
            moved = [
                tensor.to(device).contiguous(memory_format=layout)
                if tensor.dim() == 5
                else tensor.to(device)
                for tensor in tensors
            ]
            try:
                results = (convolve or convolution)(*moved)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                wrong.append(str(error).splitlines()[0])
                continue
            where = "channels-last" if layout == torch.channels_last_3d else "contiguous"
            for name, one, other in zip(
                ("y", "grad_x", "grad_weight"), results, exact, strict=True
            ):
                error_norm = torch.dist(one.double().cpu(), other)
                if not bool(error_norm <= most * other.norm()):
                    wrong.append(f"{name} {where}")
    return wrong


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad_y: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """y = conv(x, weight, bias) with padding, so that y has the size of x; grad_x; grad_weight."""
    geometry = ([1] * 3, [KERNEL // 2] * 3, [1] * 3, False, [0] * 3, 1)
    y = torch.convolution(x, weight, bias, *geometry)
    grads = torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, *geometry, [True, True, False]
    )
    return y, grads[0], grads[1]


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN off inside. The switch is the process's, so one thread at a time.

    Not ``torch.backends.cudnn.flags``, which also sets the precision of float32 products.
    """
    with _no_cudnn:
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = before
