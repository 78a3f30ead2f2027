"""reconstruct on DICOM: series in, series out, and nobody named in what is printed or written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dicom_cases import SECRET, make_series
from ecat_cases import make_ecat

from petite_fast.data import read_volume, same_grid
from petite_fast.models import CVTGANGenerator, save_network

IDENTIFIERS = (SECRET, "ID-4711", "19500102", "ACC-0815")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network") / "base"
    save_network(folder, CVTGANGenerator((8, 16, 16, 16)), normalisation="paired")
    return folder


def everything(folder: Path) -> bytes:
    """Names and contents of all files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)


def test_a_folder_named_after_the_patient(run, refused, base: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    for k, visit in enumerate((f"{SECRET} 1", f"{SECRET} 2")):
        make_series(scans / visit, series_uid=f"1.2.3.{k}")
    out = tmp_path / "out"
    result = run("reconstruct", scans, "--base", base, "--out", out, "--dicom")
    assert result.code == 0, result.err
    for k, source in enumerate(sorted(scans.iterdir()), start=1):
        image = read_volume(out / f"series-{k:03d}_desc-petite.nii.gz")
        series = read_volume(out / f"series-{k:03d}_desc-petite_dicom")
        assert same_grid(image, read_volume(source)) and same_grid(series, image)
        assert series.units == "Bq/mL"
    again = refused("reconstruct", scans, "--base", base, "--out", out, "--dicom")
    assert "is there already" in again and SECRET not in again
    assert "no NIfTI" in refused("reconstruct", out, "--base", base, "--out", tmp_path / "twice")
    written = everything(out) + result.out.encode() + result.err.encode()
    assert not [name for name in IDENTIFIERS if name.encode() in written]


def test_keep_ids(run, base: Path, tmp_path: Path) -> None:
    source = make_series(tmp_path / "visit-1")
    out = tmp_path / "out"
    result = run("reconstruct", source, "--base", base, "--out", out, "--dicom", "--keep-ids")
    assert result.code == 0, result.err
    assert (out / "visit-1_desc-petite.nii.gz").is_file()
    assert SECRET.encode() in everything(out / "visit-1_desc-petite_dicom")


def test_ecat(run, base: Path, tmp_path: Path) -> None:
    source = make_ecat(tmp_path / "scan.v")
    result = run("reconstruct", source, "--base", base, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert same_grid(read_volume(tmp_path / "out" / "scan_desc-petite.nii.gz"), read_volume(source))


def test_dicom_out_wants_dicom_in(refused, scan, base: Path, blob_scan: Path, tmp_path) -> None:
    message = refused(
        "reconstruct", blob_scan, "--base", base, "--out", tmp_path / "out", "--dicom"
    )
    assert "not one image of a DICOM series" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def blob_scan(scan) -> Path:
    return scan(torch.rand(12, 10, 9).numpy() + 1)
