"""The estimate against what autograd keeps (to the byte) and what a step allocates (10 %)."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from petite_fast import LoraConfig, SSFConfig, get_peft_model
from petite_fast.errors import InputError
from petite_fast.models import CVTGANDiscriminator, CVTGANGenerator
from petite_fast.ops import saved_bytes
from petite_fast.peft.mix import recipe as recipe_config
from petite_fast.training.memory import (
    Budget,
    MemoryEstimate,
    estimate,
    largest_batch,
    largest_patch,
)
from petite_fast.training.objectives import GANObjective, L1Objective

nets = pytest.importorskip("monai.networks.nets")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small volumes, many of them: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cvtgan() -> nn.Module:
    return CVTGANGenerator((8, 16, 16, 32), encoder_depths=(1, 1, 1), decoder_depths=(1, 1))


def unetr() -> nn.Module:
    from petite_fast.models import UNETR

    return UNETR(32, feature_size=8, hidden_size=24, mlp_dim=48, num_heads=2)


def unet() -> nn.Module:
    return nets.UNet(3, 1, 1, (16, 32, 64), (2, 2), num_res_units=2)


def blocks(norm: Callable[[int], nn.Module] = nn.InstanceNorm3d) -> nn.Sequential:
    """Twice convolution, norm, LeakyReLU."""
    layers: list[nn.Module] = []
    for channels in (1, 16):
        layers += [nn.Conv3d(channels, 16, 3, padding=1), norm(16), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def adapted(net: nn.Module, recipe: str, memory: Any = "exact") -> nn.Module:
    if recipe == "full":
        return net
    if isinstance(net, nets.UNet):
        return get_peft_model(net, LoraConfig(r=4), memory=memory)
    name = net.network
    return get_peft_model(net, recipe_config(name, recipe), memory=memory)  # type: ignore


def measured_peak(net: nn.Module, batch: int, side: int = 32) -> int:
    """Largest allocation of the second training step, batch included, by the profiler."""
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        y = net(torch.randn(batch, 1, side, side, side))
        y.backward(torch.ones_like(y))
        optimiser.step()
        optimiser.zero_grad()

    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        step()
    kineto: Any = trace.profiler
    events = kineto.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return highest


@pytest.mark.parametrize(
    ("make", "recipe", "memory", "batch"),
    [
        (cvtgan, "full", "exact", 2),
        (cvtgan, "petite", "exact", 1),
        (cvtgan, "lora+adapter", "checkpoint", 2),
        (unetr, "full", "exact", 1),
        (unetr, "petite", "exact", 1),
        (unet, "full", "exact", 2),
        (unet, "lora", "exact", 2),
        (unet, "lora", "int8", 1),
    ],
)
def test_against_a_real_step(make, recipe, memory, batch) -> None:
    torch.manual_seed(0)
    net = adapted(make(), recipe, memory).train()
    found = estimate(net, (32, 32, 32), batch)
    x = torch.randn(batch, 1, 32, 32, 32)
    assert found.activation_bytes == saved_bytes(lambda: net(x))
    trained = sum(4 * p.numel() for p in net.parameters() if p.requires_grad)
    assert found.gradient_bytes == trained
    tensors = [*net.parameters(), *net.buffers()]
    assert found.parameter_bytes == sum(t.nbytes for t in tensors)
    steps = len([p for p in net.parameters() if p.requires_grad])  # a number each
    assert found.optimiser_bytes == 2 * trained + 4 * steps
    peak = measured_peak(net, batch)
    assert found.step_bytes == pytest.approx(peak, rel=0.1)
    assert found.total == found.parameter_bytes + found.optimiser_bytes + found.step_bytes
    parts = (found.activation_bytes, found.gradient_bytes, found.workspace_bytes)
    assert max(parts) <= found.step_bytes <= sum(parts)


def test_a_network_without_values_is_as_one_at_its_start() -> None:
    with torch.device("meta"):
        empty = adapted(cvtgan(), "ssf")
    assert estimate(empty, (32,) * 3, 2, device="cpu") == estimate(
        adapted(cvtgan(), "ssf"), (32,) * 3, 2
    )


@pytest.mark.parametrize("name", ["0.ssf_scale", "1.weight"])
def test_values_that_ops_look_at_are_the_networks(name: str) -> None:
    """What can be read back from an output depends on which scales are near zero."""
    norm = functools.partial(nn.InstanceNorm3d, affine=True)
    net = get_peft_model(blocks(norm), SSFConfig(target_modules=["0"])).train()
    x = torch.randn(1, 1, 16, 16, 16)
    kept = []
    for value in (1.0, 0.0):
        with torch.no_grad():
            net.get_parameter(name)[:2] = value
        kept.append(estimate(net, (16,) * 3, 1).activation_bytes)
        assert kept[-1] == saved_bytes(lambda: net(x))
    assert kept[0] != kept[1]


def test_saved_bytes_of_a_meta_run() -> None:
    net = blocks()
    x = torch.randn(1, 1, 8, 8, 8)
    real = saved_bytes(lambda: net(x))
    net.to("meta")
    assert saved_bytes(lambda: net(x.to("meta"))) == real > 0


def test_mixed_precision() -> None:
    net = get_peft_model(blocks(), LoraConfig(r=4)).train()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: net(x))
    half, full = (estimate(net, (16,) * 3, 1, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert half.activation_bytes == kept < full.activation_bytes
    assert half.parameter_bytes == full.parameter_bytes


def test_an_objective_adds_its_discriminator() -> None:
    net = adapted(cvtgan(), "petite")
    judge = CVTGANDiscriminator((4, 4, 8, 8))
    alone = estimate(net, (32,) * 3, 1)
    judged = estimate(net, (32,) * 3, 1, objective=GANObjective(judge, train_discriminator=False))
    extra = sum(t.nbytes for t in (*judge.parameters(), *judge.buffers()))
    assert judged.parameter_bytes - alone.parameter_bytes == extra
    assert judged.activation_bytes > alone.activation_bytes
    assert judged.optimiser_bytes == alone.optimiser_bytes


def test_the_network_is_not_touched() -> None:
    net = adapted(cvtgan(), "petite").eval()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    estimate(net, (32,) * 3, 1)
    assert torch.equal(torch.get_rng_state(), state) and not net.training
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None and not p.is_meta for p in net.parameters())


def test_optimisers() -> None:
    net = blocks()
    found = estimate(net, (16,) * 3, 1, optimiser="sgd")
    assert found.optimiser_bytes == 0 < found.gradient_bytes
    with pytest.raises(ValueError, match="optimiser is 'lion', wanted one of adamw, sgd"):
        estimate(net, (16,) * 3, 1, optimiser="lion")


class Picks(nn.Module):
    """The number of values that come out depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.scale
        return y[y > 0]


def test_what_cannot_be_estimated_is_said() -> None:
    with pytest.raises(InputError, match="Picks cannot be estimated: an op of it needs values"):
        estimate(Picks(), (16,) * 3, 1)
    with pytest.raises(InputError, match="nothing trains"):
        estimate(blocks().requires_grad_(False), (16,) * 3, 1)
    with pytest.raises(InputError, match="batch is 0, expected at least 1"):
        estimate(blocks(), (16,) * 3, 0)


def test_largest_patch_and_batch() -> None:
    net = get_peft_model(blocks(), LoraConfig(r=4))

    def of(side: int, batch: int) -> MemoryEstimate:
        return estimate(net, (side,) * 3, batch)

    budget = (of(32, 2).total + of(32, 3).total) // 2
    assert of(48, 1).total > budget
    patch, batch, found = largest_patch(lambda _: net, budget)
    assert (patch, batch) == ((32, 32, 32), 2) and found == of(32, 2)
    assert largest_patch(lambda _: net, budget, 8)[:2] == ((16, 16, 16), 8)
    assert largest_patch(lambda _: net, budget, largest=16)[:2] == ((16, 16, 16), 8)
    assert largest_patch(lambda _: net, budget, multiple=8)[0] == (40, 40, 40)
    flat, batch, found = largest_batch(lambda _: net, budget, (16, 32, 32))
    assert flat == (16, 32, 32) and 2 < batch < 8
    assert found.total <= budget < estimate(net, flat, batch + 1).total
    with pytest.raises(InputError, match=r"16x16x16 with batch 1 takes [\d.]+ MiB, more than the"):
        largest_patch(lambda _: net, of(16, 1).total - 1)
    with pytest.raises(InputError, match="16x16x16 with batch 2 takes"):
        largest_patch(lambda _: net, of(16, 1).total, smallest_batch=2)


def test_the_network_may_depend_on_the_patch() -> None:
    seen = []

    def build(patch: tuple[int, ...]) -> nn.Module:
        seen.append(patch)
        return blocks()

    largest_patch(build, 2**40, largest=32)
    assert set(seen) == {(16, 16, 16), (32, 32, 32)}


def test_budget_chooses_what_is_open(caplog: pytest.LogCaptureFixture) -> None:
    net = blocks().append(nn.Conv3d(16, 1, 1))
    options: dict[str, Any] = {
        "precision": "32-true", "objective": L1Objective(),
        "smallest": 16, "largest": 30, "smallest_batch": 1,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="petite_fast"):
        assert Budget(2**40).choose(net, None, **options) == ((32, 32, 32), 8)
    assert "budget of 1024.00 GiB: patch 32x32x32, batch 8, " in caplog.text
    assert Budget(2**40, batch=3).choose(net, None, **options) == ((32, 32, 32), 3)
    assert Budget(2**40).choose(net, (16, 16, 32), **options) == ((16, 16, 32), 8)
    assert Budget(2**40, batch=2).choose(net, (16, 16, 32), **options) == ((16, 16, 32), 2)
    with pytest.raises(InputError, match="16x16x32 with batch 2 takes .* budget of 1.0 MiB"):
        Budget(2**20, batch=2).choose(net, (16, 16, 32), **options)
    with pytest.raises(InputError, match="expected three multiples of 16"):
        Budget(2**40, batch=2).choose(net, (16, 16, 30), **options)
