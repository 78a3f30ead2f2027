"""info --memory and finetune with --memory and --budget."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

from petite_fast.cli import main
from petite_fast.errors import InputError
from petite_fast.models import build_network
from petite_fast.training.about import StepQuestion
from petite_fast.training.memory import estimate, readable
from petite_fast.training.options import size_in_bytes
from petite_fast.training.tasks import adapted


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8000MB", 8 * 10**9),
        ("512 MiB", 2**29),
        ("1.5kB", 1500),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes("--budget", text) == size


@pytest.mark.parametrize("text", ["8", "GiB", "8Gb", "-8GiB", "0GB", "8 gigabytes", "", "1.GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match=f"--budget is {text!r}; expected a size such as 8GiB"):
        size_in_bytes("--budget", text)


def test_info_prints_what_estimate_says(run) -> None:
    result = run("info", "--memory", "cvtgan", "--patch", "32,32,48", "--batch", "3",
                 "--recipe", "lora", "--memory-mode", "checkpoint")  # fmt: skip
    assert result.code == 0, result.err
    with torch.device("meta"):
        net = adapted(build_network("cvtgan"), "cvtgan", "lora", memory="checkpoint")
    found = estimate(net, (32, 32, 48), 3)
    rows = dict(re.findall(r"│ ([a-z ]+?) +│ +([\d.]+ \w+) │", result.out))
    assert rows["optimiser"] == readable(found.optimiser_bytes)
    assert rows["gradients"] == readable(found.gradient_bytes)
    assert "32x32x48" in result.out and "peak of a step" in rows


def test_info_finds_the_largest_patch(run, refused) -> None:
    question = ("info", "--memory", "cvtgan", "--patch", "32,32,32", "--batch", "1")
    result = run(*question, "--budget", "300MiB")
    assert result.code == 0, result.err
    (side,) = re.findall(r"with batch 1 in 300\.0 MiB is (\d+)x\1x\1: [\d.]+ MiB", result.out)
    assert int(side) % 16 == 0 and int(side) > 16
    assert "more than the budget of 1.0 MiB" in refused(*question, "--budget", "1MiB")
    assert "--budget is 'much'" in refused(*question, "--budget", "much")


def test_info_refuses_what_finetune_would(refused) -> None:
    question = ("info", "--memory", "cvtgan")
    assert "multiples of 16" in refused(*question, "--patch", "30,30,30")
    assert "expected one of" in refused(*question, "--recipe", "magic")
    assert "at least 1" in refused(*question, "--batch", "0")
    sentence = refused(*question, "--recipe", "full", "--memory-mode", "int8")
    assert "memory is 'int8', expected 'exact'" in sentence


@pytest.fixture
def finetune(project, tmp_path):
    """Arguments of a short run into tmp_path."""
    return ("finetune", "--base", project.base, "--data", project.data, "--fold", "0",
            "--steps", "2", "--out", tmp_path / "run")  # fmt: skip


def _record(folder) -> dict:
    (path,) = folder.glob("run/checkpoints/*/*.json")
    return json.loads(path.read_text())["config"]


def test_finetune_within_a_budget(run, refused, finetune, tmp_path, caplog) -> None:
    caplog.set_level("INFO", logger="petite_fast")
    result = run(*finetune, "--budget", "40MiB")
    assert result.code == 0, result.err
    ((patch, batch),) = re.findall(r"budget of 40\.0 MiB: patch (\S+), batch (\d)", caplog.text)
    config = _record(tmp_path)
    assert patch == "x".join(map(str, config["patch"]))
    assert config["batch"] == int(batch)
    # What is given is kept, and refused with the numbers if there is no room.
    given = (*finetune, "--resume", "never", "--patch", "32,32,32")
    sentence = refused(*given, "--batch", "4", "--budget", "2MiB")
    assert re.search(
        r"patch 32x32x32 with batch 4 takes [\d.]+ MiB, more than .* 2\.0 MiB", sentence
    )
    assert "16x16x16 with batch 1 takes" in refused(
        *finetune, "--resume", "never", "--batch", "1", "--budget", "1kB"
    )


def test_full_finetune_respects_batch_norm_under_a_budget(refused, finetune) -> None:
    full = (*finetune, "--recipe", "full", "--budget", "1GiB")
    assert "BatchNorm" in refused(*full, "--patch", "16,16,16", "--batch", "1")
    assert "48x48x48 with batch 1" in refused(*full[:-1], "1kB", "--batch", "1")
    assert "16x16x16 with batch 2" in refused(*full[:-1], "1kB")


@pytest.mark.parametrize("mode", ["int8", "checkpoint"])
def test_memory_modes(run, finetune, tmp_path, mode) -> None:
    result = run(*finetune, "--patch", "16,16,16", "--batch", "2", "--memory", mode)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert _record(tmp_path).get("memory") == ("int8" if mode == "int8" else None)


def test_help_has_examples(capsys) -> None:
    for command, example in (("info", "--budget 8GiB"), ("finetune", "--budget")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "Examples:" in text and example in text.split("Examples:")[1]


@pytest.mark.usefixtures("free_choice")
def test_info_explains_who_runs_what(run, refused) -> None:
    question = ("info", "--explain", "cvtgan", "--patch", "16,16,16", "--batch", "1")
    result = run(*question)
    assert result.code == 0 and "why not others" in result.out, result.err
    found = StepQuestion("cvtgan", "petite", 1, "exact").decisions((16, 16, 16))
    assert {"conv", "conv_grad_input", "norm_act", "effective_weight"} <= {d.op for d in found}
    assert all(d.backend in ("eager", "native", "triton") for d in found)
    assert any("triton: no kernel for device 'cpu'" in d.refusals for d in found) or (
        torch.cuda.is_available()
    )
    assert "multiple" in refused("info", "--explain", "cvtgan", "--patch", "15,16,16")


@pytest.mark.usefixtures("free_choice")
def test_info_tunes_only_on_a_gpu(run, refused, monkeypatch) -> None:
    question = ("info", "--tune", "cvtgan", "--patch", "16,16,16", "--batch", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--tune measures on a GPU, and PyTorch finds none here" in refused(*question)

    # The step is made on a CPU here, so no kernel is measured: only that it would be.
    seen, decide = [], StepQuestion._decide

    def on_cpu(self, patch, device, dtype, layout):
        seen.append((device, dtype, layout, torch.backends.cudnn.benchmark))
        return Counter() if dtype is None else decide(self, patch, "cpu", dtype, layout)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(StepQuestion, "_decide", on_cpu)
    result = run(*question)
    assert result.code == 0, result.err
    assert "cvtgan, petite, exact, float32" in result.out
    assert "cvtgan, petite, exact, bfloat16" in result.out
    assert "conv_grad_input" in result.out and "norm_act" not in result.out
    last = torch.channels_last_3d
    assert seen == [("cuda", None, last, True), ("cuda", torch.bfloat16, last, True)]
    assert torch.backends.cudnn.benchmark is False
    assert "multiple" in refused("info", "--tune", "cvtgan", "--patch", "15,16,16")
    monkeypatch.setenv("PETITE_FAST_BACKEND", "eager")
    assert "PETITE_FAST_BACKEND is 'eager'" in refused(*question)
