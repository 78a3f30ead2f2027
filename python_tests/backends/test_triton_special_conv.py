"""Convolutions with few channels and with kernel = stride in Triton, as in test_triton_conv.py."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conv_cases import assert_twice_torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_kernels import (
    DTYPES,
    MATRIX,
    check_compiled,
    compile_kernel,
    compiler,
    interpreter,
    run_interpreted_tests,
)

from petite_fast.backends import eager
from petite_fast.backends import triton as backend
from petite_fast.backends.geometry import ConvGeometry
from petite_fast.backends.triton import special_conv
from petite_fast.ops import dispatch

triton = pytest.importorskip("triton")
Triple = tuple[int, int, int]
LAST, DENSE = torch.channels_last_3d, torch.contiguous_format
ZERO, ONE, TWO = (0, 0, 0), (1, 1, 1), (2, 2, 2)


class Case(NamedTuple):
    """A convolution of weight [outputs, channels, *kernel], and the layouts of x and of y."""

    channels: int
    outputs: int
    size: Triple
    kernel: Triple
    stride: Triple = ONE
    padding: Triple = ZERO
    dilation: Triple = ONE
    batch: int = 1
    layouts: tuple[torch.memory_format, torch.memory_format] = (LAST, LAST)


FEW = [
    Case(1, 18, (5, 7, 3), (3, 3, 3), TWO, ONE, batch=3, layouts=(LAST, DENSE)),  # a stem
    Case(1, 3, (4, 5, 16), (1, 2, 8), (1, 2, 8), layouts=(LAST, DENSE)),  # patches, and a rest
    Case(16, 5, (3, 5, 4), (3, 3, 3), ONE, ONE),
    Case(8, 2, (5, 3, 5), (3, 2, 1), (2, 3, 1), (1, 1, 0), batch=3),
    Case(3, 17, (4, 5, 3), (2, 3, 3), ONE, (1, 1, 2), (1, 2, 2), layouts=(DENSE, DENSE)),
    Case(5, 4, (7, 5, 5), (3, 3, 3), (2, 3, 1), (2, 1, 2), (1, 2, 2), layouts=(DENSE, LAST)),
    Case(4, 1, (3, 5, 3), ONE, batch=3, layouts=(LAST, DENSE)),
    Case(2, 3, (5, 7, 5), TWO, (3, 3, 3), TWO, layouts=(DENSE, DENSE)),  # voxels without a tap
]
BLOCKS = [
    Case(3, 17, (4, 6, 2), TWO, TWO, batch=3),
    Case(2, 18, (5, 3, 7), TWO, (2, 2, 2), layouts=(DENSE, DENSE)),  # voxels in no block
    Case(1, 33, (8, 4, 16), (4, 4, 8), (4, 4, 8), layouts=(LAST, DENSE)),
    Case(4, 5, (2, 6, 3), (1, 3, 1), (1, 3, 1), layouts=(DENSE, LAST), batch=3),
    Case(5, 1, (3, 2, 2), (1, 2, 2), (1, 2, 2), layouts=(LAST, LAST)),
]


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """x, weight, a bias for y, one for x, grad_y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x = normal(case.batch, case.channels, *case.size)
    weight = normal(case.outputs, case.channels, *case.kernel)
    y = F.conv3d(x.double(), weight.double(), None, *case[4:7])
    return [
        x.contiguous(memory_format=case.layouts[0]), weight, normal(case.outputs),
        normal(case.channels), normal(*y.shape).contiguous(memory_format=case.layouts[1]),
    ]  # fmt: skip


def torch_results(case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """y and grad_x, with a bias each; by torch in the dtype of the tensors."""
    x, weight, bias, back_bias, grad_y = tensors
    geometry = case[4:7]
    y = F.conv3d(x, weight, bias, *geometry)
    grad_x = torch.nn.grad.conv3d_input(x.shape, weight, grad_y, *geometry)
    return [y, grad_x + back_bias[:, None, None, None]]


def check(ours: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format) -> None:
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=layout)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_interpreted_few_channels(case: Case, dtype: torch.dtype) -> None:
    from petite_fast.backends.triton.few_channels import few_channels

    tensors = draw(case, dtype)
    x, weight, bias, back_bias, grad_y = tensors
    geometry = (case.stride, case.padding, case.dilation)
    y = few_channels(x, weight, bias, grad_y.shape, geometry, False, case.layouts[1])
    grad_x = few_channels(grad_y, weight, back_bias, x.shape, geometry, True, case.layouts[0])
    exact = torch_results(case, [tensor.double() for tensor in tensors])
    theirs = torch_results(case, tensors)
    for ours, layout, *others in zip((y, grad_x), case.layouts[::-1], theirs, exact, strict=True):
        check(ours, dtype, layout)
        assert_twice_torch(ours, *others)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_interpreted_shuffle(case: Case, dtype: torch.dtype) -> None:
    """grad_x of the plain convolution; with a bias, where all voxels are in a block."""
    from petite_fast.backends.triton.shuffle import shuffle

    tensors = draw(case, dtype)
    x, weight, _, back_bias, grad_y = tensors
    if any(n % k for n, k in zip(case.size, case.kernel, strict=True)):
        back_bias.zero_()
    ours = shuffle(grad_y, weight, back_bias, x.shape, case.layouts[0])
    check(ours, dtype, case.layouts[0])
    exact = torch_results(case, [tensor.double() for tensor in tensors])
    assert_twice_torch(ours, torch_results(case, tensors)[1], exact[1])


@interpreter
def test_interpreted_transposed_conv() -> None:
    """By `conv.py`; with a bias, and with an output padding of no less than the stride."""
    from petite_fast.backends.triton import conv

    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad_y = (
        torch.randn(size, generator=generator)
        for size in [(2, 5, 2, 3, 2), (5, 17, 2, 3, 2), (17,), (2, 17, 7, 6, 2)]
    )
    x, grad_y = (v.contiguous(memory_format=torch.channels_last_3d) for v in (x, grad_y))
    stride, padding, dilation, output_padding = (3, 1, 2), (0, 1, 1), (1, 2, 1), (2, 1, 0)
    ours = [
        conv.conv_grad_input(x, weight, grad_y.shape, stride, padding, dilation, bias),
        conv.conv(grad_y, weight, None, stride, padding, dilation, x.shape[2:]),
    ]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = F.conv_transpose3d(
            leaf, weight.to(dtype), bias.to(dtype), stride, padding, output_padding, 1, dilation
        )
        results.append([y, torch.autograd.grad(y, leaf, grad_y.to(dtype))[0]])
    for three in zip(ours, *results, strict=True):
        assert_twice_torch(*three)


@compiler
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted_tests(__file__, tmp_path)


def accesses(kernel: Any) -> tuple[set[int], set[str]]:
    """Bytes of the copies to shared memory past the registers, and how is stored."""
    ptx = kernel.asm["ptx"]
    found = re.findall(r"cp\.async\.c[ag]\S* \[.*?\], \[.*?\], 0x(\w+)", ptx)
    return {int(size, 16) for size in found}, set(re.findall(r"st\.global\S*", ptx))


def signature(dtype: str, numbers: str, constants: dict[str, Any], bias: bool) -> dict[str, str]:
    """Argument types of a kernel."""
    types = dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}")
    if not bias:
        constants["bias"], types["bias"] = None, "constexpr"
    return {**types, **dict.fromkeys(numbers.split(), "i32")}


@compiler
@pytest.mark.parametrize("capability", MATRIX)
@pytest.mark.parametrize(
    ("case", "adjoint", "dtype", "precision", "bytes_loaded", "stored"),
    [
        # x gathered one by one, the weight in eights; voxels side by side in the result.
        (FEW[0]._replace(outputs=64), False, "bf16", "ieee", {8}, "b16"),
        # A row of a kernel that is its stride lies as it is needed.
        (Case(1, 768, TWO, (16,) * 3, (16,) * 3, layouts=(LAST, DENSE)), False, "bf16", "ieee",
         {16}, "b16"),
        (FEW[2]._replace(outputs=16), False, "bf16", "ieee", {16}, "v4.b32"),
        (FEW[2]._replace(channels=4, outputs=32), False, "fp32", "tf32", {16, 4}, "v4.b32"),
        (FEW[0]._replace(outputs=64, layouts=(LAST, LAST)), True, "fp16", "ieee", {16}, "b16"),
        (FEW[2]._replace(channels=4, outputs=32), True, "fp32", "full", {16, 4}, "b32"),
        (FEW[4]._replace(channels=8, outputs=64), True, "fp16", "ieee", set(), "b16"),
    ],
)  # fmt: skip
def test_compiled_few_channels(
    case: Case, adjoint: bool, dtype: str, precision: str, bytes_loaded: set[int], stored: str,
    capability: int, tmp_path: Path,
) -> None:  # fmt: skip
    from petite_fast.backends.triton import few_channels

    channels, outputs = (case.channels, case.outputs)[:: -1 if adjoint else 1]
    x_last, y_last = (layout == LAST for layout in case.layouts[:: -1 if adjoint else 1])
    constants, options = few_channels.constants(
        channels, outputs, case.kernel, case[4:7], adjoint, (x_last, y_last), DTYPES[dtype],
        precision.replace("full", "ieee"),
    )  # fmt: skip
    types = signature(dtype, "D H W OUTPUTS OD OH OW rows RD RH RW", constants, not adjoint)
    aligned = {"W", "OUTPUTS"} if outputs % 16 == 0 else {"W"}
    kernel = compile_kernel(
        few_channels.few_channels_kernel, types, constants, aligned, options, capability
    )
    check_compiled(kernel, capability, precision, tmp_path)
    sizes, stores = accesses(kernel)
    assert sizes <= bytes_loaded and max(sizes, default=0) == max(bytes_loaded, default=0)
    assert stores == {f"st.global.{stored}"}


@compiler
@pytest.mark.parametrize(
    ("case", "padded"),
    [
        (Case(1, 64, ONE, (3, 3, 3)), 32),
        (Case(4, 64, ONE, (3, 3, 3)), 112),
        (Case(16, 64, ONE, (3, 3, 3)), 448),
        (Case(1, 768, ONE, (16,) * 3, (16,) * 3), 4096),
    ],
)
def test_taps_are_joined(case: Case, padded: int) -> None:
    """What is summed over, padding included: a third to a fifth of what a tap at a time has."""
    from petite_fast.backends.triton import few_channels

    constants, _ = few_channels.constants(
        case.channels, case.outputs, case.kernel, case[4:7], False, (True, True), torch.bfloat16,
        "ieee",
    )  # fmt: skip
    length = math.prod(case.kernel) * case.channels
    assert math.ceil(length / constants["INNER"]) * constants["INNER"] == padded


@compiler
@pytest.mark.parametrize("capability", MATRIX)
@pytest.mark.parametrize(
    ("case", "dtype", "precision", "stored"),
    [
        (Case(64, 32, ONE, TWO), "bf16", "ieee", "v4.b32"),
        (Case(768, 1, ONE, (16,) * 3), "bf16", "ieee", "v4.b32"),
        (Case(64, 32, ONE, TWO, layouts=(DENSE, DENSE)), "fp16", "ieee", "b16"),
        (Case(64, 32, ONE, TWO), "fp32", "tf32", "v4.b32"),
        (Case(64, 32, ONE, TWO), "fp32", "full", "v4.b32"),
    ],
)
def test_compiled_shuffle(
    case: Case, dtype: str, precision: str, stored: str, capability: int, tmp_path: Path
) -> None:
    from petite_fast.backends.triton import shuffle

    lasts = (case.layouts[0] == LAST, case.layouts[1] == LAST)
    constants, options = shuffle.constants(
        case.channels, case.outputs, case.kernel, lasts, DTYPES[dtype],
        precision.replace("full", "ieee"),
    )  # fmt: skip
    types = signature(dtype, "D H W OD OH OW rows", constants, True)
    kernel = compile_kernel(
        shuffle.shuffle_kernel, types, constants, {"OW", "OH", "W"}, options, capability
    )
    check_compiled(kernel, capability, precision, tmp_path)
    sizes, stores = accesses(kernel)
    assert 16 in sizes or "ld.global.v4.b32" in kernel.asm["ptx"]  # one step is no loop to fill
    assert stores == {f"st.global.{stored}"}


@pytest.mark.usefixtures("free_choice")
@compiler
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda device: (True, ""))
    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")

    def chosen(
        channels: int, outputs: int, geometry: tuple[Any, ...], transposed: bool = False,
        kernel: Triple = TWO, layout: torch.memory_format = DENSE, batch: int = 2,
        output_padding: Triple = ZERO, groups: int = 1,
    ) -> tuple[Any, Any]:  # fmt: skip
        """What runs the convolution and its grad_x."""
        x = torch.empty(batch, channels, 8, 6, 10, device="cuda").to(memory_format=layout)
        sides = (channels, outputs) if transposed else (outputs, channels)
        weight = torch.empty(sides[0], sides[1] // groups, *kernel, device="cuda")
        numbers = (*geometry, transposed, output_padding, groups)
        size = ConvGeometry.of_op(*numbers).output_size(x.shape[2:], kernel)
        y = torch.empty(batch, outputs, *size, device="cuda").to(memory_format=layout)
        grad_x = (y, weight, x.shape, *numbers)
        return (
            dispatch.choose("conv", x, weight, None, *numbers),
            dispatch.choose("conv_grad_input", *grad_x),
        )

    few = (special_conv.few_channels, special_conv.few_channels_grad_input)
    blocks = (special_conv.shuffle, special_conv.shuffle_grad_input)
    wide = (backend.conv_forward, backend.conv_grad_input)
    none = (eager.conv, eager.conv_grad_input)
    same, half = (ONE, ZERO, ONE), (TWO, ZERO, ONE)
    with FakeTensorMode():
        assert chosen(16, 64, same) == chosen(64, 1, same) == few
        assert chosen(16, 64, same, transposed=True) == few
        assert chosen(17, 64, same, layout=LAST) == wide
        assert chosen(17, 64, same, layout=LAST, transposed=True) == wide
        assert chosen(17, 64, same) == none  # contiguous
        assert chosen(64, 32, half, transposed=True, layout=LAST) == (blocks[0], wide[1])
        assert chosen(64, 8, half, transposed=True) == (blocks[0], few[1])
        assert chosen(1, 64, half) == (few[0], blocks[1])
        assert chosen(32, 64, half, layout=LAST) == (wide[0], blocks[1])
        assert chosen(64, 8, (TWO, ZERO, TWO), transposed=True) == few  # dilated
        assert chosen(64, 8, (TWO, ONE, ONE), transposed=True) == few  # padded
        assert chosen(64, 8, half, transposed=True, output_padding=ONE) == few
        assert chosen(64, 8, same, transposed=True, kernel=ONE) == few
        assert chosen(4, 8, same, groups=2) == none
        assert chosen(4, 8, same, batch=0) == none

        x = torch.empty(2, 17, 8, 6, 10, device="cuda")
        weight = torch.empty(18, 17, 2, 2, 2, device="cuda")
        square = torch.empty(17, 17, 2, 2, 2, device="cuda")
        strided = torch.empty_strided(x.shape, (8160, 480, 60, 10, 2), device="cuda")
        flat = torch.empty(2, 17, 1, 6, 10, device="cuda")
        empty = torch.empty(0, 18, 4, 3, 5, device="cuda")
        plain, transposed = (*half, False, ZERO, 1), (*half, True, ZERO, 1)
        for can_run, arguments, wanted in [
            ("few_channels", (x, weight, None, *plain),
             "17 channels or more on both sides, few are up to 16"),
            ("few_channels", (strided, weight, None, *plain),
             "the kernel wants a volume that is contiguous or channels_last_3d"),
            ("few_channels", (x.double(), weight.double(), None, *plain),
             "no kernel for torch.float64 with a weight of torch.float64"),
            ("few_channels", (x, weight, None, *half, False, ZERO, 2), "no kernel for 2 groups"),
            ("few_channels", (flat, weight, None, *plain), "the result is empty"),
            ("few_channels_grad_input", (empty, weight, x.shape, *plain), "the tensor is empty"),
            ("shuffle", (x, weight, None, *plain),
             "blocks are read by the kernels for any geometry"),
            ("shuffle", (x, square, None, TWO, ONE, ONE, True, ZERO, 1),
             "blocks that do not overlap need kernel = stride, above 1, and padding 0"),
            ("shuffle", (x, square, None, TWO, ZERO, TWO, True, ZERO, 1),
             "the kernel is dilated"),
            ("shuffle", (x, square, None, *half, True, ONE, 1), "output_padding is not 0"),
            ("shuffle_grad_input", (x, weight, x.shape, *transposed),
             "blocks are read by the kernels for any geometry"),
        ]:  # fmt: skip
            assert getattr(special_conv, f"can_run_{can_run}")(*arguments) == (False, wanted)
        monkeypatch.delenv("PETITE_FAST_BACKEND")
        possible, reason = special_conv.can_run_shuffle(x, square, None, *transposed)
        assert not possible and reason.startswith("not measured yet;")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("case", FEW + BLOCKS, ids=str)
def test_cuda(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
    tensors = draw(case, dtype, "cuda")
    x, weight, bias, back_bias, grad_y = tensors
    back_bias.zero_()
    exact = torch_results(case, [tensor.double() for tensor in tensors])
    theirs = torch_results(case, tensors)
    numbers = (*case[4:7], False, ZERO, 1)
    forward, backward = (x, weight, bias, *numbers), (grad_y, weight, x.shape, *numbers)
    assert_twice_torch(special_conv.few_channels(*forward), theirs[0], exact[0])
    assert_twice_torch(special_conv.few_channels_grad_input(*backward), theirs[1], exact[1], 3)
    if case in BLOCKS:
        assert_twice_torch(special_conv.shuffle_grad_input(*backward), theirs[1], exact[1], 3)
