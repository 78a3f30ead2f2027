"""A training step in a CUDA graph: nothing in it reads a value back from the device.

Without a GPU the same step is run where reading a value is an error, told that it is captured.
Outside a capture the values of SSF scales and of trained norms are looked at once per step.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from petite_fast import LoraConfig, SSFConfig, get_peft_model, petite_recipe
from petite_fast.models import CVTGANGenerator
from petite_fast.nn import lean_attention
from petite_fast.ops import adapted as adapted_op
from petite_fast.ops import norm_act_plan

RATE = 0.05


def block() -> nn.Module:
    """Convolutions of several kinds, norms that invert and norms that do not."""
    return nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU(0.1),
        nn.Conv3d(16, 16, 3, stride=2, padding=1, groups=4), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 24, 1), nn.GroupNorm(4, 24), nn.GELU(), nn.ConvTranspose3d(24, 16, 2, 2),
        nn.Conv3d(16, 1, 3, padding=1, padding_mode="replicate"),
    )  # fmt: skip


def cvtgan() -> nn.Module:
    return CVTGANGenerator(widths=(8, 16, 16, 32))


CASES: dict[str, Any] = {
    "lora": (block, LoraConfig(r=4)),
    "lora-fa": (block, LoraConfig(r=4, train_a=False)),
    "ssf": (cvtgan, SSFConfig()),
    "petite": (cvtgan, petite_recipe("cvtgan")),
}


def adapted(name: str) -> tuple[Any, torch.Tensor]:
    """The network with adapters away from the identity, and its input."""
    torch.manual_seed(0)
    build, config = CASES[name]
    net = build()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    model = get_peft_model(net, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    return model, torch.randn(2, 1, 16, 16, 16)


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One step of gradient descent; the loss."""
    loss = model(x).square().mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(RATE * p.grad)
                p.grad = None
    return loss.detach()


class Waits(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name == each or name.startswith("unique") for each in self.names), name
        return func(*args, **(kwargs or {}))


def test_a_read_is_seen() -> None:
    for read in (bool, float, torch.Tensor.item, torch.Tensor.nonzero):
        with pytest.raises(AssertionError), Waits():
            read(torch.ones(()))


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETITE_FAST_BACKEND", "eager")
    monkeypatch.setattr(norm_act_plan, "_can_look", lambda x: False)
    monkeypatch.setattr(adapted_op, "_readable_from_output", lambda *_: False)
    model, x = adapted(name)
    with Waits():
        first, second = step(model, x), step(model, x)
    assert second != first  # it trains


def test_shifted_windows_read_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    pytest.importorskip("einops")
    from monai.networks.nets.swin_unetr import BasicLayer

    monkeypatch.setattr(lean_attention, "_groupings", {})
    layer = BasicLayer(8, 2, 2, (3, 3, 3), [0.0, 0.0], qkv_bias=True)
    model = get_peft_model(layer, LoraConfig(r=2))
    x = torch.randn(1, 8, 6, 6, 9)
    assert torch.isfinite(step(model, x))
    with Waits():
        step(model, x)
    assert len(lean_attention._groupings) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph_of_a_step(
    name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once and replayed, it trains as the same steps do one by one."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = adapted(name)
    model.cuda().to(memory_format=layout)
    x = x.cuda().contiguous(memory_format=layout)
    plain = copy.deepcopy(model)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, x)
    captured = []
    for _ in range(3):
        graph.replay()
        captured.append(loss.clone())

    single = [step(plain, x) for _ in range(5)]
    torch.testing.assert_close(torch.stack(captured), torch.stack(single[2:]), rtol=1e-4, atol=0)
    assert single[-1] != single[0]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_on_another_stream_and_device() -> None:
    """A step on the last device, on a stream of its own, with device 0 the current one."""
    model, x = adapted("lora")
    wanted = [step(model, x) for _ in range(2)]
    model, x = adapted("lora")
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    model.to(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.cuda.device(0):
        found = [step(model, x.to(device)) for _ in range(2)]
    stream.synchronize()
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(wanted), rtol=1e-2, atol=0)
