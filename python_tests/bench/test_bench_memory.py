"""The memory suite on tiny networks: others' ways compute the same, and keep what they should."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petite_fast import get_peft_model, petite_recipe
from petite_fast.models import CVTGANGenerator
from petite_fast.ops import saved_bytes


def _step(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients."""
    torch.manual_seed(0)
    y = net(x)
    y.square().mean().backward()
    named = ((n.replace("parametrizations.weight.0.", ""), p) for n, p in net.named_parameters())
    return y.detach(), {n: p.grad for n, p in named if p.grad is not None}


def _assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first[0], second[0])
    ours, theirs = first[1], second[1]
    assert len(ours) > 0 and ours.keys() == theirs.keys()
    largest = max(grad.abs().max().item() for grad in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def _petite() -> Any:
    from cases.layers import randomise_b

    torch.manual_seed(0)
    net = CVTGANGenerator((4, 8, 8, 8), encoder_drop=(0, 0, 0), channel_drop=0.0)
    return randomise_b(get_peft_model(net, petite_recipe("cvtgan", 2, num_prompts=(0, 2, 2))))


def test_plain_petite_is_petite_in_torchs_layers() -> None:
    from cases.others import plain

    ours = _petite().train()
    x = torch.randn(2, 1, 32, 32, 32)
    theirs = plain(copy.deepcopy(ours))
    assert not any("Lean" in type(m).__name__ for m in theirs.modules())
    assert saved_bytes(lambda: theirs(x)) > 2 * saved_bytes(lambda: ours(x))
    _assert_same(_step(ours, x), _step(theirs, x))


def test_checkpoint_and_memsave_compute_the_same_and_keep_less() -> None:
    from cases.others import checkpointed, memsave, plain

    network = plain(_petite().train())
    x = torch.randn(2, 1, 32, 32, 32)
    before, step = saved_bytes(lambda: network(x)), _step(network, x)
    network.zero_grad()
    stages = checkpointed(copy.deepcopy(network), r"(en|de)coder_layer\d(_down|_up)?")
    lean = memsave(copy.deepcopy(network))
    for other in (stages, lean):
        assert saved_bytes(lambda net=other: net(x)) < 0.7 * before
        _assert_same(step, _step(other, x))
    with pytest.raises(ValueError, match="stages: got 'nothing'"):
        checkpointed(network, "nothing")


def test_memsave_rule() -> None:
    """What each layer keeps, in units of its input."""
    from cases.others import memsave

    def kept(layer: nn.Module, train: bool = False) -> float:
        x = torch.randn(2, 4, 6, 6, 6, requires_grad=True)
        layer = memsave(nn.Sequential(layer.requires_grad_(train)).eval())
        return saved_bytes(lambda: layer(x)) / x.nbytes

    assert kept(nn.Conv3d(4, 4, 3)) == kept(nn.ConvTranspose3d(4, 4, 2)) == 0
    assert kept(nn.Conv3d(4, 4, 3), train=True) == 1
    assert kept(nn.BatchNorm3d(4)) < 0.01 < kept(nn.BatchNorm3d(4), train=True)
    assert kept(nn.ReLU()) == 0.25  # a byte per value
    assert kept(nn.LeakyReLU()) == kept(nn.Conv3d(4, 4, 3), train=True)


def test_memory_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import measure
    import report
    from cases import memory

    monkeypatch.setattr(memory, "CASES", [
        memory.CASES[0]._replace(
            build=lambda: memory.Blocks(nn.InstanceNorm3d, 8), size=(1, 8, 16, 16, 16)
        ),
        memory.CASES[-1]._replace(
            build=lambda: CVTGANGenerator((4, 8, 8, 8)), size=(2, 1, 32, 32, 32)
        ),
    ])  # fmt: skip
    result = json.loads(json.dumps({
        "suite": "memory", "device": "cpu", "quick": True, "machine": measure.machine("cpu"),
        "cases": list(memory.run(quick=True)),
    }))  # fmt: skip
    blocks, cvtgan = (record["providers"] for record in result["cases"])
    unit = result["cases"][0]["unit_bytes"]
    units = {name: value["saved_bytes"] / unit for name, value in blocks.items()}
    assert units["full"] == pytest.approx(9, abs=0.1)
    assert units["peft"] > 10 > 5.1 > units["ours-lora"]
    assert units["ours-lora-int8"] < 2
    assert "HF PEFT has neither" in cvtgan["peft"]["why_not"]
    assert cvtgan["ours-petite"]["saved_bytes"] < 0.5 * cvtgan["plain"]["saved_bytes"]
    for value in (*blocks.values(), *cvtgan.values()):
        assert "why_not" in value or value["peak_bytes"] >= value["saved_bytes"] > 0 < value["ms"]

    text = report.markdown(result)
    (row,) = [line for line in text.splitlines() if line.startswith("| plain |")]
    kept, peak = (cvtgan["plain"][f"{name}_bytes"] / 2**20 for name in ("saved", "peak"))
    assert row == f"| plain |  | {kept:.1f} / {peak:.1f} ({cvtgan['plain']['ms']:.0f}) |"
    assert "| floor |" not in text and "MiB at the peak" in text
    assert "cannot" in report.table(result)
    report.figure(result, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.mark.parametrize("index", range(8))
def test_the_stages_of_every_case_are_most_of_its_network(index: int) -> None:
    pytest.importorskip("monai")
    from cases import memory

    case = memory.CASES[index]
    # SwinUNETR reads numbers while it is built.
    with torch.device("cpu" if "Swin" in case.label else "meta"):
        net = case.build()
    stages = [name for name, _ in net.named_modules() if re.fullmatch(case.stages, name)]
    assert len(stages) > 3
    inside = sum(p.numel() for s in stages for p in net.get_submodule(s).parameters())
    assert inside > 0.5 * sum(p.numel() for p in net.parameters())
    assert len(memory.CASES) == 8
