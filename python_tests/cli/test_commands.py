"""The commands end to end on tiny networks and scans."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

TRAIN = ("--fold", "0", "--patch", "16,16,16", "--batch", "2", "--steps", "3")
COMMANDS = (
    "simulate", "pretrain", "finetune", "reconstruct", "evaluate", "merge", "export", "info",
    "demo", "report", "validate", "convert",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command, run) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert f"petite-fast {command}" in " ".join(result.out.split("Examples:")[1].split())


def test_help_does_not_import_the_heavy_libraries() -> None:
    code = (
        "import sys; from petite_fast.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: print(sorted({'monai', 'lightning_fabric', 'matplotlib', 'scipy'}"
        " & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_run_folders_hold_what_they_should(project) -> None:
    assert {"network.json", "generator.safetensors", "discriminator.safetensors"} <= {
        p.name for p in project.base.iterdir()
    }
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in project.adapter.iterdir()
    }
    record = json.loads((project.adapter / "adapter_config.json").read_text())
    assert record["scanner"] == "63" and record["normalisation"] == "paired"
    assert record["metadata"]["patch"] == [16, 16, 16]
    with (project.adapter / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and "loss_d" not in rows[0] and "adversarial" in rows[0]


def test_reconstruct_and_evaluate_held_out_subjects(project, run, tmp_path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    network = ("--base", project.base, "--adapter", project.adapter, "--device", "cpu")
    result = run("reconstruct", project.data, "--fold", 0, *network, "--out", out)
    assert result.code == 0
    written = list(out.iterdir())
    assert [str(p) for p in written] == result.out.split()
    assert all(p.name.endswith("_short_desc-petite.nii.gz") for p in written)
    source = nib.load(next((project.data.parent / "images").glob(written[0].name[:6] + "*")))
    image = nib.load(written[0])
    assert image.shape == source.shape == (21, 21, 10)  # no side is a multiple of 16
    np.testing.assert_array_equal(image.affine, source.affine)
    result = run("evaluate", out, "--data", project.data, "--fold", 0, "--out", report)
    assert result.code == 0 and "max(target)" in result.out
    values = json.loads(report.read_text())
    assert set(values["overall"]) == {"psnr", "ssim", "nrmse"}
    assert len(values["subjects"]) == 1 and 0 < values["overall"]["nrmse"]["mean"] < 1
    bias = values["subjects"][0]["uptake"]["hot"]["peak"]["bias_percent"]
    assert f"{bias:+.1f}" in result.out


def test_evaluate_one_file_against_itself(project, run) -> None:
    label = next((project.data.parent / "labels").iterdir())
    result = run("evaluate", label, "--target", label)
    assert result.code == 0 and "inf" in result.out and "1.0000" in result.out


def test_evaluate_published_and_named_denominator(project, run) -> None:
    label = next((project.data.parent / "labels").iterdir())
    image = next((project.data.parent / "images").glob(label.name[:6] + "*"))
    result = run("evaluate", image, "--target", label, "--published")
    assert result.code == 0 and "49/48" in result.out
    result = run("evaluate", image, "--target", label, "--nrmse", "mean")
    assert result.code == 0 and "mean of target" in result.out


@pytest.mark.parametrize("recipe", ["petite", "bitfit"])
def test_merge_reconstructs_the_same(recipe, project, run, tmp_path) -> None:
    adapter = project.adapter
    if recipe == "bitfit":
        adapter = tmp_path / "adapter"
        command = ("finetune", "--base", project.base, "--data", project.data, "--recipe", recipe)
        assert run(*command, "--out", adapter, *TRAIN).code == 0
    merged = tmp_path / "merged"
    assert run("merge", "--base", project.base, "--adapter", adapter, "--out", merged).code == 0
    scan = next((project.data.parent / "images").iterdir())
    two = ("--base", project.base, "--adapter", adapter)
    assert run("reconstruct", scan, *two, "--out", tmp_path / "two").code == 0
    assert run("reconstruct", scan, "--base", merged, "--out", tmp_path / "one").code == 0
    name = f"{scan.name.removesuffix('.nii.gz')}_desc-petite.nii.gz"
    first, second = (nib.load(tmp_path / f / name).get_fdata() for f in ("two", "one"))
    assert np.abs(first - second).max() <= 1e-5 * np.abs(first).max()
    if recipe == "petite":  # the prompts count: the folded network alone gives something else
        base = merged / "base"
        assert run("reconstruct", scan, "--base", base, "--out", tmp_path / "bare").code == 0
        assert not np.array_equal(nib.load(tmp_path / "bare" / name).get_fdata(), second)


def test_full_finetuning_writes_a_network(project, run, tmp_path) -> None:
    out = tmp_path / "full"
    command = ("finetune", "--base", project.base, "--data", project.data, "--recipe", "full")
    result = run(*command, "--out", out, *TRAIN)
    assert result.code == 0 and "(100.000 %)" in result.out
    assert (out / "network.json").exists() and not (out / "adapter_config.json").exists()
    scan = next((project.data.parent / "images").iterdir())
    assert run("reconstruct", scan, "--base", out, "--out", tmp_path / "o").code == 0


def test_a_finished_run_is_not_trained_again(project, run) -> None:
    before = (project.adapter / "adapter_model.safetensors").read_bytes()
    command = ("finetune", "--base", project.base, "--data", project.data)
    result = run(*command, "--out", project.adapter, *TRAIN)
    assert result.code == 0 and "3 steps" in result.out and "last loss" not in result.out
    assert (project.adapter / "adapter_model.safetensors").read_bytes() == before


def test_info_runs_without_gpu(run) -> None:
    result = run("info")
    assert result.code == 0
    assert "petite_fast" in result.out and "native" in result.out and "devices" in result.out


def test_info_lists_the_recipes(run) -> None:
    result = run("info", "--recipes", "--network", "unetr")
    assert result.code == 0 and "Recipes for unetr" in result.out and "cvtgan" not in result.out
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in result.out.splitlines()
        if len(cells := line.strip("│ ").split("│")) == 3
    }
    assert rows["lora+ssf"] == rows["petite"] == ["295,040", "0.290"]


def _start(project, out: Path, steps: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "petite_fast.cli", "finetune", "--base", project.base,
               "--data", project.data, "--out", out, *TRAIN[:-1], str(steps)]  # fmt: skip
    # Away from the checkout: there, -m would run its sources, which have no native module.
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=project.root, **options,
    )  # fmt: skip


def _steps_done(out: Path) -> int:
    log = out / "log.csv"
    return max(len(log.read_text().splitlines()) - 1, 0) if log.exists() else 0


def test_ctrl_c_keeps_a_checkpoint_and_resume_gives_the_same_adapter(
    project, run, tmp_path
) -> None:
    out, straight, steps = tmp_path / "stopped", tmp_path / "straight", 150
    # The same number of threads as the runs in this process: sums depend on it.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = _start(project, out, steps, env=environment)
    deadline = time.monotonic() + 120
    while _steps_done(out) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume auto" in err and "Traceback" not in err
    kept = list((out / "checkpoints").iterdir())
    assert [p.name for p in kept] == [f"step-{_steps_done(out):06d}"]
    assert not (out / "adapter_config.json").exists()

    arguments = ("--base", project.base, "--data", project.data, *TRAIN[:-1], steps)
    assert run("finetune", *arguments, "--out", out).code == 0
    assert run("finetune", *arguments, "--out", straight).code == 0
    left, right = (load_file(f / "adapter_model.safetensors") for f in (out, straight))
    assert left.keys() == right.keys()
    assert [k for k in left if not np.array_equal(left[k], right[k])] == []


def test_full_disk_while_saving_is_one_sentence(project, tmp_path) -> None:
    import resource

    def small_disk() -> None:  # no file may pass 8 kB: the checkpoint's tensors do
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    out = tmp_path / "run"
    process = _start(project, out, 3, preexec_fn=small_disk, env={**os.environ})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "File too large" in err.strip().splitlines()[-1] and "Traceback" not in err
    assert list((out / "checkpoints").iterdir()) == []
    assert not (out / "adapter_config.json").exists()


@pytest.mark.slow
def test_demo_quick(run, tmp_path) -> None:
    result = run("demo", "--quick", "--out", tmp_path)
    assert result.code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["none", "petite", "full"]
    keys = {"psnr", "ssim", "nrmse", "trainable_percent", "step_seconds", "saved_bytes"}
    assert all(set(values) == keys for values in summary.values())
    assert 0 < summary["petite"]["trainable_percent"] < 1
    assert 0 < summary["petite"]["saved_bytes"] < summary["full"]["saved_bytes"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert run("report", tmp_path).code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{summary['petite']['psnr']:.2f}" in page and "full fine-tuning" in page
