"""Which of Triton and the library is faster for a geometry on a device, and how Triton is compiled.

A geometry is measured once: the library's kernel, then a few configurations of Triton's, in order,
until a budget of seconds is spent. What came out is kept in a file of the user's cache folder, one
for each device, versions and source of the kernels, so other runs find it.

Measured is what `petite-fast info --tune` meets, and, where ``torch.backends.cudnn.benchmark`` is
on (torch's own switch for a measurement at first sight), whatever is met. Not while a graph is
captured. Nothing here imports Triton before something is measured.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from petite_fast.backends.triton.tune_cache import TIE, Cache, Config, Entry, describe

Run = Callable[[], Any]

BUDGET = 3.0  # seconds for a geometry; what is being compiled then is still measured
ROUNDING = 2**-7  # that of bfloat16, relative to the norm of a result

# Changes to what `constants` of a kernel says, the most promising first. The default is the first.
# BOXES: to what that of boxes.py says, where its kernel fits.
CONV: tuple[Config, ...] = (
    {},
    {"BOXES": 1},
    {"BOXES": 1, "num_stages": 4},
    {"num_stages": 4},
    {"ROWS": 64},
    {"num_warps": 8},
    {"ROWS": 256, "num_warps": 8},
    {"INNER": 32},
    {"num_stages": 2},
)
LOW_RANK: tuple[Config, ...] = (
    {},
    {"num_stages": 3},
    {"ROWS": 128, "num_warps": 8},
    {"num_warps": 8},
    {"ROWS": 32},
)

logger = logging.getLogger("petite_fast")


def configure(blocks: dict[str, Any], options: dict[str, Any], config: Config) -> None:
    """Put a configuration into a kernel's compile-time arguments and compiler options."""
    for name, value in config.items():
        (blocks if name in blocks else options)[name] = value


def measure(
    library: Run,
    candidates: Iterable[tuple[Config, Run]],
    timer: Callable[[Run], float],
    budget: float = BUDGET,
    clock: Callable[[], float] = time.monotonic,
) -> Entry | None:
    """Time the library and the candidates, in order; at least one of these.

    A candidate that does not compile, or whose result is not the library's, is passed over.

    Args:
        library: gives a tensor, or several; what is right.
        candidates: configurations and what runs them.
        timer: milliseconds of a function.
        budget: seconds after which no further candidate is begun.
        clock: seconds.

    Returns:
        None where nothing can be said: no memory, or a result that is not finite.
    """
    from triton.errors import TritonError

    start = clock()
    best: tuple[float, Config] | None = None
    try:
        wanted = _tensors(library())
        if not all(bool(each.isfinite().all()) for each in wanted):
            return None
        library_ms = timer(library)
        for place, (config, run) in enumerate(candidates):
            if place > 0 and clock() - start > budget:
                break
            try:
                result = _tensors(run())
            except TritonError as error:
                logger.debug("tuning: %s: %s", config, error)
                continue
            if not _is_same(result, wanted):
                logger.warning("tuning: a Triton kernel (%s) is wrong here and not taken", config)
                continue
            ms = timer(run)
            if best is None or ms < TIE * best[0]:
                best = ms, config
    except torch.OutOfMemoryError:
        return None
    return Entry(library_ms, *(best or (None, {})))


def _tensors(result: Any) -> list[torch.Tensor]:
    every = [result] if isinstance(result, torch.Tensor) else list(result)
    return [each for each in every if each.numel() > 0]


def _is_same(result: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Up to rounding, as both have rounded."""
    return all(
        bool(torch.dist(one.float(), other.float()) <= ROUNDING * other.float().norm())
        for one, other in zip(result, wanted, strict=True)
    )


def cuda_timer(run: Run) -> float:
    """Median milliseconds of a function on the current CUDA device, with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))


@functools.cache
def cache_of(device: int) -> Cache:
    """The cache of CUDA device number `device`."""
    return Cache(describe(device))


_measuring = threading.Lock()


def find(
    op: str,
    args: Sequence[Any],
    library: Run,
    candidates: Callable[[], Iterable[tuple[Config, Run]]],
    timer: Callable[[Run], float] = cuda_timer,
) -> Entry | None:
    """The entry of `op` for arguments of this geometry: kept, or measured if that is wanted."""
    device = args[0].device
    cache = cache_of(device.index)
    if not cache.entries and not _may_measure():
        return None  # nobody has tuned: the key, which every call would make, is not needed
    key = geometry_key(op, args)
    entry = cache.entries.get(key)
    if entry is not None or key in cache.passed_over or not _may_measure():
        return entry
    with _measuring, torch.cuda.device(device), torch.no_grad():
        entry = measure(library, candidates(), timer)
    if entry is None:
        cache.passed_over.add(key)
    else:
        cache.put(key, entry)
    return entry


def _may_measure() -> bool:
    return torch.backends.cudnn.benchmark and not torch.cuda.is_current_stream_capturing()


def geometry_key(op: str, args: Sequence[Any]) -> str:
    """All that a kernel is compiled for and its time depends on, as text."""
    from petite_fast.backends.triton.conv import dot_precision

    words = [op, dot_precision(args[0].dtype)]
    for each in args:
        if isinstance(each, torch.Tensor):
            words.append(f"{str(each.dtype)[6:]}[{'x'.join(map(str, each.shape))}]")
        elif isinstance(each, (list, tuple)):
            words.append(",".join(map(str, each)))
        else:
            words.append(str(each))
    return " ".join(words)
