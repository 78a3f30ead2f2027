"""What the ops keep for backward in 8-bit storage: bytes, gradients, sharing, training, compile."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from petite_fast.ops import (
    adapted_conv,
    adapted_linear,
    bottleneck,
    compress,
    saved_bytes,
    storage,
)

BLOCK = 256
# Sizes are multiples of 256 elements unless said: then codes have no padding.
C, OUT, R = 8, 16, 2


def values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3


def parameter(*shape: int, trains: bool = True) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape, generator=generator) * 0.1, requires_grad=trains)


def lora(train_a: bool = True, out: int = OUT) -> dict[str, Any]:
    return {
        "weight": parameter(out, C, 3, 3, 3, trains=False),
        "lora_A": parameter(R, C, 3, 3, 3, trains=train_a),
        "lora_B": parameter(out, R),
        "padding": 1,
    }


def volume(*size: int) -> torch.Tensor:
    return values(math.prod(size)).view(size).requires_grad_()


def packed(count: int) -> int:
    """Bytes of `count` elements in 8 bits."""
    blocks = math.ceil(count / BLOCK)
    return blocks * (BLOCK + 4)


def test_bytes_kept() -> None:
    x = volume(2, C, 8, 8, 8)
    gamma, tokens = nn.Parameter(torch.ones(OUT)), volume(4, 256, C)
    weight, odd = parameter(OUT, C, trains=False), volume(1, C, 9, 9, 9)
    adapter = [parameter(*size) for size in ((2, C), (2,), (C, 2), (C,))]
    with storage("int8"):
        assert saved_bytes(lambda: adapted_conv(x, **lora())) == x.numel() + 4 * x.numel() // BLOCK
        assert saved_bytes(lambda: adapted_conv(odd, **lora())) == packed(odd.numel())
        wide = volume(2, C, 16, 16, 16)  # LoRA-FA keeps R of C channels
        assert saved_bytes(lambda: adapted_conv(wide, **lora(train_a=False))) == packed(
            wide.numel() * R // C
        )
        # Scale and shift keep the output.
        frozen = lora()["weight"]
        assert saved_bytes(lambda: adapted_conv(x, frozen, gamma=gamma, padding=1)) == packed(
            2 * OUT * 8**3
        )
        assert saved_bytes(
            lambda: adapted_linear(tokens, weight, lora_A=parameter(R, C), lora_B=parameter(OUT, R))
        ) == packed(tokens.numel())
        assert saved_bytes(lambda: bottleneck(tokens, *adapter)) == packed(tokens.numel())
        with torch.autocast("cpu", torch.bfloat16):
            assert saved_bytes(lambda: adapted_conv(x, **lora())) == packed(x.numel())
        with torch.no_grad():
            before = torch.get_rng_state()
            assert saved_bytes(lambda: bottleneck(tokens, *adapter)) == 0
            assert saved_bytes(lambda: adapted_conv(x, **lora())) == 0
            assert torch.equal(torch.get_rng_state(), before)
    assert saved_bytes(lambda: adapted_conv(x, **lora())) == x.nbytes


def test_what_stays_exact() -> None:
    exact = [values(4095), values(5000).double(), torch.arange(5000), nn.Parameter(values(5000))]
    with storage("int8"):
        for tensor in exact:
            kept, packing = compress.keep(tensor)
            assert kept[0] is tensor and kept[1] is None and packing is None
            assert compress.restore(kept, packing) is tensor
        kept, packing = compress.keep(exact[3].detach())
        assert kept[0].dtype == torch.int8 and packing is not None
    kept, packing = compress.keep(exact[3].detach())
    assert kept[1] is None and packing is None


def test_the_mode_nests_and_belongs_to_the_thread() -> None:
    assert compress.active() == "exact"
    elsewhere: list[str] = []
    with pytest.raises(KeyError), storage("int8"):
        with storage("exact"):
            assert compress.active() == "exact"
        assert compress.active() == "int8"
        thread = threading.Thread(target=lambda: elsewhere.append(compress.active()))
        thread.start()
        thread.join()
        raise KeyError
    assert compress.active() == "exact" and elsewhere == ["exact"]
    with pytest.raises(ValueError, match="mode: got 'int4', wanted one of"), storage("int4"):
        pass


def test_a_tensor_kept_twice_counts_once() -> None:
    x, first, second = volume(1, C, 8, 8, 8), lora(), lora(out=C)

    def both() -> list[torch.Tensor]:
        return [adapted_conv(x, **first), adapted_conv(x, **second)]

    def output_then_input() -> torch.Tensor:
        gamma = nn.Parameter(torch.ones(C))
        y = adapted_conv(x, second["weight"], gamma=gamma, padding=1)  # keeps y
        return adapted_conv(y, **first)  # keeps y as its x

    def modified() -> list[torch.Tensor]:
        y = x * 1
        outputs = [adapted_conv(y, **first)]
        y += 1
        return [*outputs, adapted_conv(y, **second)]

    with storage("int8"):
        assert saved_bytes(both) == packed(x.numel())
        assert saved_bytes(output_then_input) == packed(x.numel())
        assert saved_bytes(modified) == 2 * packed(x.numel())
    assert not vars(x)  # nothing is left on the tensor that a pickle would have to carry


def gradients(x: torch.Tensor, layer: dict[str, Any]) -> list[torch.Tensor]:
    y = adapted_conv(x, **layer)
    target = torch.sin(torch.arange(y.numel())).view(y.shape)
    return list(torch.autograd.grad((y * target).sum(), [x, layer["lora_A"], layer["lora_B"]]))


@pytest.mark.parametrize("out", [OUT, 64], ids=["full", "low-rank"])
def test_gradient_of_lora_is_unbiased_and_grad_x_exact(out: int) -> None:
    x, layer, draws = volume(1, C, 8, 8, 8), lora(out=out), 200
    exact = gradients(x, layer)
    torch.manual_seed(0)
    with storage("int8"):
        drawn = [gradients(x, layer) for _ in range(draws)]
    assert all(torch.equal(grads[0], exact[0]) for grads in drawn)
    for position in (1, 2):
        samples = torch.stack([grads[position] for grads in drawn]).double()
        sigma = samples.std(0) / draws**0.5
        # The same x tensor in every step: each step has rounding errors of its own.
        assert (sigma > 0).all()
        assert ((samples.mean(0) - exact[position]).abs() <= 5 * sigma).all()
        distance = (samples - exact[position]).flatten(1).norm(dim=1) / exact[position].norm()
        assert distance.max() < 0.05


def test_manual_seed_makes_it_reproducible() -> None:
    x, layer = volume(1, C, 8, 8, 8), lora()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with storage("int8"):
            runs.append(gradients(x, layer)[1])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def train(mode: str) -> list[float]:
    """Losses of 50 steps of a two-layer LoRA network."""
    layers = [lora(out=C), lora(out=C)]
    trained = [layer[name] for layer in layers for name in ("lora_A", "lora_B")]
    x, target = values(4 * C * 6**3, seed=3).view(4, C, 6, 6, 6), values(4 * C * 6**3, seed=4)
    optimiser = torch.optim.Adam(trained, lr=0.02)
    torch.manual_seed(0)
    losses = []
    for _ in range(50):
        with storage(mode):
            y = adapted_conv(nn.functional.leaky_relu(adapted_conv(x, **layers[0])), **layers[1])
        loss = (y.flatten() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_training_reaches_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, ours = train("exact"), train("int8")
    progress = exact[0] - exact[-1]
    assert progress > 0.02 * exact[0]
    assert ours[0] == exact[0] and ours != exact
    assert abs(ours[-1] - exact[-1]) < 0.001 * progress

    def downwards(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = torch.ops.petite_fast.quantise(x, seed)
        return codes.div(2, rounding_mode="floor") * 2, scales

    # One bit less, rounded down, is a quantiser that the bound would not let pass.
    monkeypatch.setattr(compress.library, "quantise", downwards)
    assert abs(train("int8")[-1] - exact[-1]) > 0.002 * progress


@pytest.mark.parametrize("inside", [False, True])
def test_checkpoint_computes_the_same_again(inside: bool) -> None:
    x, layer = volume(1, C, 8, 8, 8), lora(out=C)

    def region(y: torch.Tensor) -> torch.Tensor:
        with storage("int8") if inside else contextlib.nullcontext():
            y = adapted_conv(y, **layer)
            y = nn.functional.dropout(y, 0.5)
            return adapted_conv(y, **layer)

    def step(run: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with storage("int8"):
            # Codes of x that the region shares, and that are gone when it is computed again.
            before, after = adapted_conv(x, **layer).sum(), run(x).square().sum()
        before.backward(inputs=[layer["lora_A"]])
        return list(torch.autograd.grad(after, [x, layer["lora_A"], layer["lora_B"]]))

    def checkpointed(y: torch.Tensor) -> Any:
        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), storage("exact" if inside else "int8")

        return checkpoint(region, y, use_reentrant=False, context_fn=contexts)

    plain, again = step(region), step(checkpointed)
    torch.testing.assert_close(again[0], plain[0])
    for got, wanted in zip(again[1:], plain[1:], strict=True):
        # Codes of x that are made again have another seed than the shared ones.
        assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    # Without grad_x: a compiled graph would keep W_eff for it.
    x, layer = volume(1, C, 8, 8, 8).detach(), lora()

    def outside(y: torch.Tensor) -> torch.Tensor:
        return adapted_conv(y, **layer)

    def inside(y: torch.Tensor) -> torch.Tensor:
        with storage("int8"):
            return adapted_conv(y, **layer)

    def grad_a(function: Any) -> torch.Tensor:
        return torch.autograd.grad(function(x).square().sum(), layer["lora_A"])[0]

    torch._dynamo.reset()
    followed = torch.compile(outside, fullgraph=True, backend=backend)
    forced = torch.compile(inside, fullgraph=True, backend=backend)
    for mode, kept in (("exact", x.nbytes), ("int8", packed(x.numel())), ("exact", x.nbytes)):
        with storage(mode):
            assert saved_bytes(lambda: followed(x)) == kept
    assert saved_bytes(lambda: forced(x)) == packed(x.numel())
    exact, first, second = grad_a(outside), grad_a(forced), grad_a(forced)
    assert not torch.equal(first, second)  # the seed is drawn by the graph, not when it is traced
    for grad in (first, second):
        assert 0 < (grad - exact).norm() < 0.03 * exact.norm()


def test_the_meta_device_gives_the_same_bytes() -> None:
    x, layer = volume(1, C, 8, 8, 8), lora()
    moved = {k: v.to("meta") if isinstance(v, nn.Parameter) else v for k, v in layer.items()}
    with storage("int8"):
        kept, packing = compress.keep(x.detach().to("meta"))
        assert sum(t.nbytes for t in kept if t is not None) == packed(x.numel())
        assert compress.restore(kept, packing).shape == x.shape
        y = adapted_conv(x.detach().to("meta"), **moved)
    assert y.is_meta and y.requires_grad
