"""The native norm_act beside the eager one: sizes that leave remainders, types, threads."""

from __future__ import annotations

import pytest
import torch

from petite_fast.backends import native
from petite_fast.ops import dispatch, norm_act

pytestmark = pytest.mark.skipif(not native.available()[0], reason="no native module")

SIZES = [(1, 1, 1, 3, 7), (2, 3, 1, 1, 17), (1, 5, 3, 7, 2), (3, 4, 7, 3, 17), (2, 33, 4, 4, 4),
         (1, 16, 16, 16, 16), (0, 3, 2, 2, 2)]  # fmt: skip
NORMS = {"instance": {}, "group": {"groups": 1}, "batch": {"training": True}, "fixed": {}}


def run(x, norm, dtype, layout, activation, order, backend, monkeypatch):
    monkeypatch.setenv("PETITE_FAST_BACKEND", backend)
    generator = torch.Generator().manual_seed(7)
    channels = x.shape[1]
    weight = (0.5 + torch.rand(channels, generator=generator)).requires_grad_()
    bias = torch.randn(channels, generator=generator).requires_grad_()
    options = dict(NORMS[norm])
    if norm == "fixed":
        options |= {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
    x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
    y = norm_act(
        x, "batch" if norm == "fixed" else norm, weight=weight, bias=bias, activation=activation,
        slope=0.2, order=order, **options,
    )  # fmt: skip
    grad = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], grad)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_is_eager(dtype, layout, threads, monkeypatch) -> None:
    before, ran = torch.get_num_threads(), 0
    torch.set_num_threads(threads)
    try:
        for size in SIZES:
            x = torch.randn(size, generator=torch.Generator().manual_seed(1))
            for norm in NORMS:
                if norm == "batch" and x.numel() == 0:
                    continue
                for activation, order in (
                    ("leaky_relu", "norm_act"), ("relu", "norm_act"), ("leaky_relu", "act_norm")
                ):  # fmt: skip
                    given = (x, norm, dtype, layout, activation, order)
                    eager = run(*given, "eager", monkeypatch)
                    with dispatch.explaining() as decisions:
                        found = run(*given, "native", monkeypatch)
                    if any(d.backend == "eager" for d in decisions if d.op.startswith("norm_act")):
                        continue
                    again = run(*given, "native", monkeypatch)
                    ran += 1
                    rough = 2e-2 if dtype == torch.bfloat16 else 2e-5
                    for a, b, c in zip(found, eager, again, strict=True):
                        assert torch.equal(a, c)  # deterministic
                        scale = float(b.abs().max()) if b.numel() else 0.0
                        torch.testing.assert_close(
                            a, b, rtol=rough, atol=rough * (scale + 1e-3), msg=str(given[1:])
                        )
    finally:
        torch.set_num_threads(before)
    assert ran >= (40 if layout == torch.contiguous_format else 10)
