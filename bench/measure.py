"""Interleaved timing, saved bytes and peak allocation of a step, and the machine's ceilings."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from petite_fast.ops import saved_bytes

Step = Callable[[], Any]
FILLS = 16  # writes of 512 MiB before a step on a GPU: 2 ms at 4 TB/s


class DeviceLost(RuntimeError):
    """An error after which the GPU does nothing more for this process."""


class Provider(NamedTuple):
    """One way to do a case's step.

    `forward` returns the tensor that `backward` is called on; `why_not` is the reason when this
    provider cannot do the case at all; `backend` forces one of ours.
    """

    name: str
    forward: Step | None
    backward: Callable[[Any], None] | None
    flops: float = 0.0
    why_not: str = ""
    backend: str | None = None


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """PETITE_FAST_BACKEND = backend inside the block."""
    before = os.environ.pop("PETITE_FAST_BACKEND", None)
    if backend is not None:
        os.environ["PETITE_FAST_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("PETITE_FAST_BACKEND", None)
        if before is not None:
            os.environ["PETITE_FAST_BACKEND"] = before


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def failure(provider: Provider, error: Exception, device: str) -> str:
    """An error in a line, for `why_not`; all of it goes to stderr.

    Raises:
        DeviceLost: the device does not answer any more.
    """
    traceback.print_exception(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = ": ".join([type(error).__name__, *lines[:1]])
    try:
        wait(device)
    except RuntimeError as lost:
        raise DeviceLost(f"{provider.name}: {text}") from lost
    return text


def _step(provider: Provider) -> None:
    with forced(provider.backend):
        assert provider.forward is not None and provider.backward is not None
        provider.backward(provider.forward())


def _seconds(step: Step, device: str) -> float:
    """Of a step: by the clock on a CPU, by the device's own events on a GPU.

    There the step is put into the queue behind other work, which also takes the step's tensors out
    of the L2 cache: what calls cost on the CPU counts only where the GPU has to wait for them.
    """
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait(device)
        for _ in range(FILLS):
            _filler().zero_()
        first.record()
        step()
        last.record()
        wait(device)
        return 1e-3 * float(first.elapsed_time(last))
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@functools.cache
def _filler() -> torch.Tensor:
    """512 MiB of GPU memory, more than an L2 cache."""
    return torch.empty(2**29, dtype=torch.uint8, device="cuda")


def compare(
    providers: list[Provider], device: str, repeats: int, warmup: int = 2, goes_on: bool = False
) -> dict[str, dict[str, Any]]:
    """Run all providers in turn, `repeats` times (at least two); their times, bytes and flops.

    The order rotates from round to round, so that no provider always follows the same one. Before
    that, bytes are counted in steps of their own, and `warmup` steps are run.

    With `goes_on`, the error of a provider becomes its `why_not`, and the others are measured.

    Raises:
        DeviceLost: with `goes_on`, an error that the GPU does not survive.
    """
    why_not = {p.name: p.why_not for p in providers if p.why_not}
    times: dict[str, list[float]] = {p.name: [] for p in providers}
    sizes: dict[str, dict[str, int]] = {}

    def run(provider: Provider, action: Step) -> Any:
        """What `action` gives, if the provider can still do it."""
        if provider.name in why_not:
            return None
        if not goes_on:
            return action()
        try:
            result = action()
            wait(device)  # a kernel's error is seen here at the latest
            return result
        except Exception as error:
            why_not[provider.name] = failure(provider, error, device)
            return None

    def count(provider: Provider) -> None:
        sizes[provider.name] = {"saved_bytes": kept(provider), "peak_bytes": peak(provider, device)}

    for provider in providers:
        run(provider, functools.partial(count, provider))
    for provider in providers:
        for _ in range(warmup):
            run(provider, functools.partial(_step, provider))
    for turn in range(repeats):
        able = [p for p in providers if p.name not in why_not]
        for k in range(len(able)):
            provider = able[(turn + k) % len(able)]
            step = functools.partial(_step, provider)
            times[provider.name].append(run(provider, lambda s=step: _seconds(s, device)))
    result: dict[str, dict[str, Any]] = {}
    for provider in providers:
        if provider.name in why_not:
            result[provider.name] = {"why_not": why_not[provider.name]}
            continue
        low, _, high = quantiles(times[provider.name], n=4, method="inclusive")
        middle = median(times[provider.name])
        result[provider.name] = {
            "ms": 1e3 * middle,
            "ms_quartiles": [1e3 * low, 1e3 * high],
            "gflops_per_s": provider.flops / middle / 1e9,
            **sizes[provider.name],
        }
    return result


def kept(provider: Provider) -> int:
    """Bytes that autograd keeps between forward and backward."""
    with forced(provider.backend):
        assert provider.forward is not None
        return saved_bytes(provider.forward)


def peak(provider: Provider, device: str) -> int:
    """Largest allocation during one step above what was there before it, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(provider)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        _step(provider)
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in trace.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    level = highest = 0
    for _, change in events:
        level += change
        highest = max(highest, level)
    return highest


def ceilings(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Measured product (of this dtype) and copy rates of this machine: GFLOP/s and GB/s.

    The product is the better of a matrix product and a convolution of 128 channels: on a CPU they
    are two libraries'.
    """
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**27 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)

    def best(step: Step) -> float:
        return min(_seconds(step, device) for _ in range(7))

    x = torch.randn(2, 128, 16, 16, 16, device=device, dtype=dtype)
    w = torch.randn(128, 128, 3, 3, 3, device=device, dtype=dtype)
    products = [
        2 * n**3 / best(lambda: torch.mm(a, b)),
        2 * 27 * 128 * x.numel() / best(lambda: torch.conv3d(x, w, padding=1)),
    ]
    return {
        "product_gflops_per_s": max(products) / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
    }


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures: hardware, versions, commit, date."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "peft", "triton", "numpy", "petite_fast")
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # of what is measured there
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
        "ceilings": ceilings(device, dtype),
    }
