"""The functions that host and device share, run on the host: what a GPU would compute."""

from __future__ import annotations

import math
import random

import pytest
import torch

from petite_fast.backends import native

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


def hooks():
    return native._load()[0].testing


def emulate(weight, lora_A, lora_B, scale, gamma, groups, transposed, dtype, block):
    out = torch.empty(weight.shape, dtype=dtype)
    given = [native._operand(t) for t in (weight, lora_A, lora_B, gamma, out)]
    first, second = weight.shape[:2]
    channels = (first, second * groups) if transposed else (second * groups, first)
    rank = 0 if lora_A is None else lora_A.shape[0]
    kernel = tuple(weight.shape[2:])
    hooks().emulate_effective_weight(
        *given, *channels, groups, kernel, rank, scale, transposed, block
    )
    return out


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("rank", [0, 1, 9, 40])
@pytest.mark.parametrize(
    ("shape", "groups", "transposed"),
    [
        ((13, 11, 3, 3, 3), 1, False),
        ((12, 2, 1, 3, 3), 6, False),
        ((10, 7, 2, 2, 2), 1, True),
        ((12, 5, 3, 1, 2), 4, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cuda_kernel_on_the_host_equals_the_cpu_kernel(
    block, rank, shape, groups, transposed, dtype
):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        # Small integers: every sum is exact, so both kernels must agree to the last bit.
        return torch.randint(-3, 4, size, generator=generator).to(dtype)

    weight = draw(*shape)
    gamma = draw(shape[1] * groups if transposed else shape[0])
    lora_A = lora_B = None
    if rank and transposed:
        lora_A, lora_B = draw(rank, shape[0], 1, 1, 1), draw(rank, *shape[1:])
    elif rank:
        lora_A, lora_B = draw(rank, *shape[1:]), draw(shape[0], rank)
    arguments = (weight, lora_A, lora_B, 0.5, gamma, groups, transposed, dtype)
    assert torch.equal(emulate(*arguments, block), native.effective_weight(*arguments))


def values():
    """Floats of every kind: random bit patterns, and both sides of every halfway point of fp16."""
    generator = random.Random(0)
    patterns = [generator.getrandbits(32) for _ in range(4000)]
    found = torch.tensor([p - (1 << 32 if p >> 31 else 0) for p in patterns], dtype=torch.int32)
    halves = torch.arange(0, 0x7C00, 37, dtype=torch.int16).view(torch.float16).double()
    following = (torch.arange(0, 0x7C00, 37, dtype=torch.int16) + 1).view(torch.float16).double()
    middle = (halves + following) / 2
    middle = middle[middle.isfinite()]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65519.0, 65520.0, 2.0**-25])
    return torch.cat(
        [found.view(torch.float32).double(), middle, -middle, middle * (1 + 1e-7), special.double()]
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_conversions_agree_with_torch(name, dtype):
    narrow = getattr(hooks(), f"to_{name}")
    widen = getattr(hooks(), f"from_{name}")
    singles = values().float()
    expected = singles.to(dtype)
    bits = expected.view(torch.int16).int().bitwise_and(0xFFFF)
    for value, want, code in zip(
        singles.tolist(), expected.float().tolist(), bits.tolist(), strict=True
    ):
        got = narrow(value)
        if math.isnan(value):
            assert math.isnan(widen(got))
            continue
        assert got == code, f"{value!r}: {got:#x}, wanted {code:#x}"
        assert widen(got) == want
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for code, want in zip(range(-(1 << 15), 1 << 15), every.float().tolist(), strict=True):
        value = widen(code & 0xFFFF)
        assert value == want or (math.isnan(value) and math.isnan(want))


def test_a_double_is_rounded_once():
    # 1 + 2^-8 is halfway between two bfloat16; a little more, invisible in float32, rounds up.
    tie = 1 + 2.0**-8
    widen = hooks().from_bfloat16
    assert widen(hooks().to_bfloat16(tie)) == 1.0
    assert widen(hooks().to_bfloat16(tie + 2.0**-40)) == 1 + 2.0**-7
    assert widen(hooks().to_bfloat16(tie - 2.0**-40)) == 1.0
    half = hooks().from_float16
    assert half(hooks().to_float16(1 + 2.0**-11 + 2.0**-40)) == 1 + 2.0**-10
    assert half(hooks().to_float16(-1 - 3 * 2.0**-11 + 2.0**-40)) == -1 - 2.0**-10
    assert math.isinf(widen(hooks().to_bfloat16(1e300)))


@pytest.mark.parametrize("transposed", [False, True])
def test_output_size_is_that_of_torch(transposed):
    generator = random.Random(1)
    for _ in range(25):
        kernel = [generator.randint(1, 4) for _ in range(3)]
        stride = [generator.randint(1, 3) for _ in range(3)]
        padding = [generator.randint(0, 1) for _ in range(3)]
        dilation = [generator.randint(1, 2) for _ in range(3)]
        extra = [generator.randint(0, s - 1) for s in stride] if transposed else [0, 0, 0]
        size = [generator.randint(8, 12) for _ in range(3)]
        x = torch.empty(1, 1, *size, device="meta")
        common = {"stride": stride, "padding": padding, "dilation": dilation}
        weight = torch.empty(1, 1, *kernel, device="meta")
        if transposed:
            y = torch.nn.functional.conv_transpose3d(x, weight, output_padding=extra, **common)
        else:
            y = torch.nn.functional.conv3d(x, weight, **common)
        got = hooks().output_size(size, kernel, stride, padding, dilation, extra, transposed)
        assert tuple(got) == tuple(y.shape[2:])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 2, 2), (4, 3, 1, 2)],
)
def test_input_coordinate_makes_the_convolution(transposed, kernel, stride, padding, dilation):
    x = torch.randn(1, 1, 9, dtype=torch.float64)
    weight = torch.randn(1, 1, kernel, dtype=torch.float64)
    function = torch.nn.functional.conv_transpose1d if transposed else torch.nn.functional.conv1d
    expected = function(x, weight, stride=stride, padding=padding, dilation=dilation)[0, 0]
    result = torch.zeros_like(expected)
    for output in range(len(expected)):
        for tap in range(kernel):
            position = hooks().input_coordinate(
                output, tap, 9, kernel, stride, padding, dilation, transposed
            )
            if position >= 0:
                result[output] += weight[0, 0, tap] * x[0, 0, position]
    torch.testing.assert_close(result, expected)


def test_offset_of_uses_the_strides():
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).permute(2, 0, 3, 1)
    index = (3, 1, 4, 2)
    assert hooks().offset_of(tensor.stride(), index) == tensor[index]
    with pytest.raises(ValueError, match="one length"):
        hooks().offset_of([1, 2], [0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_parallel_loop_covers_every_item_once(threads):
    for count in (0, 1, 4, 1000):
        assert hooks().parallel_sum(count, threads, -1) == sum(range(count))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_exception_in_the_parallel_loop_arrives(threads):
    with pytest.raises(RuntimeError, match="failed at 777"):
        hooks().parallel_sum(1000, threads, 777)
    assert hooks().parallel_sum(10, threads, -1) == 45
