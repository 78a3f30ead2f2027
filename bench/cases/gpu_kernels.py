"""Suite `kernels` on a GPU: bfloat16, torch in both layouts, ours in channels_last_3d."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gpu
import torch
from cases.kernels import Conv, Form, Kernel, adapter, low_rank, norm, weight
from measure import Provider, forced

from petite_fast.backends.eager_random import BLOCK
from petite_fast.ops import dequantise, quantise

Build = Callable[[Form], Iterable[Kernel]]

# Channels, edge and batch of convolutions with a kernel of 3.
DENSE = ((16, 64, 2), (32, 64, 2), (64, 64, 2), (32, 128, 1), (128, 32, 2))


def volumes(divisor: int = 1) -> Iterator[Build]:
    """What makes the kernels that read and write volumes; the edges divided by `divisor`."""

    def conv(inputs: int, outputs: int, size: int, *geometry: Any, batch: int) -> Conv:
        return Conv(inputs, outputs, size // divisor, *geometry, batch=batch)

    both = "forward", "grad_x"
    convs = [(conv(c, c, size, batch=batch), both) for c, size, batch in DENSE]
    for channels, size, stride, batch in ((64, 48, 1, 2), (32, 128, 1, 1), (64, 48, 2, 2)):
        depthwise = conv(channels, channels, size, 3, stride, channels, batch=batch)
        convs.append((depthwise, (*both, "grad_weight")))
    convs.append((conv(64, 32, 32, 2, 2, 1, True, batch=2), both))
    convs.append((conv(1, 32, 96, batch=2), both))
    for each, parts in convs:
        yield lambda form, c=each, p=parts: c.kernels(*p, form=form)
    for channels, size, batch in ((32, 128, 1), (64, 64, 2)):
        sizes = channels, channels, size // divisor, 8, batch
        yield lambda form, s=sizes: [low_rank(*s, form)]
    for order in ("norm_act", "act_norm"):
        yield lambda form, o=order: [norm(32, 128 // divisor, o, form=form)]
    yield lambda form: [adapter(64, 8, 64 // divisor, "gelu", 2, form)]


def flat(form: Form, divisor: int = 1) -> Iterator[Kernel]:
    """Kernels for which it makes no difference how a volume lies in memory."""
    yield weight(64, 8, form)
    yield weight(256, 8, form)
    yield from blocks(32, 128 // divisor, form)


def pairs(form: Form, divisor: int = 1) -> Iterator[tuple[Kernel, Kernel | None]]:
    """Every kernel in `form`, and the same with the same values in NCDHW, where that differs."""
    for build in volumes(divisor):
        yield from twins(build, form)
    yield from ((kernel, None) for kernel in flat(_plain(form), divisor))


def twins(build: Build, form: Form) -> Iterator[tuple[Kernel, Kernel]]:
    """What `build` makes, in `form` and in NCDHW, with the same values."""
    made = []
    for each in (form, _plain(form)):
        torch.manual_seed(0)
        made.append(list(build(each)))
    yield from zip(*made, strict=True)


def _plain(form: Form) -> Form:
    return form._replace(layout=torch.contiguous_format)


def blocks(channels: int, size: int, form: Form) -> Iterator[Kernel]:
    """8-bit codes of a volume, and back; of whole blocks of 256 elements."""
    x = form.randn(1, channels, *[size] * 3)
    with forced("eager"):  # what is measured may fail, this must not
        codes, scales = quantise(x, 0)

    def rounded() -> Any:
        rows = x.view(-1, BLOCK).float()
        scale = rows.abs().amax(1)
        # Ours draw by a hash: a code may differ by one of 127.
        code = torch.floor(rows * (127 / scale)[:, None] + torch.rand_like(rows))
        return code.clamp(-127, 127).to(torch.int8), scale

    def restored() -> torch.Tensor:
        rows = codes.view(-1, BLOCK) * (scales / 127)[:, None]
        return rows.to(x.dtype).view(x.shape)

    moved = x.nbytes + codes.nbytes + scales.nbytes
    for name, theirs, ours in (
        ("quantise", rounded, lambda: quantise(x, 0)),
        ("dequantise", restored, lambda: dequantise(codes, scales, x.shape, x.dtype)),
    ):
        yield Kernel(f"{name} {channels} @{size}^3", 0.0, moved, theirs, ours)


def compared(
    kernel: Kernel, plain: Kernel | None, backends: Sequence[str], device: str, repeats: int
) -> dict[str, Any]:
    """The record of one of `pairs`.

    Providers: torch in NCDHW, whose result is the right one, and in channels_last_3d; ours, as
    dispatch chooses, and with each of `backends` forced.
    """
    runs = [("torch", kernel.torch if plain is None else plain.torch, None)]
    if plain is not None:
        runs.append(("torch-ndhwc", kernel.torch, None))
    runs += [("ours", kernel.ours, None), *((f"ours-{b}", kernel.ours, b) for b in backends)]
    providers = [
        Provider(name, run, lambda y: None, kernel.flops, backend=backend)
        for name, run, backend in runs
    ]
    with torch.no_grad():
        figures = gpu.measured(kernel.label, providers, device, repeats, reference="torch")
    size = {"flops": kernel.flops, "bytes": kernel.bytes}
    return {"case": kernel.label, **size, "providers": figures}


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every kernel on the GPU; a record for each."""
    backends, repeats = gpu.backends(), 9 if quick else 25
    for kernel, plain in pairs(Form("cuda", torch.bfloat16, gpu.LAST)):
        yield compared(kernel, plain, backends, "cuda", repeats)
