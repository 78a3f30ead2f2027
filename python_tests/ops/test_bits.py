"""Signs as bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from petite_fast.backends import eager, native, native_norm_act
from petite_fast.ops import pack_signs, unpack_signs

LENGTHS = [1, 2, 7, 8, 9, 16, 17, 63, 4096, 9001]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_there_and_back(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, length).to(dtype)
    x[0, 0, 0] = 0
    bits = pack_signs(x)
    wanted = np.packbits((x > 0).numpy(), axis=-1, bitorder="little")
    assert bits.dtype == torch.uint8 and np.array_equal(bits.numpy(), wanted)
    assert torch.equal(unpack_signs(bits, length), x > 0)
    assert torch.equal(eager.pack_signs(x), bits)
    assert torch.equal(eager.unpack_signs(bits, length), x > 0)


def test_zero_nan_and_infinity() -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1.0])
    for function in (pack_signs, eager.pack_signs):
        assert function(x).tolist() == [0b10101000]


def test_a_strided_tensor_and_one_without_elements() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(pack_signs(x.t()), pack_signs(x.t().contiguous()))
    assert pack_signs(torch.empty(0, 9)).shape == (0, 2)
    assert unpack_signs(torch.empty(0, 2, dtype=torch.uint8), 9).shape == (0, 9)


def test_misuse() -> None:
    with pytest.raises(TypeError, match="x: got torch.int64"):
        pack_signs(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="scalar"):
        pack_signs(torch.tensor(1.0))
    with pytest.raises(TypeError, match="bits: got torch.float32"):
        unpack_signs(torch.ones(2), 9)
    with pytest.raises(ValueError, match=r"bits: got shape \(2,\), wanted \[..., 1\] for 8 signs"):
        unpack_signs(torch.ones(2, dtype=torch.uint8), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 11).to(dtype)
    torch.library.opcheck(torch.ops.petite_fast.pack_signs, (x,))
    torch.library.opcheck(torch.ops.petite_fast.unpack_signs, (pack_signs(x), 11))


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads: int) -> None:
    x = torch.randn(5, 70001)
    assert native_norm_act.can_run_pack_signs(x) == (True, "")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bits = native_norm_act.pack_signs(x)
        positive = native_norm_act.unpack_signs(bits, 70001)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits, eager.pack_signs(x)) and torch.equal(positive, x > 0)


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
def test_native_refusals() -> None:
    x = torch.randn(3, 11)
    assert "torch.float64" in native_norm_act.can_run_pack_signs(x.double())[1]
    assert "not contiguous" in native_norm_act.can_run_pack_signs(x.t())[1]
    assert "empty" in native_norm_act.can_run_pack_signs(x[:0])[1]
    assert "'meta'" in native_norm_act.can_run_unpack_signs(pack_signs(x).to("meta"), 11)[1]
