"""The convolution kernels in Triton: against float64 in the interpreter, and compiled for GPUs."""

from __future__ import annotations

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
from petite_fast.ops import dispatch

triton = pytest.importorskip("triton")
Triple = tuple[int, int, int]


class Case(NamedTuple):
    """One convolution."""

    channels: int
    outputs: int
    size: Triple
    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    batch: int = 1
    bias: bool = True


ONE, TWO = (1, 1, 1), (2, 2, 2)
CASES = [
    Case(1, 1, (1, 1, 1), ONE),
    Case(1, 16, (5, 3, 7), (3, 3, 3), ONE, ONE),
    Case(16, 1, (3, 5, 2), (3, 3, 3), ONE, ONE, batch=2, bias=False),
    Case(16, 16, (7, 3, 7), (3, 3, 3), ONE, ONE),
    Case(8, 8, (1, 2, 3), ONE, batch=2),
    Case(3, 17, (5, 3, 7), (3, 2, 1), (2, 3, 1), (1, 1, 0), batch=2),
    Case(17, 8, (7, 7, 5), (3, 2, 3), (2, 2, 3), (2, 1, 2), (2, 2, 1)),
    Case(8, 3, (7, 5, 5), (3, 3, 3), (2, 3, 1), (2, 1, 2), (1, 2, 2), bias=False),
    Case(16, 17, TWO, TWO, TWO),
    Case(3, 3, (7, 1, 5), (3, 1, 2), ONE, (2, 0, 1), (2, 1, 1)),
    Case(17, 16, (5, 7, 5), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    Case(8, 17, (3, 7, 5), TWO, (3, 3, 3), TWO),  # taps that read only padding, and no tap
    Case(16, 3, (5, 5, 7), (2, 3, 2), TWO, (1, 2, 1), TWO, batch=2),  # only even distances
]


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """x, weight, bias, grad_y; the volumes channels_last_3d."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn = drawn.to(device, dtype)
        volume = drawn.dim() == 5
        return drawn.contiguous(memory_format=torch.channels_last_3d) if volume else drawn

    x = normal(case.batch, case.channels, *case.size)
    weight = normal(case.outputs, case.channels, *case.kernel).contiguous()
    y = F.conv3d(x.double(), weight.double(), None, case.stride, case.padding, case.dilation)
    return {"x": x, "weight": weight, "bias": normal(case.outputs), "grad_y": normal(*y.shape)}


def torch_conv(case: Case, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """y and grad_x by torch in the dtype of the tensors."""
    geometry = (case.stride, case.padding, case.dilation)
    x = tensors["x"].detach().requires_grad_()
    y = F.conv3d(x, tensors["weight"], tensors["bias"] if case.bias else None, *geometry)
    return y.detach(), torch.autograd.grad(y, x, tensors["grad_y"])[0]


def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_conv(case: Case, dtype: torch.dtype) -> None:
    from petite_fast.backends.triton import conv

    tensors = draw(case, dtype)
    x, weight, bias, grad_y = tensors.values()
    geometry = (case.stride, case.padding, case.dilation)
    y = conv.conv(x, weight, bias if case.bias else None, *geometry, grad_y.shape[2:])
    grad_x = conv.conv_grad_input(grad_y, weight, x.shape, *geometry)
    for ours, theirs, exact, factor in zip(
        (y, grad_x), torch_conv(case, tensors), torch_conv(case, double(tensors)), (2, 3),
        strict=True,
    ):  # fmt: skip
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last_3d)
        assert_twice_torch(ours, theirs, exact, factor)


LOW_RANK_CASES = [
    (Case(16, 16, (7, 3, 7), (3, 3, 3), ONE, ONE), 4),
    (Case(3, 17, (5, 3, 7), (3, 2, 1), (2, 3, 1), (1, 1, 0), batch=2), 1),
    (Case(17, 8, (7, 7, 5), (3, 2, 3), (2, 2, 3), (2, 1, 2)), 20),
    (Case(8, 1, (3, 5, 2), TWO, ONE, TWO, batch=2), 3),
    (Case(1, 3, (1, 1, 1), ONE), 2),
]


def draw_low_rank(case: Case, r: int, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
    """grad_y, x, lora_A, lora_B."""
    tensors = draw(case, dtype, device)
    generator = torch.Generator().manual_seed(1)
    lora_A = torch.randn(r, case.channels, *case.kernel, generator=generator)
    lora_B = torch.randn(case.outputs, r, generator=generator)
    return [tensors["grad_y"], tensors["x"], lora_A.to(device, dtype), lora_B.to(device, dtype)]


def low_rank_torch(case: Case, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same gradients by autograd through conv(conv(x, A), B) + bias."""
    grad_y, x, *trained = tensors
    lora_A, lora_B = (tensor.detach().requires_grad_() for tensor in trained)
    bias = torch.zeros(case.outputs, dtype=x.dtype, device=x.device, requires_grad=True)
    t = F.conv3d(x, lora_A, None, case.stride, case.padding)
    y = F.conv3d(t, lora_B[..., None, None, None], bias)
    return torch.autograd.grad(y, (lora_A, lora_B, bias), grad_y)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("case", "r"), LOW_RANK_CASES, ids=str)
def test_interpreted_low_rank_gradient(case: Case, r: int, dtype: torch.dtype) -> None:
    from petite_fast.backends.triton import low_rank

    tensors = draw_low_rank(case, r, dtype)
    geometry = (case.stride, case.padding)
    ours = low_rank.low_rank_gradient(*tensors, *geometry, True, True, True)
    theirs = low_rank_torch(case, tensors)
    exact = low_rank_torch(case, [tensor.double() for tensor in tensors])
    for name, *three in zip(("grad_A", "grad_B", "grad_bias"), ours, theirs, exact, strict=True):
        assert three[0].dtype == torch.float32 and three[0].is_contiguous()
        assert_twice_torch(*three, factor=3, name=name)


@interpreter
def test_interpreted_low_rank_gradient_transposed() -> None:
    """y = conv_transpose(A x, B): the op with x and grad_y, and A and B, exchanged."""
    from petite_fast.backends.triton import low_rank

    plain = Case(3, 18, (4, 6, 2), TWO, TWO, batch=3)
    x, grad_y, lora_B, turned_A = draw_low_rank(plain, 4, torch.float32)
    ours = low_rank.low_rank_gradient(x, grad_y, lora_B, turned_A, TWO, (0, 0, 0), True, True, True)
    results = []
    for dtype in (torch.float32, torch.float64):
        lora_A = turned_A.t()[..., None, None, None].to(dtype).requires_grad_()
        b = lora_B.to(dtype).requires_grad_()
        t = F.conv3d(x.to(dtype), lora_A)
        y = F.conv_transpose3d(t, b, None, TWO)
        grad_A, grad_B = torch.autograd.grad(y, (lora_A, b), grad_y.to(dtype))
        results.append((grad_B, grad_A.view(4, -1).t()))
    for three in zip(ours[:2], *results, strict=True):
        assert_twice_torch(*three, factor=3)


@interpreter
def test_interpreted_low_rank_gradient_makes_what_is_wanted() -> None:
    from petite_fast.backends.triton import low_rank

    case, r = LOW_RANK_CASES[1]
    tensors = draw_low_rank(case, r, torch.float32)
    geometry = (case.stride, case.padding)
    everything = low_rank.low_rank_gradient(*tensors, *geometry, True, True, True)
    for wanted in range(3):
        wants = [place == wanted for place in range(3)]
        some = low_rank.low_rank_gradient(*tensors, *geometry, *wants)
        for want, one, all_ in zip(wants, some, everything, strict=True):
            assert torch.equal(one, all_) if want else one.numel() == 0


@interpreter
def test_interpreted_low_rank_gradient_adds_up_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer programs than tiles, so that programs loop; the sums are those of float64."""
    from petite_fast.backends.triton import low_rank

    case, r = LOW_RANK_CASES[0]
    tensors = draw_low_rank(case, r, torch.float32)
    monkeypatch.setattr(low_rank, "PROGRAMS", 18)  # two shares of three tiles
    ours = low_rank.low_rank_gradient(*tensors, case.stride, case.padding, True, True, True)
    exact = low_rank_torch(case, [tensor.double() for tensor in tensors])
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@compiler
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted_tests(__file__, tmp_path)


@compiler
@pytest.mark.parametrize("capability", MATRIX)
@pytest.mark.parametrize(
    ("channels", "outputs", "stride", "adjoint", "dtype", "precision", "bytes_loaded"),
    [
        (64, 64, ONE, False, "bf16", "ieee", {16}),
        (128, 128, ONE, True, "fp16", "ieee", {16}),
        (16, 16, TWO, True, "bf16", "ieee", {16, 8}),  # a weight of 32 x 16 is 8 per thread
        (32, 32, TWO, False, "fp32", "tf32", {16, 4}),  # wgmma wants a TF32 weight transposed
        (32, 64, ONE, False, "fp32", "full", {16}),
        (17, 130, ONE, False, "fp16", "ieee", set()),  # one by one, through the registers
    ],
)
def test_compiled_conv(
    channels: int, outputs: int, stride: Triple, adjoint: bool, dtype: str, precision: str,
    bytes_loaded: set[int], capability: int, tmp_path: Path,
) -> None:  # fmt: skip
    from petite_fast.backends.triton import conv

    constants, options = conv.constants(
        channels, outputs, (3, 3, 3), stride, ONE, ONE, adjoint, DTYPES[dtype],
        precision.replace("full", "ieee"),
    )  # fmt: skip
    numbers = "D H W OUTPUTS OD OH OW rows RD RH RW".split()
    signature = dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}")
    signature.update(dict.fromkeys(numbers, "i32"))
    if adjoint:
        constants["bias"] = None
        signature["bias"] = "constexpr"
    aligned = {"OUTPUTS"} if outputs % 16 == 0 else set()
    kernel = compile_kernel(conv.conv_kernel, signature, constants, aligned, options, capability)
    check_compiled(kernel, capability, precision, tmp_path)
    ptx = kernel.asm["ptx"]
    # Copies to shared memory past the registers, and of how many bytes.
    found = re.findall(r"cp\.async\.c[ag]\S* \[.*?\], \[.*?\], 0x(\w+)", ptx)
    sizes = {int(size, 16) for size in found}
    assert sizes <= bytes_loaded and (16 in sizes) == bool(bytes_loaded)
    stored = "st.global.v4.b32" if bytes_loaded else "st.global.b16"
    assert set(re.findall(r"st\.global\S*", ptx)) == {stored}


@compiler
@pytest.mark.parametrize("capability", MATRIX)
@pytest.mark.parametrize(
    ("channels", "outputs", "r", "dtype", "precision"),
    [
        (64, 64, 8, "bf16", "ieee"),
        (32, 128, 32, "fp16", "ieee"),
        (16, 256, 16, "bf16", "ieee"),
        (16, 64, 32, "fp32", "tf32"),
        (16, 64, 16, "fp32", "full"),
    ],
)
def test_compiled_low_rank(
    channels: int, outputs: int, r: int, dtype: str, precision: str, capability: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    from petite_fast.backends.triton import low_rank

    constants, options = low_rank.constants(
        channels, outputs, r, (3, 3, 3), ONE, ONE, (True, True, True), DTYPES[dtype],
        precision.replace("full", "ieee"),
    )  # fmt: skip
    signature = dict.fromkeys(("grad_y", "x", "lora_A", "lora_B"), f"*{dtype}")
    signature.update(dict.fromkeys(("part_A", "part_B", "part_bias"), "*fp32"))
    numbers = "D H W OUTPUTS OD OH OW rows shares RANK".split()
    signature.update(dict.fromkeys(numbers, "i32"))
    kernel = compile_kernel(
        low_rank.low_rank_kernel, signature, constants, {"OUTPUTS"}, options, capability
    )
    check_compiled(kernel, capability, precision, tmp_path)


@pytest.mark.usefixtures("free_choice")
@compiler
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda device: (True, ""))
    monkeypatch.setattr(backend.tune, "find", lambda *_: None)

    def ask(
        x: torch.Tensor, weight: torch.Tensor, padding: Triple = ONE,
        transposed: bool = False, groups: int = 1,
    ) -> str:  # fmt: skip
        arguments = (ONE, padding, ONE, transposed, (0, 0, 0), groups)
        possible, reason = backend.can_run_conv(x, weight, None, *arguments)
        assert possible == (reason == "")
        if padding == ONE:
            same = backend.can_run_conv_grad_input(x, weight, x.shape, *arguments)
            assert same == (possible, reason)
        return reason

    assert ask(torch.ones(1, 4, 3, 3, 3), torch.ones(4, 4, 3, 3, 3)) == (
        "no kernel for device 'cpu'"
    )
    with FakeTensorMode():
        weight = torch.empty(20, 20, 3, 3, 3, device="cuda")
        plain = torch.empty(1, 20, 5, 6, 7, device="cuda")
        x = plain.to(memory_format=torch.channels_last_3d)
        assert ask(x, weight).startswith("not measured on this device")
        arguments = (None, ONE, ONE, ONE, False, (0, 0, 0), 1)
        assert dispatch.choose("conv", x, weight, *arguments) is eager.conv
        monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
        assert dispatch.choose("conv", x, weight, *arguments) is backend.conv_forward
        assert ask(x, weight) == ""
        assert ask(plain, weight) == "the kernel wants channels_last_3d"
        assert dispatch.choose("conv", plain, weight, *arguments) is eager.conv
        assert ask(x, weight, transposed=True) == ""
        assert ask(x, weight, groups=2) == "no kernel for 2 groups"
        assert ask(x.double(), weight.double()).startswith("no kernel for torch.float64")
        assert ask(x.bfloat16(), weight) == (
            "no kernel for torch.bfloat16 with a weight of torch.float32"
        )
        assert ask(torch.empty(0, 20, 5, 6, 7, device="cuda"), weight) == "the tensor is empty"
        flat = torch.empty(1, 20, 2, 6, 7, device="cuda").to(memory_format=torch.channels_last_3d)
        assert ask(flat, weight, (0, 0, 0)) == "the result is empty"
        large = torch.empty(1, 20, 1024, 1024, 128, device="cuda")
        large = large.to(memory_format=torch.channels_last_3d)
        assert ask(large, weight) == f"more than {2**31 - 2**12} elements"

        for outputs, r, dtype, wanted in [
            (4, 2, torch.bfloat16, ""),
            (128, 32, torch.bfloat16, ""),
            (129, 32, torch.bfloat16, "129 output channels with rank 32: the sums do not stay"),
            (257, 2, torch.bfloat16, "257 output channels with rank 2: the sums"),
            (4, 33, torch.bfloat16, "4 output channels with rank 33: the sums"),
            (4, 2, torch.float64, "no kernel for x of torch.float64"),
        ]:
            grad_y = torch.empty(1, outputs, 5, 6, 7, device="cuda", dtype=dtype)
            grad_y = grad_y.to(memory_format=torch.channels_last_3d)
            lora_A = torch.empty(r, 20, 3, 3, 3, device="cuda", dtype=dtype)
            lora_B = torch.empty(outputs, r, device="cuda", dtype=dtype)
            possible, reason = backend.can_run_low_rank_gradient(
                grad_y, x.to(dtype), None, lora_A, lora_B, ONE, ONE, True, True, True
            )
            assert possible == (wanted == "") and reason.startswith(wanted)


GPU_CASES = [
    *CASES,
    Case(64, 64, (33, 34, 35), (3, 3, 3), ONE, ONE),
    Case(32, 128, (17, 18, 19), (3, 3, 3), TWO, ONE, batch=2),
    Case(128, 256, (9, 10, 11), (3, 3, 3), TWO, ONE, TWO),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_cuda(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
    tensors = draw(case, dtype, "cuda")
    x, weight, bias, grad_y = tensors.values()
    geometry = (case.stride, case.padding, case.dilation, False, (0, 0, 0), 1)
    wanted, exact = torch_conv(case, tensors), torch_conv(case, double(tensors))
    forward = (x, weight, bias if case.bias else None, *geometry)
    backward = (grad_y, weight, x.shape, *geometry)
    if backend.can_run_conv(*forward)[0]:
        assert_twice_torch(backend.conv_forward(*forward), wanted[0], exact[0])
    if backend.can_run_conv_grad_input(*backward)[0]:
        assert_twice_torch(backend.conv_grad_input(*backward), wanted[1], exact[1], 3)

    if case.dilation == ONE:
        tensors_ = draw_low_rank(case, 8, dtype, "cuda")
        low_rank = [*tensors_[:2], None, *tensors_[2:], case.stride, case.padding]
        if backend.can_run_low_rank_gradient(*low_rank, True, True, True)[0]:
            ours = backend.low_rank_gradient(*low_rank, True, True, True)
            theirs = low_rank_torch(case, tensors_)
            exact = low_rank_torch(case, [tensor.double() for tensor in tensors_])
            for three in zip(ours, theirs, exact, strict=True):
                assert_twice_torch(*three, factor=3)
            again = backend.low_rank_gradient(*low_rank, True, True, True)
            assert all(map(torch.equal, ours, again))
