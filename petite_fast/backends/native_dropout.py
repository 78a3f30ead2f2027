"""Dropout on the native CPU kernel of csrc/cpu/dropout.cpp."""

from __future__ import annotations

import torch

from petite_fast.backends import native
from petite_fast.backends.eager_random import seed_keys


def can_run_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> tuple[bool, str]:
    """Whether `dropout` takes these arguments, and why not."""
    return native.takes((torch.float32, torch.bfloat16, torch.float16), x)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """As `eager_random.dropout`; only for what `can_run_dropout` accepts."""
    module, _ = native._load()
    out = torch.empty_like(x)
    module.dropout(
        native._operand(x), native._operand(out), p, seed_keys(int(seed)), torch.get_num_threads()
    )
    return out
