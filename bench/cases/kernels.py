"""Suite `kernels`: single kernels beside PyTorch's, and the time of their bytes and flops."""

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


class Conv(NamedTuple):
    """A float32 convolution [batch, inputs, size^3] -> outputs."""

    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    transposed: bool = False

    def kernels(self, *parts: str) -> Iterator[Kernel]:
        """The kernels `parts`: "forward", "grad_x", "grad_weight" or several joined by " + "."""
        c, o, k, s, g = self.inputs, self.outputs, self.kernel, self.stride, self.groups
        pad = 0 if k == s else k // 2
        first, second = (c, o) if self.transposed else (o, c)
        w = torch.randn(first, second // g, k, k, k)
        x = torch.randn(1, c, *[self.size] * 3)
        numbers = [s] * 3, [pad] * 3, ONES
        rest = self.transposed, ZEROS, g
        y = torch.convolution(x, w, None, *numbers, *rest)
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
        name = f"{kind} {c}->{o} k{k}" + (f"s{s}" if s > 1 else "") + f" @{self.size}^3"
        flops = 2.0 * w.numel() * coarse[0, 0].numel()
        moved = x.nbytes + y.nbytes + w.nbytes
        product = None
        if self.transposed and k == s:
            matrix, column = w.flatten(1).t(), x[0].flatten(1)
            out = torch.empty(matrix.shape[0], column.shape[1])
            product = lambda: torch.mm(matrix, column, out=out)  # noqa: E731
        for part in parts:
            names = part.split(" + ")
            yield Kernel(
                f"{name} {part}", flops * len(names), moved * len(names),
                lambda n=names: [calls[each][0]() for each in n],
                lambda n=names: [calls[each][1]() for each in n],
                product if part == "forward" else None,
            )  # fmt: skip


def _low_rank(channels: int, outputs: int, size: int, r: int) -> Kernel:
    """dA and dB of a kernel of 3 from x and grad_y; torch's way call by call."""
    x = torch.randn(1, channels, *[size] * 3)
    grad_y = torch.randn(1, outputs, *[size] * 3)
    a = torch.randn(r, channels, 3, 3, 3)
    b = torch.randn(outputs, r)
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

    flops = 4.0 * size**3 * r * (27 * channels + outputs)
    label = f"low-rank gradient {channels}->{outputs} k3 @{size}^3 r{r}"
    return Kernel(label, flops, x.nbytes + grad_y.nbytes, plain, ours)


def _norm(channels: int, size: int, order: str) -> Kernel:
    """Forward and backward of InstanceNorm and LeakyReLU."""
    x = torch.randn(1, channels, *[size] * 3, requires_grad=True)
    grad_y = torch.randn_like(x)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        if order == "norm_act":
            return F.leaky_relu(F.instance_norm(x), 0.01)
        return F.instance_norm(F.leaky_relu(x, 0.01))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return norm_act(x, "instance", activation="leaky_relu", order=order)

    def step(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(function(x), x, grad_y)

    label = f"{order} instance, leaky_relu {channels} @{size}^3 forward + backward"
    # x read and y written; what is kept and grad_y read, grad_x written. Passes that must wait for
    # a statistic find the volume in the cache, or read it twice: that is not in the floor.
    return Kernel(label, 0.0, 5.0 * x.nbytes, lambda: step(theirs), lambda: step(ours))


def _bottleneck(channels: int, hidden: int, size: int) -> Kernel:
    """Forward and backward of x + up(relu(down(x))) on a volume, weights trained."""
    x = torch.randn(1, channels, *[size] * 3, requires_grad=True)
    grad_y = torch.randn_like(x)
    sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    weights = [torch.randn(n, requires_grad=True) for n in sizes]

    def theirs() -> torch.Tensor:
        down, down_bias, up, up_bias = weights
        low = F.relu(F.conv3d(x, down[..., None, None, None], down_bias))
        return x + F.conv3d(low, up[..., None, None, None], up_bias)

    def ours() -> torch.Tensor:
        return bottleneck(x, *weights, activation="relu", channel_dim=1)

    def step(function: Run) -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(function(), [x, *weights], grad_y)

    flops = 7 * 2.0 * channels * hidden * size**3  # down twice, up, and two products for each
    label = f"bottleneck {channels}, {hidden} hidden @{size}^3 forward + backward"
    return Kernel(label, flops, 5.0 * x.nbytes, lambda: step(theirs), lambda: step(ours))


def _weight(channels: int, r: int) -> Kernel:
    """W + 2 B A of a kernel of 3."""
    w = torch.randn(channels, channels, 3, 3, 3)
    a = torch.randn(r, channels, 3, 3, 3)
    b = torch.randn(channels, r)
    flops = 2.0 * r * w.numel()

    def ours() -> torch.Tensor:
        return library.effective_weight(w, a, b, 2.0, None, 1, False, torch.float32)

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
    yield _low_rank(32, 4, 48, 4)
    yield _low_rank(32, 32, 32, 4)
    yield _low_rank(64, 64, 24, 8)
    yield _low_rank(128, 128, 16, 8)
    yield _norm(32, 48, "norm_act")
    yield _norm(32, 48, "act_norm")
    yield _bottleneck(32, 8, 48)
    yield _weight(64, 8)
    yield _weight(256, 8)


def run(device: str, quick: bool) -> list[dict[str, Any]]:
    """Measure every kernel; a list of records."""
    records = []
    with torch.device(device):
        cases = list(kernels())
    for kernel in cases:
        runs = {"torch": kernel.torch, "ours": kernel.ours, "product": kernel.product}
        providers = [
            Provider(name, run, lambda y: None, kernel.flops) for name, run in runs.items() if run
        ]
        providers.insert(1, providers[1]._replace(name="ours-eager", backend="eager"))
        with torch.no_grad():
            figures = compare(providers, device, 9 if quick else 25)
        size = {"flops": kernel.flops, "bytes": kernel.bytes}
        records.append({"case": kernel.label, **size, "providers": figures})
    return records
