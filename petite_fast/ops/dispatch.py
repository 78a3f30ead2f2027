"""Which backend runs an op: an ordered walk, with a reason for every refusal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from petite_fast import settings
from petite_fast.backends import (
    eager,
    native,
    native_compress,
    native_depthwise,
    native_dropout,
    native_norm_act,
    triton,
)

Predicate = Callable[..., tuple[bool, str]]

logger = logging.getLogger("petite_fast")

# op -> backends that implement it, fastest first: (name, predicate, function). The predicate
# takes the function's own arguments. Eager is last, takes everything, and has no predicate.
_TABLE: dict[str, list[tuple[str, Predicate, Callable[..., Any]]]] = {
    "conv": [
        ("native", native_depthwise.can_run_conv, native_depthwise.conv),
    ],
    "conv_grad_input": [
        ("native", native_depthwise.can_run_conv_grad_input, native_depthwise.conv_grad_input),
    ],
    "conv_grad_weight": [
        ("native", native_depthwise.can_run_conv_grad_weight, native_depthwise.conv_grad_weight),
    ],
    "effective_weight": [
        ("native", native.can_run_effective_weight, native.effective_weight),
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
    "norm_act": [
        ("native", native_norm_act.can_run_norm_act, native_norm_act.norm_act),
    ],
    "norm_act_backward": [
        ("native", native_norm_act.can_run_norm_act_backward, native_norm_act.norm_act_backward),
    ],
    "pack_signs": [
        ("native", native_norm_act.can_run_pack_signs, native_norm_act.pack_signs),
    ],
    "unpack_signs": [
        ("native", native_norm_act.can_run_unpack_signs, native_norm_act.unpack_signs),
    ],
}


def choose(op: str, *args: Any) -> Callable[..., Any]:
    """The function that runs `op` on `args`.

    With PETITE_FAST_BACKEND set, that backend or an error: an op that the named backend does not
    have at all runs on eager, an op that it has but cannot run on `args` raises.

    Raises:
        RuntimeError: the forced backend cannot run this call; the text is its reason.
    """
    forced = settings.backend()
    for name, can_run, function in _TABLE.get(op, []):
        if forced not in (None, name):
            continue
        possible, reason = can_run(*args)
        if possible:
            return function
        if forced:
            raise RuntimeError(f"{op}: backend {name!r} was forced and cannot run: {reason}")
        logger.debug("%s: not on %s: %s", op, name, reason)
    return getattr(eager, op)
