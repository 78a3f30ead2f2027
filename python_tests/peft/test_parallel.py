"""Adapted networks under torch.compile and in two processes (DistributedDataParallel)."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
from peft_cases import CASES, build, inputs, run, scramble

from petite_fast import LoraConfig, get_peft_model

pytest.importorskip("monai")
pytest.importorskip("dynamic_network_architectures")

# One network per kind of layer; every method once.
COMPILED = [
    "cvtgan-petite", "cvtgan-ln", "cvtgan-vpt-deep", "cvtgan-ssf", "unetr-petite", "unetr-adapter",
    "unetr-vpt", "unet-mix-adapter", "unet-ssf", "dynunet-lora-fa",
]  # fmt: skip
PARALLEL = ["cvtgan-petite", "cvtgan-ssf", "unetr-vpt", "unetr-adapter", "unet-lora", "unet-ssf"]


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name) -> None:
    network, config = CASES[name]
    model = scramble(get_peft_model(build(network), config))
    x = inputs(network)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().mean(), trained)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-11)
    found = torch.autograd.grad(y.square().mean(), trained)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_switching_does_not_compile_again() -> None:
    model = get_peft_model(build("unet"), LoraConfig(r=2))
    model.add_adapter("b")
    scramble(model)
    x = inputs("unet")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    first = run(compiled, x)
    model.set_adapter("b")
    second = run(compiled, x)
    assert len(graphs) == 1 and not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(run(compiled, x), first) and len(graphs) == 1


WORKER = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from peft_cases import CASES, build, inputs, scramble
from petite_fast import get_peft_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
for name in sys.argv[2:]:
    network, config = CASES[name]
    torch.manual_seed(rank)  # DistributedDataParallel must make the ranks equal
    model = scramble(get_peft_model(build(network), config))
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    x = inputs(network)
    for _ in range(2):
        model.zero_grad()
        wrapped(x[rank : rank + 1]).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().mean(), trained)
    for p, wanted in zip(trained, expected):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-8, atol=1e-11)
dist.destroy_process_group()
print("done", rank)
"""


def test_two_processes(repository, tmp_path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, script, repository / "python_tests", *PARALLEL],
            env={**os.environ, **store, "RANK": str(rank), "WORLD_SIZE": "2"},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0 and f"done {rank}" in out, err


def _free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_copies_are_independent() -> None:
    network, config = CASES["unet-mix-adapter"]
    model = get_peft_model(build(network), config)
    twin = scramble(copy.deepcopy(model))
    x = inputs(network)
    assert not torch.allclose(run(model, x), run(twin, x))
    twin.merge_and_unload()
    torch.testing.assert_close(run(model, x), run(build(network), x), rtol=1e-9, atol=1e-11)
