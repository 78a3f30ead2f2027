"""The shifted-box convolution in Triton: in the interpreter, and compiled for GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from backends.test_triton_conv import ONE, TWO, Case, double, draw, torch_conv
from conv_cases import assert_twice_torch
from triton_kernels import (
    check_compiled,
    compile_kernel,
    compiler,
    interpreter,
    run_interpreted_tests,
)

from petite_fast.backends import triton as backend
from petite_fast.backends.triton import tune

pytest.importorskip("triton.tools.tensor_descriptor")

CASES = [
    Case(16, 16, (5, 9, 17), (3, 3, 3), ONE, ONE),
    Case(32, 16, (5, 4, 3), (3, 3, 3), ONE, (0, 0, 0), batch=2),
    Case(16, 40, (3, 1, 5), ONE, batch=2, bias=False),  # partial blocks of channels, both ways
    Case(24, 16, (4, 5, 2), (3, 1, 2), ONE, (2, 0, 1)),
    Case(16, 144, (2, 3, 2), (1, 3, 1), ONE, (0, 1, 0)),  # two blocks of output channels
]
TYPES = (torch.bfloat16, torch.float16)
BOXES = [config for config in tune.CONV if "BOXES" in config]


@interpreter
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_boxes(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from petite_fast.backends.triton import boxes, conv

    monkeypatch.setattr(conv, "conv_kernel", None)  # not this one
    tensors = draw(case, dtype)
    x, weight, bias, grad_y = tensors.values()
    geometry = (case.stride, case.padding, case.dilation)
    config = {"BOXES": 1}
    ours = (
        conv.conv(x, weight, bias if case.bias else None, *geometry, grad_y.shape[2:],
                  config=config),
        conv.conv_grad_input(grad_y, weight, x.shape, *geometry, config=config),
    )  # fmt: skip
    for one, theirs, exact, factor in zip(
        ours, torch_conv(case, tensors), torch_conv(case, double(tensors)), (2, 3), strict=True
    ):
        assert one.dtype == dtype
        assert one.is_contiguous(memory_format=torch.channels_last_3d)
        assert_twice_torch(one, theirs, exact, factor)
    assert boxes.fits(x, weight.permute(2, 3, 4, 1, 0), ONE, ONE)


@interpreter
def test_interpreted_configuration_that_does_not_fit() -> None:
    """At an address that the copy engine cannot read, the other kernel runs."""
    from petite_fast.backends.triton import boxes, conv

    x, weight, bias, _ = draw(CASES[0], torch.float16).values()
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())
    moved.copy_(x)
    packed = weight.permute(2, 3, 4, 1, 0)
    assert boxes.fits(x, packed, ONE, ONE) and not boxes.fits(moved, packed, ONE, ONE)
    arguments = (weight, bias, ONE, ONE, ONE, x.shape[2:])
    plain = conv.conv(x, *arguments)
    assert torch.equal(conv.conv(moved, *arguments, config={"BOXES": 1, "TILE_D": 2}), plain)


@compiler
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted_tests(__file__, tmp_path)


@compiler
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("config", BOXES, ids=str)
@pytest.mark.parametrize(
    ("channels", "outputs", "adjoint", "dtype"),
    [(64, 64, False, "bf16"), (128, 128, True, "fp16"), (16, 32, False, "bf16")],
)
def test_compiled_boxes(
    channels: int, outputs: int, adjoint: bool, dtype: str, config: tune.Config, capability: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    from petite_fast.backends.triton import boxes

    blocks, options = boxes.constants(channels, outputs, (3, 3, 3), ONE, (64, 64, 64), adjoint)
    tune.configure(blocks, options, {k: v for k, v in config.items() if k != "BOXES"})
    shapes = boxes.block_shapes(blocks)
    signature = {
        name: f"tensordesc<{dtype}{shapes[name]}>" if name in shapes else f"*{dtype}"
        for name in ("x", "weight", "bias", "y")
    }
    signature.update(dict.fromkeys(("OUTPUTS", "OD", "OH", "OW"), "i32"))
    constants: dict[str, Any] = dict(blocks)
    if adjoint:
        constants["bias"] = None
        signature["bias"] = "constexpr"
    kernel = compile_kernel(
        boxes.boxes_kernel, signature, constants, {"OUTPUTS"}, options, capability
    )
    check_compiled(kernel, capability, "ieee", tmp_path)
    ptx = kernel.asm["ptx"]
    assert "cp.async.bulk.tensor.5d.shared" in ptx  # boxes of x
    assert "cp.async.bulk.tensor.3d.shared" in ptx  # of the weight
    assert "cp.async.bulk.tensor.5d.global" in ptx  # of y
    assert not re.findall(r"st\.global\S*", ptx)
    if adjoint:
        assert not re.findall(r"ld\.global\S*", ptx)  # the bias alone is read otherwise


@compiler
def test_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from petite_fast.backends.triton import boxes

    def candidates(
        channels: int = 16, outputs: int = 32, kernel: Any = (3, 3, 3), stride: Any = ONE,
        dilation: Any = ONE, dtype: torch.dtype = torch.bfloat16,
    ) -> list[tune.Config]:  # fmt: skip
        x = torch.zeros(1, channels, 7, 7, 7, dtype=dtype)
        x = x.to(memory_format=torch.channels_last_3d)
        weight = torch.zeros(outputs, channels, *kernel, dtype=dtype)
        numbers = (stride, ONE, dilation, False, (0, 0, 0), 1)
        return backend._conv_configs(x, weight, None, *numbers)

    without = [config for config in tune.CONV if config not in BOXES]
    everything = list(tune.CONV)
    assert 0 < len(without) < len(everything) and everything[0] == {}
    assert candidates() == everything
    assert candidates(kernel=(1, 2, 3), dtype=torch.float16) == everything
    assert candidates(channels=24) == everything
    for refused in (
        {"channels": 8}, {"channels": 20}, {"outputs": 17}, {"kernel": (1, 1, 4)},
        {"stride": (1, 1, 2)}, {"dilation": TWO}, {"dtype": torch.float32},
    ):  # fmt: skip
        assert candidates(**refused) == without, refused

    capability = (8, 9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnCard(torch.Tensor):
        is_cuda = True

    x = torch.zeros(1, 16, 3, 3, 3, dtype=torch.bfloat16).as_subclass(OnCard)
    weight = torch.zeros(3, 3, 3, 16, 16, dtype=torch.bfloat16)
    assert not boxes.fits(x, weight, ONE, ONE)
    capability = (9, 0)
    assert boxes.fits(x, weight, ONE, ONE)


GPU_CASES = [
    *CASES,
    Case(64, 64, (33, 34, 35), (3, 3, 3), ONE, ONE),
    Case(128, 256, (9, 10, 11), (3, 3, 3), ONE, ONE, batch=2),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", BOXES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_cuda(case: Case, dtype: torch.dtype, config: tune.Config) -> None:
    tensors = draw(case, dtype, "cuda")
    x, weight, bias, grad_y = tensors.values()
    geometry = (case.stride, case.padding, case.dilation, False, (0, 0, 0), 1)
    y = backend.conv_forward(x, weight, bias if case.bias else None, *geometry, config=config)
    grad_x = backend.conv_grad_input(grad_y, weight, x.shape, *geometry, config=config)
    wanted, exact = torch_conv(case, tensors), torch_conv(case, double(tensors))
    assert_twice_torch(y, wanted[0], exact[0])
    assert_twice_torch(grad_x, wanted[1], exact[1], 3)
