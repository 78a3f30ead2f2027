"""What a suite does on a GPU: the same comparison, for kernels that nobody has run there yet.

A provider of ours is looked at before it is timed: which backend ran each of its ops, and for a
single kernel whether the result is torch's. One that fails does not end the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from measure import DeviceLost, Provider, compare, failure, forced, wait

from petite_fast.backends import native, triton
from petite_fast.ops.dispatch import Decision, explaining

LAST = torch.channels_last_3d
LARGEST_ERROR = 5e-2  # in units of the largest value; bfloat16 rounds by 4e-3


def backends() -> list[str]:
    """Those of ours that have kernels for the current CUDA device."""
    index = torch.cuda.current_device()
    found = {"native": native.cuda_available, "triton": triton.available}
    return [name for name, available in found.items() if available(index)[0]]


def measured(
    label: str,
    providers: Sequence[Provider],
    device: str,
    repeats: int,
    warmup: int = 2,
    reference: str | None = None,
) -> dict[str, dict[str, Any]]:
    """`compare`, where an error of a provider becomes its `why_not`; with more about some.

    "ran" of ours: {op: {backend: calls in a step}}. A backend that is forced and runs no op has "no
    kernel" for the case.

    Args:
        label: of the case.
        providers: ours have names that begin with "ours".
        device: "cuda", or "cpu" for a test.
        repeats: see `compare`.
        warmup: see `compare`.
        reference: provider with the right result, which makes the case a single kernel: a forced
            backend must run every op of it, and "error" of each of the others is
            max |result - right| / max |right|, the largest of its tensors; above `LARGEST_ERROR`
            it is "wrong".

    Raises:
        DeviceLost: the text says by whom, and in which case.
    """
    checked, more, single, right = [], {}, reference is not None, None
    try:
        for provider in sorted(providers, key=lambda p: p.name != reference):
            if not provider.why_not and (single or provider.name.startswith("ours")):
                provider, result, more[provider.name] = _looked_at(provider, device, single, right)
                right = result if provider.name == reference else right
            checked.append(provider)
        figures = compare(checked, device, repeats, warmup, goes_on=True)
    except DeviceLost as lost:
        raise DeviceLost(f"{label}: {lost}") from lost
    return {p.name: {**figures[p.name], **more.get(p.name, {})} for p in providers}


def _looked_at(
    provider: Provider, device: str, single: bool, right: list[torch.Tensor] | None
) -> tuple[Provider, list[torch.Tensor] | None, dict[str, Any]]:
    """A step of it: with the reason why it cannot be timed; its result; what ran, and the error."""
    about: dict[str, Any] = {}
    try:
        with forced(provider.backend), explaining() as decisions:
            assert provider.forward is not None and provider.backward is not None
            y = provider.forward()
            provider.backward(y)
            wait(device)
        if decisions:
            about["ran"] = _ran(decisions)
        why_not = _no_kernel(provider.backend, decisions, single)
        result = tensors(y)
        if right is not None and not why_not:
            error = relative_error(result, right)
            about["error"] = error if math.isfinite(error) else None
            if not error <= LARGEST_ERROR:
                why_not = f"wrong: relative error {error:.2g}"
    except Exception as error:
        return provider._replace(why_not=failure(provider, error, device)), None, about
    return provider._replace(why_not=why_not), result, about


def _ran(decisions: Counter[Decision]) -> dict[str, Counter[str]]:
    """How often each backend ran an op."""
    found: dict[str, Counter[str]] = {}
    for decision, calls in decisions.items():
        found.setdefault(decision.op, Counter())[decision.backend] += calls
    return found


def _no_kernel(backend: str | None, decisions: Counter[Decision], single: bool) -> str:
    """Why a forced backend has no time of its own here, or nothing."""
    others = [decision for decision in decisions if decision.backend != backend]
    if backend in (None, "eager") or not (others if single else len(others) == len(decisions)):
        return ""
    reasons = [f"{d.op} ({'; '.join(d.refusals)})" if d.refusals else d.op for d in others]
    return f"no kernel: {', '.join(dict.fromkeys(reasons))}"


def tensors(value: Any) -> list[torch.Tensor]:
    """What a step gives, empty tensors and None left out."""
    if isinstance(value, torch.Tensor):
        return [value.detach()] if value.numel() else []
    return [tensor for each in value or () for tensor in tensors(each)]


def relative_error(result: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """max |result - right| / max |right|, the largest of all tensors; NaN where there is one."""
    errors = []
    for ours, theirs in zip(result, right, strict=True):
        one, other = ours.flatten().float(), theirs.flatten().float()
        difference, size = (one - other).abs().max().item(), other.abs().max().item()
        errors.append(difference / max(size, 1e-30))
    return math.nan if any(map(math.isnan, errors)) else max(errors)
