"""The 8-bit quantiser: formula, unbiased rounding, special values, layouts, opcheck."""

from __future__ import annotations

import math

import pytest
import torch

from petite_fast.backends import eager_random
from petite_fast.ops import dequantise, quantise, reference

OPS = torch.ops.petite_fast
BLOCK = 256
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 3).to(dtype)


def round_trip(x: torch.Tensor, seed: int) -> torch.Tensor:
    return dequantise(*quantise(x, seed), x.shape, x.dtype)


def levels(x: torch.Tensor) -> torch.Tensor:
    """The step between neighbouring codes, for every element of the 1-D x."""
    rows = torch.nn.functional.pad(x.double(), (0, -len(x) % BLOCK)).view(-1, BLOCK)
    return (rows.abs().amax(1, keepdim=True) / 127).expand_as(rows).flatten()[: len(x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_codes_are_the_formula_of_the_reference(dtype: torch.dtype, count: int) -> None:
    x, seed = values(count, dtype), 1234567890123
    blocks = math.ceil(count / BLOCK)
    codes, scales = quantise(x, seed)
    assert codes.shape == (blocks * BLOCK,) and codes.dtype == torch.int8
    assert scales.shape == (blocks,) and scales.dtype == torch.float32
    index = torch.arange(blocks).unsqueeze(1)
    keys = [eager_random.block_key(k, index) for k in eager_random.seed_keys(seed)]
    uniform = eager_random.random_fraction(*keys).double() / 2**eager_random.FRACTION_BITS
    wanted, largest = reference.quantise(x.double(), uniform)
    assert torch.equal(scales.double(), largest)
    # A float32 product may fall on the other side of a threshold that it all but touches.
    rows = torch.nn.functional.pad(x.double(), (0, blocks * BLOCK - count)).view(-1, BLOCK)
    exact = (127 * rows / largest.unsqueeze(1) + uniform).flatten()
    touches = (exact - exact.round()).abs() < 127 * 2.0**-22
    assert torch.equal(codes[~touches].double(), wanted[~touches])
    assert touches.sum() <= 1 + count // 100 and not codes[count:].any()
    restored = dequantise(codes, scales, (count,), dtype).double()
    ideal = (codes.view(-1, BLOCK).double() / 127 * largest.unsqueeze(1)).flatten()[:count]
    assert ((restored - ideal).abs() <= ideal.abs() * torch.finfo(dtype).eps).all()


def is_unbiased(mean: torch.Tensor, x: torch.Tensor, draws: int) -> bool:
    """Whether the mean of `draws` round trips is x within 5 sigma: each element, and all as one."""
    error = (mean - x.double()) / levels(x)
    # Rounding u + v has variance f (1 - f) <= 1/4 at fraction f, 1/6 over all fractions.
    each = 5 * 0.5 / draws**0.5
    pooled = 5 * (1 / 6 / draws / len(x)) ** 0.5
    outwards = (error * x.sign()).mean().abs()
    return bool(error.abs().max() <= each and error.mean().abs() <= pooled and outwards <= pooled)


def test_unbiased_over_1000_draws() -> None:
    x, draws = values(1024), 1000
    mean = sum(round_trip(x, seed).double() for seed in range(draws)) / draws
    assert is_unbiased(mean, x, draws)
    # What a wrong rounding gives does not pass: to nearest, downwards, and off by 1/100 of a level.
    for offset in (0.5, 0.0):
        codes, scales = reference.quantise(x.double(), torch.full((4, BLOCK), offset).double())
        assert not is_unbiased((codes.view(4, -1) / 127 * scales[:, None]).flatten(), x, draws)
    assert not is_unbiased(mean + 0.01 * levels(x), x, draws)
    assert not is_unbiased(mean + 0.01 * levels(x) * x.sign(), x, draws)


def test_roundings_are_independent_between_elements_blocks_and_seeds() -> None:
    # Half-way between two codes every rounding is a toss of a coin.
    x = torch.full((4 * BLOCK,), 0.5)
    x[::BLOCK] = 1
    seeds = [*range(64), *(k << 32 for k in range(1, 65)), *(2**62 + k for k in range(128))]
    heads = torch.stack([quantise(x, seed)[0] for seed in seeds])[
        :, torch.arange(4 * BLOCK) % 256 > 0
    ]
    assert set(heads.unique().tolist()) == {63, 64}
    coins = (heads - 63).double() * 2 - 1  # [seeds, elements], -1 or 1
    count, size = coins.shape
    assert abs(coins.mean()) < 5 / (count * size) ** 0.5
    between_seeds = coins @ coins.t() / size - torch.eye(count)
    between_elements = coins.t() @ coins / count - torch.eye(size)
    # 5.5 sigma: half a million pairs are looked at.
    assert between_seeds.abs().max() < 5.5 / size**0.5
    assert between_elements.abs().max() < 5.5 / count**0.5
    assert abs(between_elements.square().mean() * count - 1) < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_below_one_level(dtype: torch.dtype) -> None:
    for scale in (1.0, 2.0**-10, 3e4 if dtype == torch.float16 else 1e30):
        x = (values(4000, seed=1) / 12 * scale).to(dtype)
        error = (round_trip(x, 5).double() - x.double()).abs()
        rounding = x.double().abs() * torch.finfo(dtype).eps
        assert (error <= levels(x) * (1 + 1e-5) + rounding).all()
        assert error.max() > 0.5 * levels(x).max()


def test_zeros_come_back_as_zeros() -> None:
    x = values(1000)
    x[::7] = 0
    x[256:512] = 0
    for seed in range(20):
        y = round_trip(x, seed)
        assert not y[x == 0].any() and y.any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_with_a_value_that_is_not_finite_comes_back_as_nan(
    bad: float, dtype: torch.dtype
) -> None:
    x = values(800, dtype)
    x[300] = bad
    y = round_trip(x, 3)
    assert y[256:512].isnan().all()
    assert y[:256].isfinite().all() and y[512:].isfinite().all()


@pytest.mark.parametrize("exponent", [-30, -59, -61, -95, -99, -126, -130, -149])
def test_small_and_denormal_blocks(exponent: int) -> None:
    x = values(BLOCK, seed=2).clamp(-6, 6).double() * 2.0**exponent
    x = x.float()
    mean = sum(round_trip(x, seed).double() for seed in range(100)) / 100
    # One level, or one denormal step where a level is finer than that.
    step = torch.clamp(levels(x), min=2.0**-149)
    assert ((round_trip(x, 0).double() - x.double()).abs() <= step * (1 + 1e-5)).all()
    assert ((mean - x.double()).abs() <= 0.4 * step + 2.0**-149).all()
    assert not quantise(torch.zeros(BLOCK), 1)[0].any()


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last_3d": lambda x: x.to(memory_format=torch.channels_last_3d),
    "permuted": lambda x: x.permute(2, 0, 4, 1, 3),
    "offset": lambda x: x[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_tensors_are_read_in_memory_order(layout: str) -> None:
    x = LAYOUTS[layout](values(2 * 5 * 3 * 4 * 7).view(2, 5, 3, 4, 7))
    in_memory = torch.as_strided(x, (x.numel(),), (1,))
    codes, scales = quantise(x, 9)
    assert torch.equal(codes, quantise(in_memory, 9)[0])
    y = dequantise(codes, scales, x.shape, x.dtype, x.stride())
    assert y.stride() == x.stride()
    assert torch.equal(torch.as_strided(y, (y.numel(),), (1,)), round_trip(in_memory, 9))


@pytest.mark.parametrize(
    "x", [values(600)[::2], values(10).expand(30, 10), values(600).view(20, 30)[:, 3:20]]
)
def test_other_tensors_are_made_contiguous(x: torch.Tensor) -> None:
    codes, scales = quantise(x, 4)
    assert torch.equal(codes, quantise(x.contiguous(), 4)[0])
    assert torch.equal(dequantise(codes, scales, x.shape), round_trip(x.flatten(), 4).view(x.shape))


def test_empty_and_scalar() -> None:
    for size in ((0,), (0, 8, 4, 4, 4)):
        codes, scales = quantise(torch.empty(size), 1)
        assert codes.shape == scales.shape == (0,)
        assert dequantise(codes, scales, size).shape == size
    assert round_trip(torch.tensor(-2.5), 1) == -2.5


def test_the_same_seed_gives_the_same_codes_and_another_gives_others() -> None:
    x = values(2000)
    assert torch.equal(quantise(x, 7)[0], quantise(x, 7)[0])
    for other in (8, 7 + 2**32, 7 + 2**62):
        assert (quantise(x, 7)[0] != quantise(x, other)[0]).float().mean() > 0.1


def test_refusals() -> None:
    x = values(300)
    codes, scales = quantise(x, 0)
    with pytest.raises(TypeError, match="x: got torch.float64, wanted float32, bfloat16"):
        quantise(x.double(), 0)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed: got {seed}, wanted 0 to"):
            quantise(x, seed)
    with pytest.raises(TypeError, match="dtype: got torch.float64"):
        dequantise(codes, scales, (300,), torch.float64)
    with pytest.raises(TypeError, match="codes: got torch.int16, wanted torch.int8"):
        dequantise(codes.short(), scales, (300,))
    with pytest.raises(TypeError, match="scales: got torch.float64, wanted torch.float32"):
        dequantise(codes, scales.double(), (300,))
    with pytest.raises(ValueError, match=r"codes: got shape \(512,\), wanted \(768,\)"):
        dequantise(codes, scales, (600,))
    with pytest.raises(ValueError, match=r"scales: got shape \(1,\), wanted \(2,\)"):
        dequantise(codes, scales[:1], (300,))
    with pytest.raises(ValueError, match=r"stride: got \(20, 1\), wanted strides without gaps"):
        dequantise(codes, scales, (30, 10), stride=(20, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](values(2 * 5 * 3 * 4 * 7, dtype).view(2, 5, 3, 4, 7))
    torch.library.opcheck(OPS.quantise, (x, torch.tensor(3)))
    codes, scales = OPS.quantise(x, torch.tensor(3))
    torch.library.opcheck(OPS.dequantise, (codes, scales, list(x.shape), list(x.stride()), x.dtype))
