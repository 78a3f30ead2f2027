"""Dropout by a hash of the seed: probability, backward, what is kept, memory formats, backends."""

from __future__ import annotations

import pytest
import torch

from petite_fast.backends import eager_random, native, native_dropout
from petite_fast.ops import dropout, saved_bytes, storage
from petite_fast.ops.remade import keep, restore

OPS = torch.ops.petite_fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_zeros_and_scale(p: float) -> None:
    x = torch.full((1 << 16,), 3.0)
    y = dropout(x, p, seed_of(7))
    kept = y != 0
    # Five standard deviations of a binomial.
    assert abs(kept.double().mean().item() - (1 - p)) <= 5 * (p * (1 - p) / len(x)) ** 0.5
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 3 / (1 - p)))


def test_elements_and_seeds_are_independent() -> None:
    x = torch.ones(1 << 16)
    masks = torch.stack([dropout(x, 0.5, seed_of(s)) > 0 for s in (0, 1, 2**40)]).double() - 0.5
    limit = 5 * 0.25 / len(x) ** 0.5
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[first] * masks[second]).mean().item()) <= limit
    for shift in (1, 2, 255, 256, 257, 4096):
        assert abs((masks[0] * masks[0].roll(shift)).mean().item()) <= limit


def test_backward_has_the_mask_of_the_forward() -> None:
    x = torch.randn(3, 5, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3, seed_of(5))
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    mask = dropout(torch.ones_like(x), 0.3, seed_of(5))
    assert torch.equal(y, x.detach() * mask) and torch.equal(x.grad, grad_y * mask)


def test_backward_with_another_memory_format() -> None:
    x = torch.randn(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d).requires_grad_()
    y = dropout(x, 0.3, seed_of(5))
    assert y.stride() == x.stride()
    y.backward(torch.ones(y.shape))  # contiguous
    assert torch.equal(x.grad != 0, y != 0)


def test_a_tensor_with_gaps() -> None:
    x = torch.randn(4, 10)[:, ::2].requires_grad_()
    y = dropout(x, 0.5, seed_of(1))
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_nothing_is_kept_and_x_is_kept_for_the_result() -> None:
    x = torch.randn(1, 4, 16, 16, 16, requires_grad=True)
    assert saved_bytes(lambda: dropout(x, 0.1)) <= 8
    y = dropout(x, 0.1, seed_of(3))
    kept, record = keep(y)
    assert kept[0] is x
    assert torch.equal(restore(kept, record), y)
    with storage("int8"):
        kept, record = keep(y)
    restored = restore(kept, record)
    assert kept[0].dtype == torch.int8 and not restored[y == 0].any()
    assert (restored - y).abs().max() <= x.abs().max() / 127 / 0.9


def test_drawn_from_the_generator_of_torch() -> None:
    x = torch.ones(1000)
    torch.manual_seed(0)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)


def test_special_values_and_empty() -> None:
    x = torch.tensor([float("inf"), float("nan"), -0.0] * 100)
    y = dropout(x, 0.5, seed_of(2))
    assert ((y == 0) | y.isinf() | y.isnan()).all()  # a dropped infinity is 0, not NaN
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert torch.equal(dropout(x, 0.0).nan_to_num(1), x.nan_to_num(1))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_refused_rates(p: float) -> None:
    with pytest.raises(ValueError, match=r"p: got .*, wanted a number in \[0, 1\)"):
        dropout(torch.ones(3), p)


def test_refused_dtype() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        dropout(torch.ones(3, dtype=torch.int32))


def test_opcheck() -> None:
    torch.library.opcheck(OPS.dropout.default, (torch.randn(3, 300), 0.25, seed_of(9)))


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 100_003])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_native_is_eager_bit_by_bit(dtype: torch.dtype, count: int, isa: str) -> None:
    info = native.build_info()
    if isa not in info["isas_usable"]:
        pytest.skip(f"this CPU does not run {isa}")
    module, _ = native._load()
    x = (torch.randn(count) * 10).to(dtype)
    module.set_isa(isa)
    try:
        for number in (0, 2**33 + 5, 2**63 - 1):
            arguments = (x, 0.3, seed_of(number))
            assert native_dropout.can_run_dropout(*arguments) == (True, "")
            ours = native_dropout.dropout(*arguments)
            assert torch.equal(ours, eager_random.dropout(*arguments))
    finally:
        module.set_isa(info["isa"])


def test_native_refuses() -> None:
    possible, reason = native_dropout.can_run_dropout(torch.ones(3).double(), 0.1, seed_of(0))
    assert not possible and "float64" in reason
    assert not native_dropout.can_run_dropout(torch.ones(0), 0.1, seed_of(0))[0]
