"""What keeping activations in 8 bits does to the gradients, for the networks of the memory suite.

    python bench/int8.py [--draws N]

Prints a table: the relative error of one gradient, |g8 - g| / |g| over all trained tensors, and
that of the mean of N draws, which falls as 1 / sqrt(N) where the gradient is unbiased.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft must not look for the network
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from cases.layers import randomise_b  # noqa: E402
from cases.memory import CASES, Case  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.modules.dropout import _DropoutNd  # noqa: E402

from petite_fast import LoraConfig, get_peft_model, petite_recipe  # noqa: E402


def _adapted(case: Case, memory: str) -> nn.Module:
    torch.manual_seed(0)
    net = case.build()
    convolutions = [
        name for name, m in net.named_modules() if type(m) is nn.Conv3d and max(m.kernel_size) == 3
    ]
    config = petite_recipe("cvtgan")
    if case.r is not None:
        config = LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=convolutions)
    model = randomise_b(get_peft_model(net, config, memory=memory))
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0  # whose draws are not what is measured here
    return model


def _gradient(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (model(x) - target).square().mean().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads).double()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=16)
    draws = parser.parse_args().draws
    print(f"| case | one gradient | mean of {draws} |\n|---|---|---|")
    for case in CASES:
        if case.dropout:
            continue
        x = torch.randn(case.size, generator=torch.Generator().manual_seed(1))
        exact = _adapted(case, "exact")
        with torch.no_grad():
            shape = exact(x).shape
        target = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        wanted = _gradient(exact, x, target)
        compressed = _adapted(case, "int8")
        errors = [_gradient(compressed, x, target) - wanted for _ in range(draws)]
        one = sum(float(e.norm()) for e in errors) / draws
        mean = float(torch.stack(errors).mean(0).norm())
        size = float(wanted.norm())
        print(f"| {case.label} | {one / size:.2e} | {mean / size:.2e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
