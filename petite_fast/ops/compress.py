"""8-bit storage of what autograd keeps: a block-wise quantiser, and the mode that switches it on.

    scale = max |x| of 256 elements in memory order
    code  = floor(127 x / scale + u), u uniform on [0, 1)        x ~ code / 127 * scale

Rounding is stochastic, so E[code / 127 * scale] = x: a gradient that is linear in what was kept
has the exact gradient as its expectation. It costs 1 + 4/256 bytes per element.

Source: ActNN (Chen et al., ICML 2021) for stochastic rounding of activations; the block-wise
absolute maximum is that of 8-bit optimisers (Dettmers et al., ICLR 2022).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from petite_fast.backends.eager_random import BLOCK, block_count
from petite_fast.ops import library

MODES = ("exact", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = 4096  # elements: below, the call costs more than the memory is worth

_thread = threading.local()  # mode: str; packed: tensor -> _Packed


def quantise(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of x in blocks of 256 elements, rounded stochastically.

    ``scale = max |x|`` of a block, ``code = floor(127 x / scale + u)``, u uniform on [0, 1), a hash
    of the seed and of the element's place in memory: the same bits on every backend and with any
    number of threads. ``E[dequantise(quantise(x))] = x`` over seeds, and each element comes back
    within ``scale / 127``, a zero as zero. A block that holds an infinity or a NaN comes back as
    NaN, all of it. Not differentiable.

    Args:
        x: float32, bfloat16 or float16, of any shape. A dense tensor of any memory format is read
            in memory order; another is made contiguous first.
        seed: 0 to 2^63 - 1.

    Returns:
        codes int8, [256 * blocks], -127 to 127, zeros behind the last element; scales float32,
        [blocks].

    Raises:
        TypeError: another dtype (float64 has more range than a float32 scale).
        ValueError: a seed outside its range.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, wanted float32, bfloat16 or float16")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, wanted 0 to 2^63 - 1")
    with torch.no_grad():
        codes, scales = library.quantise(dense(x), torch.tensor(seed, device="cpu"))
    return codes, scales


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    stride: Sequence[int] | None = None,
) -> torch.Tensor:
    """code / 127 * scale, computed in float32 and rounded once.

    Args:
        codes: as `quantise` returns them.
        scales: as `quantise` returns them.
        size: shape of the tensor that was quantised.
        dtype: float32, bfloat16 or float16.
        stride: strides of the tensor that was quantised, if it was dense but not contiguous.

    Returns:
        A new tensor of that shape and those strides.

    Raises:
        TypeError: another dtype, or codes and scales of other dtypes.
        ValueError: codes or scales of the wrong length, or strides that are not dense.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, wanted float32, bfloat16 or float16")
    meta = torch.empty(tuple(size), device="meta")
    if stride is not None:
        meta = torch.empty_strided(tuple(size), tuple(stride), device="meta")
        if dense(meta) is not meta:
            raise ValueError(f"stride: got {tuple(stride)}, wanted strides without gaps or overlap")
    blocks = block_count(meta.numel())
    for name, tensor, kind, length in (
        ("codes", codes, torch.int8, blocks * BLOCK),
        ("scales", scales, torch.float32, blocks),
    ):
        if tensor.dtype != kind:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted {kind}")
        if tuple(tensor.shape) != (length,):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted ({length},)")
    with torch.no_grad():
        values: torch.Tensor = library.dequantise(
            codes.contiguous(), scales.contiguous(), meta.shape, meta.stride(), dtype
        )
    return values


def active() -> str:
    """The storage mode of this thread: "exact" or "int8"."""
    mode: str = getattr(_thread, "mode", "exact")
    return mode


@contextlib.contextmanager
def storage(mode: str) -> Iterator[None]:
    """What the ops called inside keep for backward: "exact" tensors, or "int8" codes.

    It is the forward that counts; the backward may run outside. The mode belongs to the thread.
    A region under torch.utils.checkpoint is computed again in backward, and must find the same
    mode there: enter `storage` inside the region, or give checkpoint
    ``context_fn=lambda: (contextlib.nullcontext(), storage("int8"))``.

    In "int8" every kept tensor draws one seed from torch's CPU generator, so torch.manual_seed
    makes a run reproducible. A replayed CUDA graph repeats the seeds of its capture.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, wanted one of {MODES}")
    before = active()
    _thread.mode = mode
    try:
        yield
    finally:
        _thread.mode = before


class Packing(NamedTuple):
    """What is needed besides codes and scales to make the tensor again."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


Kept = tuple[torch.Tensor, torch.Tensor | None]


class _Packed(NamedTuple):
    """The codes that somebody keeps of a tensor, and its version when they were made."""

    version: int
    codes: TensorWeakRef
    scales: TensorWeakRef
    packing: Packing


def keep(tensor: torch.Tensor) -> tuple[Kept, Packing | None]:
    """What a Function saves in a tensor's place, as the storage mode of this thread says.

    In forward ``kept, ctx.packing = keep(x)`` and ``ctx.save_for_backward(*kept, ...)``; in
    backward ``first, second, ... = ctx.saved_tensors`` and
    ``x = restore((first, second), ctx.packing)``, as late as possible, for it makes a new tensor
    of the size of x. Call it only where a backward can follow: it does not look at the grad mode.

    "exact", and for parameters, float64, integers and tensors under 4096 elements always: the
    tensor itself and None. "int8": codes and scales. The same tensor object, unmodified, that is
    kept again while its codes are still alive (the output of a norm is the input of the next
    convolution) gives the same codes, which then count once. Not so under torch.compile, where
    each keeps its own.

    Returns:
        (two tensors, the second of which may be None), and the record for `restore`.
    """
    if (
        active() == "exact"
        or tensor.dtype not in DTYPES
        or tensor.numel() < SMALLEST
        or isinstance(tensor, torch.nn.Parameter)
    ):
        return (tensor, None), None
    # Drawn even when the codes exist: a checkpointed region that is computed again, where they may
    # not, must find the generator in the same state after it.
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    # A tensor made in inference mode has no version that would tell of modifications.
    shareable = not torch.compiler.is_compiling() and not tensor.is_inference()
    if shareable:
        packed = _packed().get(tensor)
        if packed is not None and packed.version == tensor._version:
            codes, scales = packed.codes(), packed.scales()
            if codes is not None and scales is not None:
                return (codes, scales), packed.packing
    values = dense(tensor)
    packing = Packing(values.shape, values.stride(), values.dtype)
    codes, scales = library.quantise(values, seed)
    if shareable:
        _packed()[tensor] = _Packed(
            tensor._version, TensorWeakRef(codes), TensorWeakRef(scales), packing
        )
    return (codes, scales), packing


def restore(kept: tuple[Any, Any], packing: Packing | None) -> torch.Tensor:
    """The tensor that `keep` was given, exactly or within a rounding; the record is `keep`'s."""
    if packing is None:
        tensor: torch.Tensor = kept[0]
    else:
        tensor = library.dequantise(*kept, *packing)
    return tensor


def _packed() -> Any:
    """This thread's codes by tensor. Weak on both sides: it keeps neither alive."""
    if not hasattr(_thread, "packed"):
        _thread.packed = WeakTensorKeyDictionary()
    return _thread.packed


def dense(x: torch.Tensor) -> torch.Tensor:
    """x if its elements fill a piece of memory without gaps or overlap, else a contiguous copy."""
    if x.is_contiguous():
        return x
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    return x if x.permute(order).is_contiguous() else x.contiguous()
