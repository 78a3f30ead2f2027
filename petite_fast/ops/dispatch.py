"""Which backend runs an op: an ordered walk, with a reason for every refusal."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from petite_fast import settings
from petite_fast.backends import (
    cuda_conv,
    cuda_depthwise,
    cuda_norm_act,
    eager,
    native,
    native_bottleneck,
    native_compress,
    native_depthwise,
    native_dropout,
    native_low_rank,
    native_norm_act,
    native_shuffle,
    native_stem,
    triton,
)
from petite_fast.backends.triton import special_conv

Predicate = Callable[..., tuple[bool, str]]

logger = logging.getLogger("petite_fast")

# op -> backends that implement it, fastest first: (name, predicate, function). The predicate
# takes the function's own arguments. Eager is last, takes everything, and has no predicate.
_TABLE: dict[str, list[tuple[str, Predicate, Callable[..., Any]]]] = {
    "conv": [
        ("triton", special_conv.can_run_shuffle, special_conv.shuffle),
        ("triton", special_conv.can_run_few_channels, special_conv.few_channels),
        ("triton", triton.can_run_conv, triton.conv_forward),
        ("native", cuda_depthwise.can_run_conv, cuda_depthwise.conv),
        ("native", cuda_conv.can_run_conv, cuda_conv.conv),
        ("native", native_depthwise.can_run_conv, native_depthwise.conv),
        ("native", native_shuffle.can_run_conv, native_shuffle.conv),
        ("native", native_stem.can_run_conv, native_stem.conv),
    ],
    "conv_grad_input": [
        (
            "triton",
            special_conv.can_run_shuffle_grad_input,
            special_conv.shuffle_grad_input,
        ),
        (
            "triton",
            special_conv.can_run_few_channels_grad_input,
            special_conv.few_channels_grad_input,
        ),
        ("triton", triton.can_run_conv_grad_input, triton.conv_grad_input),
        ("native", cuda_depthwise.can_run_conv_grad_input, cuda_depthwise.conv_grad_input),
        ("native", cuda_conv.can_run_conv_grad_input, cuda_conv.conv_grad_input),
        ("native", native_depthwise.can_run_conv_grad_input, native_depthwise.conv_grad_input),
        ("native", native_shuffle.can_run_conv_grad_input, native_shuffle.conv_grad_input),
        ("native", native_stem.can_run_conv_grad_input, native_stem.conv_grad_input),
    ],
    "conv_grad_weight": [
        ("native", cuda_depthwise.can_run_conv_grad_weight, cuda_depthwise.conv_grad_weight),
        ("native", native_depthwise.can_run_conv_grad_weight, native_depthwise.conv_grad_weight),
        ("native", native_shuffle.can_run_conv_grad_weight, native_shuffle.conv_grad_weight),
        ("native", native_stem.can_run_conv_grad_weight, native_stem.conv_grad_weight),
    ],
    "effective_weight": [
        ("native", native.can_run_effective_weight, native.effective_weight),
    ],
    "bottleneck": [
        ("triton", triton.can_run_bottleneck, triton.bottleneck_forward),
        ("native", native_bottleneck.can_run_bottleneck, native_bottleneck.bottleneck),
    ],
    "bottleneck_backward": [
        ("triton", triton.can_run_bottleneck_backward, triton.bottleneck_backward),
        (
            "native",
            native_bottleneck.can_run_bottleneck_backward,
            native_bottleneck.bottleneck_backward,
        ),
    ],
    "quantise": [
        ("triton", triton.can_run_quantise, triton.quantise),
        ("native", native_compress.can_run_quantise, native_compress.quantise),
    ],
    "dequantise": [
        ("triton", triton.can_run_dequantise, triton.dequantise),
        ("native", native_compress.can_run_dequantise, native_compress.dequantise),
    ],
    "dropout": [
        ("triton", triton.can_run_dropout, triton.dropout),
        ("native", native_dropout.can_run_dropout, native_dropout.dropout),
    ],
    "low_rank_input": [
        ("native", native_low_rank.can_run_low_rank_input, native_low_rank.low_rank_input),
    ],
    "low_rank_gradient": [
        ("triton", triton.can_run_low_rank_gradient, triton.low_rank_gradient),
        ("native", native_low_rank.can_run_low_rank_gradient, native_low_rank.low_rank_gradient),
    ],
    "norm_act": [
        ("native", native_norm_act.can_run_norm_act, native_norm_act.norm_act),
        ("native", cuda_norm_act.can_run_norm_act, cuda_norm_act.norm_act),
    ],
    "norm_act_backward": [
        ("native", native_norm_act.can_run_norm_act_backward, native_norm_act.norm_act_backward),
        ("native", cuda_norm_act.can_run_norm_act_backward, cuda_norm_act.norm_act_backward),
    ],
    "pack_signs": [
        ("native", native_norm_act.can_run_pack_signs, native_norm_act.pack_signs),
        ("native", cuda_norm_act.can_run_pack_signs, cuda_norm_act.pack_signs),
    ],
    "unpack_signs": [
        ("native", native_norm_act.can_run_unpack_signs, native_norm_act.unpack_signs),
        ("native", cuda_norm_act.can_run_unpack_signs, cuda_norm_act.unpack_signs),
    ],
}


class Decision(NamedTuple):
    """One way in which an op was run.

    Attributes:
        op: its name.
        arguments: sizes of its tensors and the other numbers, as text.
        backend: that ran it.
        refusals: "backend: reason" of those that were asked first.
    """

    op: str
    arguments: str
    backend: str
    refusals: tuple[str, ...]


_explaining: Counter[Decision] | None = None


@contextlib.contextmanager
def explaining() -> Iterator[Counter[Decision]]:
    """Count the decisions that are made inside, in all threads."""
    global _explaining
    before, _explaining = _explaining, Counter()
    try:
        yield _explaining
    finally:
        _explaining = before


def runs_native() -> bool:
    """Whether the native module is there and may be used. A graph being compiled does not ask."""
    if torch.compiler.is_compiling():
        return False
    return settings.backend() in (None, "native") and native.available()[0]


def choose(op: str, *args: Any) -> Callable[..., Any]:
    """The function that runs `op` on `args`.

    With PETITE_FAST_BACKEND set, that backend or an error. What it has no kernel for (an op, a
    dtype, a geometry) runs on eager; where it is not there at all, there is an error.

    Raises:
        RuntimeError: the forced backend cannot run; the text is its reason.
    """
    forced = settings.backend()
    refusals = []
    chosen, chosen_function = "eager", getattr(eager, op)
    for name, can_run, function in _TABLE.get(op, []):
        if forced not in (None, name):
            continue
        possible, reason = can_run(*args)
        if possible:
            chosen, chosen_function = name, function
            break
        if forced and not _is_there(name, args[0]):
            raise RuntimeError(f"{op}: backend {name!r} was forced and cannot run: {reason}")
        refusals.append(f"{name}: {reason}")
        logger.debug("%s: not on %s: %s", op, name, reason)
    if _explaining is not None:
        arguments = " ".join(filter(None, map(_text, args)))
        _explaining[Decision(op, arguments, chosen, tuple(refusals))] += 1
    result: Callable[..., Any] = chosen_function
    return result


def _is_there(backend: str, tensor: torch.Tensor) -> bool:
    """Whether a backend has kernels here for the tensor's device."""
    if backend == "native":
        return native.available()[0]
    return tensor.is_cuda and triton.available(tensor.device.index)[0]


def _text(argument: Any) -> str:
    """An argument in few words; nothing for what is absent."""
    if isinstance(argument, torch.Tensor):
        return "x".join(map(str, argument.shape)) or "scalar"
    if isinstance(argument, (list, tuple)):
        return ",".join(map(str, argument))
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    return "" if argument is None else str(argument)
