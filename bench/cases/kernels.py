"""Suite `kernels`: single kernels beside PyTorch's, and what they must compute and move.

Those of the suite on a CPU; `gpu_kernels` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Provider, compare

from petite_fast.ops import bottleneck, library, norm_act

Run = Callable[[], Any]
ZEROS, ONES = [0, 0, 0], [1, 1, 1]


class Kernel(NamedTuple):
    """One kernel: what it must compute and move, torch's way, ours, and its bare product."""

    label: str
    flops: float
    bytes: float
    torch: Run
    ours: Run
    product: Run | None = None


class Form(NamedTuple):
    """What a kernel's tensors are."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format

    def randn(self, *size: int) -> torch.Tensor:
        """Normal values; volumes and their weights have the layout."""
        values = torch.randn(size, device=self.device, dtype=self.dtype)
        return values.to(memory_format=self.layout) if len(size) == 5 else values


PLAIN = Form()


class Conv(NamedTuple):
    """A convolution [batch, inputs, size^3] -> outputs."""

    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    transposed: bool = False
    batch: int = 1

    def kernels(self, *parts: str, form: Form = PLAIN) -> Iterator[Kernel]:
        """The kernels `parts`: "forward", "grad_x", "grad_weight" or several joined by " + "."""
        c, o, k, s, g = self.inputs, self.outputs, self.kernel, self.stride, self.groups
        pad = 0 if k == s else k // 2
        first, second = (c, o) if self.transposed else (o, c)
        w = form.randn(first, second // g, k, k, k)
        x = form.randn(self.batch, c, *[self.size] * 3)
        numbers = [s] * 3, [pad] * 3, ONES
        rest = self.transposed, ZEROS, g
        y = form.randn(*torch.convolution(x.to("meta"), w.to("meta"), None, *numbers, *rest).shape)
        coarse, fine = (x, y) if self.transposed else (y, x)

        def backward(which: int) -> Any:
            mask = [which == 0, which == 1, False]
            return torch.ops.aten.convolution_backward(y, x, w, None, *numbers, *rest, mask)

        calls: dict[str, tuple[Run, Run]] = {
            "forward": (
                lambda: torch.convolution(x, w, None, *numbers, *rest),
                lambda: library.conv(x, w, None, *numbers, *rest),
            ),
            "grad_x": (
                lambda: backward(0),
                lambda: library.conv_grad_input(y, w, list(x.shape), *numbers, *rest),
            ),
            "grad_weight": (
                lambda: backward(1),
                lambda: library.conv_grad_weight(coarse, fine, list(w.shape), *numbers, g),
            ),
        }
        kind = "convT" if self.transposed else "depthwise" if g > 1 else "conv"
        name = f"{kind} {c}->{o} k{k}" + (f"s{s}" if s > 1 else "")
        name += _place(self.size, self.batch)
        flops = 2.0 * w.numel() * coarse[:, 0].numel()
        moved = x.nbytes + y.nbytes + w.nbytes
        product = None
        if self.transposed and k == s and self.batch == 1:
            matrix, column = w.flatten(1).t(), x[0].flatten(1)
            out = form.randn(matrix.shape[0], column.shape[1])
            product = lambda: torch.mm(matrix, column, out=out)  # noqa: E731
        for part in parts:
            names = part.split(" + ")
            yield Kernel(
                f"{name} {part}", flops * len(names), moved * len(names),
                lambda n=names: [calls[each][0]() for each in n],
                lambda n=names: [calls[each][1]() for each in n],
                product if part == "forward" else None,
            )  # fmt: skip


def _place(size: int, batch: int) -> str:
    """The end of a label."""
    return f" @{size}^3" + (f" b{batch}" if batch > 1 else "")


def low_rank(
    channels: int, outputs: int, size: int, r: int, batch: int = 1, form: Form = PLAIN
) -> Kernel:
    """dA and dB of a kernel of 3 from x and grad_y; torch's way call by call."""
    x = form.randn(batch, channels, *[size] * 3)
    grad_y = form.randn(batch, outputs, *[size] * 3)
    a = form.randn(r, channels, 3, 3, 3)
    b = form.randn(outputs, r)
    back = torch.ops.aten.convolution_backward
    column = b.t()[..., None, None, None].contiguous()

    def plain() -> Any:
        t, low = F.conv3d(x, a, padding=1), F.conv3d(grad_y, column)
        last = False, ZEROS, 1, [False, True, False]
        return (
            back(low, x, a, None, ONES, ONES, ONES, *last)[1],
            back(grad_y, t, b[..., None, None, None], None, ONES, ZEROS, ONES, *last)[1],
        )

    def ours() -> Any:
        return library.low_rank_gradient(grad_y, x, None, a, b, ONES, ONES, True, True, False)

    flops = 4.0 * batch * size**3 * r * (27 * channels + outputs)
    label = f"low-rank gradient {channels}->{outputs} k3{_place(size, batch)} r{r}"
    return Kernel(label, flops, x.nbytes + grad_y.nbytes, plain, ours)


def norm(channels: int, size: int, order: str, batch: int = 1, form: Form = PLAIN) -> Kernel:
    """Forward and backward of InstanceNorm and LeakyReLU."""
    x = form.randn(batch, channels, *[size] * 3)
    # Away from the kink, on whose two sides rounding could put one value.
    x = (x + x.sign()).requires_grad_()
    grad_y = form.randn(*x.shape)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        if order == "norm_act":
            return F.leaky_relu(F.instance_norm(x), 0.01)
        return F.instance_norm(F.leaky_relu(x, 0.01))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return norm_act(x, "instance", activation="leaky_relu", order=order)

    label = f"{order} instance, leaky_relu {channels}{_place(size, batch)} forward + backward"
    # x read and y written; what is kept and grad_y read, grad_x written. Passes that must wait for
    # a statistic find the volume in the cache, or read it twice: that is not in the floor.
    steps = [lambda f=f: _both_ways(f, [x], grad_y) for f in (theirs, ours)]
    return Kernel(label, 0.0, 5.0 * x.nbytes, *steps)


def _both_ways(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad_y: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """y = function(*inputs) and the gradients of the inputs."""
    with torch.enable_grad():
        y = function(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, grad_y)


def adapter(
    channels: int, hidden: int, size: int, activation: str = "relu", batch: int = 1,
    form: Form = PLAIN,
) -> Kernel:  # fmt: skip
    """Forward and backward of x + up(act(down(x))) on a volume, weights trained."""
    x = form.randn(batch, channels, *[size] * 3)
    grad_y = form.randn(*x.shape)
    sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    inputs = [each.requires_grad_() for each in (x, *(form.randn(*n) for n in sizes))]

    def theirs(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        down, down_bias, up, up_bias = weights
        low = F.conv3d(x, down[..., None, None, None], down_bias)
        return x + F.conv3d(getattr(F, activation)(low), up[..., None, None, None], up_bias)

    def ours(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return bottleneck(x, *weights, activation=activation, channel_dim=1)

    # Down twice, up, and two products for each.
    flops = 7 * 2.0 * channels * hidden * batch * size**3
    kind = "" if activation == "relu" else f", {activation}"
    label = f"bottleneck {channels}, {hidden} hidden{kind}{_place(size, batch)} forward + backward"
    steps = [lambda f=f: _both_ways(f, inputs, grad_y) for f in (theirs, ours)]
    return Kernel(label, flops, 5.0 * x.nbytes, *steps)


def weight(channels: int, r: int, form: Form = PLAIN) -> Kernel:
    """W + 2 B A of a kernel of 3."""
    w = form.randn(channels, channels, 3, 3, 3)
    a = form.randn(r, channels, 3, 3, 3)
    b = form.randn(channels, r)
    flops = 2.0 * r * w.numel()

    def ours() -> torch.Tensor:
        return library.effective_weight(w, a, b, 2.0, None, 1, False, form.dtype)

    def plain() -> torch.Tensor:
        return w + 2.0 * (b @ a.flatten(1)).view(w.shape)

    label = f"effective weight {channels}->{channels} k3 r{r}"
    return Kernel(label, flops, 2.0 * w.nbytes, plain, ours)


def kernels() -> Iterator[Kernel]:
    """Every kernel that is measured."""
    parts = "forward", "grad_x", "grad_weight"
    yield from Conv(32, 32, 24).kernels("forward", "grad_x + grad_weight")
    for channels, size, stride in ((32, 48, 1), (128, 16, 1), (128, 16, 2), (256, 8, 1)):
        yield from Conv(channels, channels, size, 3, stride, channels).kernels(*parts)
    yield from Conv(256, 256, 8, 3, 2, 256).kernels(*parts)
    yield from Conv(64, 32, 24, 2, 2, transposed=True).kernels(*parts)
    yield from Conv(64, 32, 24, 3, 2, transposed=True).kernels(*parts)
    yield from Conv(1, 32, 48).kernels(*parts)
    yield from Conv(1, 96, 96, 16, 16).kernels(*parts)
    yield low_rank(32, 4, 48, 4)
    yield low_rank(32, 32, 32, 4)
    yield low_rank(64, 64, 24, 8)
    yield low_rank(128, 128, 16, 8)
    yield norm(32, 48, "norm_act")
    yield norm(32, 48, "act_norm")
    yield adapter(32, 8, 48)
    yield weight(64, 8)
    yield weight(256, 8)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every kernel on the CPU; a record for each."""
    for kernel in list(kernels()):
        runs = {"torch": kernel.torch, "ours": kernel.ours, "product": kernel.product}
        providers = [
            Provider(name, run, lambda y: None, kernel.flops) for name, run in runs.items() if run
        ]
        providers.insert(1, providers[1]._replace(name="ours-eager", backend="eager"))
        with torch.no_grad():
            figures = compare(providers, "cpu", 9 if quick else 25)
        size = {"flops": kernel.flops, "bytes": kernel.bytes}
        yield {"case": kernel.label, **size, "providers": figures}
