"""Interleaved timing, saved bytes and peak allocation of a step, and the machine's ceilings."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from petite_fast.ops import saved_bytes

Step = Callable[[], Any]


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


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _step(provider: Provider) -> None:
    with forced(provider.backend):
        assert provider.forward is not None and provider.backward is not None
        provider.backward(provider.forward())


def compare(
    providers: list[Provider], device: str, repeats: int, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """Run all providers in turn, `repeats` times (at least two); their times, bytes and flops.

    The order rotates from round to round, so that no provider always follows the same one. Before
    that, bytes are counted in steps of their own, and `warmup` steps are run.
    """
    able = [p for p in providers if not p.why_not]
    times: dict[str, list[float]] = {p.name: [] for p in able}
    sizes = {p.name: {"saved_bytes": kept(p), "peak_bytes": peak(p, device)} for p in able}
    for provider in able:
        for _ in range(warmup):
            _step(provider)
    for turn in range(repeats):
        for k in range(len(able)):
            provider = able[(turn + k) % len(able)]
            _wait(device)
            start = time.perf_counter()
            _step(provider)
            _wait(device)
            times[provider.name].append(time.perf_counter() - start)
    result: dict[str, dict[str, Any]] = {}
    for provider in providers:
        if provider.why_not:
            result[provider.name] = {"why_not": provider.why_not}
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


def ceilings(device: str) -> dict[str, float]:
    """Measured float32 product and copy rates of this machine: GFLOP/s and GB/s.

    The product is the better of a matrix product and a convolution of 128 channels: on a CPU they
    are two libraries'.
    """
    n = 4096 if device == "cuda" else 1536
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source = torch.randn(2**27 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)

    def best(step: Step) -> float:
        times = []
        for _ in range(7):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times.append(time.perf_counter() - start)
        return min(times)

    x, w = torch.randn(2, 128, 16, 16, 16, device=device), torch.randn(128, 128, 3, 3, 3)
    w = w.to(device)
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
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
        "ceilings": ceilings(device),
    }
