"""The training loop: it learns, resumes bit for bit, and stops cleanly."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petite_fast.errors import InputError
from petite_fast.training import checkpoint
from petite_fast.training.interrupt import TrainingInterrupted
from petite_fast.training.loop import train
from petite_fast.training.objectives import GANObjective, L1Objective


class StopAfter:
    """Samples that press Ctrl-C while the batch of one step is loaded."""

    def __init__(self, samples: Any, number: int, signal_number: int = signal.SIGINT) -> None:
        self.samples, self.number, self.signal_number = samples, number, signal_number
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        self.samples.set_epoch(epoch)

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        if self.loaded == self.number:
            os.kill(os.getpid(), self.signal_number)
        return self.samples[index]


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def losses(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_loss_falls(generator, make_samples, settings) -> None:
    report = train(generator, L1Objective(), make_samples(40), settings(steps=60, lr=1e-2))
    rows = [row["loss"] for row in report.rows]
    assert sum(rows[-10:]) < 0.75 * sum(rows[:10])
    assert report.trainable == report.parameters and report.trainable_percent == 100
    assert 0 < report.step_seconds < 5


def test_gan_training_moves_both_networks(generator, discriminator, samples, settings) -> None:
    before_g, before_d = state(generator), state(discriminator)
    objective = GANObjective(discriminator, train_discriminator=True)
    report = train(generator, objective, samples, settings())
    assert not torch.equal(before_g["head.weight"], generator.state_dict()["head.weight"])
    key = "net.2.weight"
    assert not torch.equal(before_d[key], discriminator.state_dict()[key])
    assert set(report.rows[0]) == {"loss", "l1", "adversarial", "loss_d", "lr", "seconds"}


def test_frozen_discriminator_and_frozen_parameters_stay(
    generator, discriminator, samples, settings
) -> None:
    generator.head.requires_grad_(False)
    before_d, head = state(discriminator), state(generator.head)
    objective = GANObjective(discriminator, train_discriminator=False)
    report = train(generator, objective, samples, settings())
    assert_same(before_d, state(discriminator))
    assert_same(head, state(generator.head))
    assert "loss_d" not in report.rows[0] and "adversarial" in report.rows[0]
    assert report.trainable == report.parameters - 5


def test_learning_rate_is_a_cosine(generator, samples, settings) -> None:
    rates = [row["lr"] for row in train(generator, L1Objective(), samples, settings()).rows]
    wanted = 1e-3 * 0.5 * (1 + torch.cos(torch.arange(6) * torch.pi / 6))
    torch.testing.assert_close(torch.tensor(rates), wanted)


@pytest.mark.parametrize("gan", [False, True])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(
    gan, stop, make_networks, make_samples, settings, tmp_path
) -> None:
    def nets() -> tuple[nn.Module, Any]:
        generator, discriminator = make_networks()
        objective = GANObjective(discriminator, train_discriminator=True) if gan else L1Objective()
        return generator, objective

    generator, objective = nets()
    straight = train(generator, objective, make_samples(), settings(out=tmp_path / "a"))

    # two samples a step: the fifth is loaded for step 3, which is completed and saved
    first, first_objective = nets()
    with pytest.raises(TrainingInterrupted, match="after step 3 of 6.*--resume auto"):
        samples = StopAfter(make_samples(), 5, stop)
        train(first, first_objective, samples, settings(out=tmp_path / "b"))
    assert steps(tmp_path / "b") == ["step-000002", "step-000003"]

    torch.manual_seed(99)  # a new process: other random state, untrained networks
    second, second_objective = nets()
    second_samples = make_samples()
    resumed = train(second, second_objective, second_samples, settings(out=tmp_path / "b"))

    assert resumed.first_step == 3
    assert second_samples.seen == [6, 7, 8, 9, 10, 11]
    assert losses(resumed.rows) == losses(straight.rows[3:])
    assert_same(state(second), state(generator))
    if gan:
        assert_same(state(second_objective.discriminator), state(objective.discriminator))
    with (tmp_path / "b" / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]


def test_finished_run_has_nothing_left_and_keeps_two_checkpoints(
    generator, samples, settings
) -> None:
    run = settings()
    train(generator, L1Objective(), samples, run)
    after = state(generator)
    again = train(generator, L1Objective(), samples, run)
    assert again.rows == [] and again.first_step == again.steps == 6
    assert_same(after, state(generator))
    assert steps(run.out) == ["step-000004", "step-000006"]


def test_resume_never_starts_again(generator, samples, settings) -> None:
    train(generator, L1Objective(), samples, settings())
    report = train(generator, L1Objective(), samples, settings(resume="never"))
    assert report.first_step == 0 and len(report.rows) == 6
    with (settings().out / "log.csv").open() as file:
        assert sum(1 for _ in file) == 7


def test_resume_with_other_settings_is_refused(generator, samples, settings) -> None:
    train(generator, L1Objective(), samples, settings(), config={"recipe": "petite"})
    with pytest.raises(InputError, match=r"other settings \(lr 0.001 -> 0.01, recipe 'petite'"):
        train(generator, L1Objective(), samples, settings(lr=1e-2), config={"recipe": "full"})


def test_resume_from_a_damaged_or_missing_checkpoint(generator, samples, settings) -> None:
    run = settings()
    train(generator, L1Objective(), samples, run)
    newest = run.out / "checkpoints" / "step-000006"
    assert checkpoint.find_resume(run.out / "checkpoints", run.out) == newest
    (newest / "state.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="step-000006.*--resume never"):
        train(generator, L1Objective(), samples, run)
    with pytest.raises(InputError, match="no training checkpoint"):
        train(generator, L1Objective(), samples, settings(resume=run.out / "nothing"))


def test_known_frozen_parameters_are_not_saved(generator, samples, settings) -> None:
    from safetensors.torch import load_file

    generator.body[0].requires_grad_(False)
    known = {"body.0.weight", "body.0.bias"}
    run = settings()
    train(generator, L1Objective(), samples, run, known=known)
    saved = load_file(run.out / "checkpoints" / "step-000006" / "state.safetensors")
    names = {k for k in saved if k.startswith("generator/")}
    assert names == {f"generator/{k}" for k in generator.state_dict().keys() - known}
    assert not any("body.0" in k for k in saved if k.startswith("adamw/"))
    report = train(generator, L1Objective(), samples, run, known=known)
    assert report.first_step == 6


def test_nan_loss_stops_with_the_step_named(generator, make_samples, settings) -> None:
    run = settings()
    # sample 8 belongs to step 5
    with pytest.raises(InputError, match=r"step 5: .*loss is nan \(step-000004 is kept\)"):
        train(generator, L1Objective(), make_samples(bad_number=8), run)
    assert steps(run.out) == ["step-000002", "step-000004"]
    assert all(torch.isfinite(p).all() for p in generator.parameters())


def test_a_checkpoint_never_holds_nan(generator, samples, settings) -> None:
    def poison(grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf")

    generator.head.weight.register_hook(poison)  # a finite loss, gradients that are not
    with pytest.raises(InputError, match="step 1: .*head.weight is NaN .*no checkpoint"):
        train(generator, L1Objective(), samples, settings(save_every=1))
    assert checkpoint.find_resume(settings().out / "checkpoints", "auto") is None


def test_refusals(generator, make_samples, settings) -> None:
    with pytest.raises(InputError, match="no training data"):
        train(generator, L1Objective(), make_samples(0), settings())
    with pytest.raises(InputError, match="--steps must be at least 1"):
        train(generator, L1Objective(), make_samples(), settings(steps=0))
    with pytest.raises(InputError, match="--lr"):
        train(generator, L1Objective(), make_samples(), settings(lr=float("nan")))
    generator.requires_grad_(False)
    with pytest.raises(InputError, match="nothing is trainable"):
        train(generator, L1Objective(), make_samples(), settings())
    assert not settings().out.exists()


def test_full_disk_keeps_the_previous_checkpoint(generator, samples, settings, monkeypatch) -> None:
    write, written = checkpoint._write, []

    def full_after_three(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 3:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full_after_three)
    run = settings(save_every=1)
    with pytest.raises(OSError, match="No space left"):
        train(generator, L1Objective(), samples, run)
    assert steps(run.out) == ["step-000001"]  # and no temporary folder beside it
    record = json.loads((run.out / "checkpoints" / "step-000001" / "state.json").read_text())
    assert record["step"] == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains_and_resumes(precision, generator, samples, settings) -> None:
    seen = []
    generator.body[0].register_forward_hook(lambda m, i, o: seen.append((i[0].dtype, o.dtype)))
    run = settings(precision=precision)
    report = train(generator, L1Objective(), samples, run)
    half = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    # the input stays float32: the network adds it to its output
    assert set(seen) == {(torch.float32, half)}
    assert all(p.dtype == torch.float32 for p in generator.parameters())
    assert train(generator, L1Objective(), samples, run).first_step == len(report.rows)


def test_logs_are_silent_without_a_terminal(generator, samples, settings, capfd) -> None:
    run = settings()
    train(generator, L1Objective(), samples, run)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert list((run.out / "tensorboard").iterdir())
