"""evaluate into a run folder, with masks, and the report of it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from petite_fast.training.record import read_view


@pytest.fixture
def outputs(project, tmp_path) -> Path:
    """Stand-ins for reconstructions: the standard scans, 3 % too high."""
    for image in (project.data.parent / "images").iterdir():
        scan = nib.load(image)
        name = f"{image.name.removesuffix('.nii.gz')}_desc-petite.nii.gz"
        target = project.data.parent / "labels" / image.name.replace("short", "standard")
        voxels = 1.03 * nib.load(target).get_fdata(dtype=np.float32)
        nib.save(nib.Nifti1Image(voxels, scan.affine), tmp_path / name)
    return tmp_path


def test_evaluate_into_a_run_folder_and_report(project, run, outputs, tmp_path) -> None:
    folder = tmp_path / "run"
    result = run("evaluate", outputs, "--data", project.data, "--fold", 0, "--out", folder)
    assert result.code == 0 and "+3.0, +3.0, +3.0" in result.out
    record = json.loads((folder / "evaluation/metrics.json").read_text())
    assert list(record["methods"]) == ["input", "output"]
    view = read_view(folder / "evaluation/sub-001.npz")
    assert list(view.volumes) == ["input", "output", "target"]
    target = view.volumes["target"].astype(float)
    np.testing.assert_allclose(view.volumes["output"], 1.03 * target, rtol=2e-3, atol=1e-6)

    result = run("report", folder)
    assert result.code == 0 and "report.html" in result.out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "sub-001" in page and "+3.0" in page
    assert run("report", folder, "--keep-ids", "--out", tmp_path / "named.html").code == 0
    name = record["methods"]["input"]["subjects"][0]["subject"]
    assert name in (tmp_path / "named.html").read_text(encoding="utf-8") and name not in page


def test_a_mask_is_a_region(project, run, outputs, tmp_path) -> None:
    label = next((project.data.parent / "labels").iterdir())
    output = next(p for p in outputs.glob("*_desc-petite.nii.gz") if p.name[:6] == label.name[:6])
    scan = nib.load(label)
    mask = np.zeros(scan.shape, np.uint8)
    mask[np.unravel_index(scan.get_fdata().argmax(), scan.shape)] = 1
    nib.save(nib.Nifti1Image(mask, scan.affine), tmp_path / label.name)
    out = tmp_path / "report.json"
    command = ("evaluate", output, "--target", label, "--out", out, "--mask")
    result = run(*command, tmp_path / label.name)
    assert result.code == 0
    region = json.loads(out.read_text())["subjects"][0]["uptake"]["mask"]
    assert region["mean"] == region["max"]  # of one voxel
    assert region["max"]["target"] == pytest.approx(scan.get_fdata().max())
    assert region["peak"]["bias_percent"] == pytest.approx(3.0, abs=1e-3)


def test_masks_of_a_folder_are_named_as_the_targets(project, run, outputs, tmp_path) -> None:
    masks, folder = tmp_path / "masks", tmp_path / "run"
    masks.mkdir()
    for label in (project.data.parent / "labels").iterdir():
        scan = nib.load(label)
        inside = (scan.get_fdata() > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(inside, scan.affine), masks / label.name)
    command = ("evaluate", outputs, "--data", project.data, "--fold", 0, "--out", folder)
    assert run(*command, "--mask", masks).code == 0
    assert run("report", folder).code == 0
    assert "SUVmean bias in the masks" in (folder / "report.html").read_text(encoding="utf-8")


def test_misuse_is_refused(project, run, refused, outputs, scan, tmp_path) -> None:
    label = next((project.data.parent / "labels").iterdir())
    compare = ("evaluate", label, "--target", label)
    assert "FILE.json" in refused(*compare, "--published", "--out", tmp_path / "folder")
    zero = scan(np.zeros(nib.load(label).shape), "zero.nii.gz")
    assert "different grids" in refused(*compare, "--mask", zero)
    assert "nothing to report" in refused("report", tmp_path)
    nib.save(nib.Nifti1Image(np.zeros(nib.load(label).shape), nib.load(label).affine), zero)
    assert "no voxel" in refused(*compare, "--mask", zero)
