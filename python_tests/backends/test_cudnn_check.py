"""The look at cuDNN's convolutions: a wrong one is found, gone round, and spoken of once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from petite_fast.backends import cudnn_check, eager

CPU = torch.device("cpu")


def spoilt(place: int, change: Any) -> Any:
    """`convolution` with one of its results changed."""

    def convolve(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = list(cudnn_check.convolution(*tensors))
        results[place] = change(results[place])
        return tuple(results)

    return convolve


@pytest.mark.parametrize("dtype", cudnn_check.DTYPES, ids=str)
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert cudnn_check.find_wrong(CPU, dtype) == []
    assert torch.equal(torch.get_rng_state(), state)


def lose_a_plane(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[:, :, -1] = 0
    return tensor


@pytest.mark.parametrize("dtype", cudnn_check.DTYPES, ids=str)
@pytest.mark.parametrize(
    "change", [lose_a_plane, lambda t: t * 1.03, lambda t: t * float("nan")], ids="abc"
)
def test_what_is_wrong_is_found(dtype: torch.dtype, change: Any) -> None:
    for place, name in enumerate(("y", "grad_x", "grad_weight")):
        wrong = cudnn_check.find_wrong(CPU, dtype, spoilt(place, change))
        assert wrong == [f"{name} contiguous", f"{name} channels-last"]


def test_one_layout_is_enough() -> None:
    def convolve(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = cudnn_check.convolution(*tensors)
        last = not tensors[0].is_contiguous()
        return tuple(each * 0 for each in results) if last else results

    wrong = cudnn_check.find_wrong(CPU, torch.float32, convolve)
    assert wrong == [f"{name} channels-last" for name in ("y", "grad_x", "grad_weight")]


def test_what_fails_is_wrong_but_not_for_want_of_memory() -> None:
    def fail(error: Exception) -> Any:
        def convolve(*_: torch.Tensor) -> Any:
            raise error

        return convolve

    wrong = cudnn_check.find_wrong(CPU, torch.float32, fail(RuntimeError("no engine\nat ...")))
    assert wrong == ["no engine", "no engine"]
    with pytest.raises(torch.OutOfMemoryError):
        cudnn_check.find_wrong(CPU, torch.float32, fail(torch.OutOfMemoryError()))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device that nobody has looked at, and that is not there."""
    monkeypatch.setattr(cudnn_check, "_right", {})
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.device("cuda", 0)


def test_a_device_is_looked_at_once_for_each_dtype(
    card: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def find_wrong(device: torch.device, dtype: torch.dtype) -> list[str]:
        asked.append((device, dtype))
        return ["grad_x contiguous"] if dtype == torch.bfloat16 else []

    monkeypatch.setattr(cudnn_check, "find_wrong", find_wrong)
    for _ in range(3):
        assert not cudnn_check.is_right(card, torch.bfloat16)
        assert cudnn_check.is_right(card, torch.float32)
    assert asked == [(card, torch.bfloat16), (card, torch.float32)]
    (record,) = caplog.records
    assert "convolutions of bfloat16 wrongly on cuda:0 (grad_x contiguous)" in record.getMessage()


def test_where_it_cannot_be_looked_at(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> list[str]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cudnn_check, "find_wrong", full)
    assert cudnn_check.is_right(card, torch.float32)
    monkeypatch.setattr(cudnn_check, "find_wrong", lambda *_: ["y"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cudnn_check.is_right(card, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert cudnn_check.is_right(card, torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    assert not cudnn_check.is_right(card, torch.float32)


@pytest.mark.parametrize("right", [True, False])
def test_convolutions_go_round_it(
    right: bool, card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three products of the eager backend on a CUDA device, and nothing else."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if "convolution" in func.name():
                seen.append((args[0].device.type, torch.backends.cudnn.enabled))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(cudnn_check, "find_wrong", lambda *_: [] if right else ["y"])
    geometry = ([1] * 3, [1] * 3, [1] * 3)
    with FakeTensorMode(), Watch():
        for device in ("cuda", "cpu"):
            x = torch.empty(2, 4, 5, 6, 7, device=device)
            weight = torch.empty(8, 4, 3, 3, 3, device=device)
            y = eager.conv(x, weight, None, *geometry, False, [0] * 3, 1)
            if device == "cuda":
                eager.conv_grad_input(y, weight, list(x.shape), *geometry, False, [0] * 3, 1)
            eager.conv_grad_weight(y, x, list(weight.shape), *geometry, 1)
            assert torch.backends.cudnn.enabled
    assert seen == [("cuda", right)] * 3 + [("cpu", True)] * 2


def test_cudnn_is_on_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), cudnn_check.without_cudnn():
        assert not torch.backends.cudnn.enabled
        raise ZeroDivisionError
    assert torch.backends.cudnn.enabled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", cudnn_check.DTYPES, ids=str)
def test_cuda_without_cudnn_is_right(dtype: torch.dtype) -> None:
    """The way round is right, whatever cuDNN is."""
    device = torch.device("cuda", torch.cuda.current_device())
    with cudnn_check.without_cudnn():
        assert cudnn_check.find_wrong(device, dtype) == []
