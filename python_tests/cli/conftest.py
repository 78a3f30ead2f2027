"""One tiny project (two scanners, a base, an adapter), made once by the commands themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from petite_fast.cli import main


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class Project:
    """Folders that `petite-fast` made."""

    root: Path
    data: Path
    base: Path
    adapter: Path


TRAIN = ("--fold", "0", "--patch", "16,16,16", "--batch", "2", "--steps", "3")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    root = tmp_path_factory.mktemp("project")
    for scanner in ("136", "63"):
        data = root / scanner
        code = call("simulate", "--scanner", scanner, "--subjects", 3, "--reduce", 6, "--out", data)
        assert code == 0
    base, adapter, data = root / "base", root / "adapter", root / "63" / "dataset.json"
    source = root / "136" / "dataset.json"
    assert call("pretrain", "--data", source, "--widths", "4,8,16,16", "--out", base, *TRAIN) == 0
    assert call("finetune", "--base", base, "--data", data, "--out", adapter, *TRAIN) == 0
    return Project(root, data, base, adapter)


@pytest.fixture
def run(capfd) -> Callable[..., Result]:
    def run_(*arguments: object) -> Result:
        capfd.readouterr()
        code = call(*arguments)
        return Result(code, *capfd.readouterr())

    return run_


@pytest.fixture
def refused(run) -> Callable[..., str]:
    """Run a command that must fail with code 2 and one sentence; the sentence."""

    def refused_(*arguments: object) -> str:
        result = run(*arguments)
        assert result.code == 2, result
        sentence = result.err.strip().splitlines()[-1]
        assert sentence.startswith("petite-fast: ") and "Traceback" not in result.err
        return sentence

    return refused_


@pytest.fixture
def scan(tmp_path) -> Callable[..., Path]:
    """Write an array as NIfTI."""

    def write(array: np.ndarray, name: str = "scan.nii.gz", offset: float = 0.0) -> Path:
        affine = np.diag([-2.0, 2.0, 3.0, 1.0])
        affine[:3, 3] = offset
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array.astype(np.float32), affine), path)
        return path

    return write
