"""Real FDG PET (IBSI soft-tissue sarcoma, SUV): read, thin, normalise, write back."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from petite_fast.data import Normaliser, Pair, PatchDataset, read_volume, thin, write_like
from petite_fast.data.normalise import foreground_threshold


@pytest.fixture(scope="session")
def scans(test_data: Path) -> list[Path]:
    """Three patients, one for each voxel size."""
    found = sorted(test_data.glob("ibsi-sts/STS_00[124]/PET_image.nii.gz"))
    if len(found) != 3:
        pytest.skip(f"no IBSI scans under {test_data}")
    return found


def test_voxel_sizes_and_values(scans: list[Path]) -> None:
    volumes = [read_volume(path) for path in scans]
    assert [round(v.spacing[0], 2) for v in volumes] == [4.69, 5.47, 3.91]
    for path, volume in zip(scans, volumes, strict=True):
        assert volume.spacing[2] == pytest.approx(3.27, abs=0.01)
        canonical = nib.as_closest_canonical(nib.load(path))
        np.testing.assert_array_equal(volume.array, canonical.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(volume.affine, canonical.affine, atol=1e-6)


def test_write_like_is_exact(scans: list[Path], tmp_path: Path) -> None:
    for k, path in enumerate(scans):
        volume = read_volume(path)
        original = nib.load(path)
        written = nib.load(write_like(volume, volume.array, tmp_path / f"{k}.nii.gz"))
        np.testing.assert_array_equal(written.get_fdata(), original.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(written.affine, original.affine)


def test_thinned_scan_is_a_usable_training_input(scans: list[Path], tmp_path: Path) -> None:
    pairs = []
    for k, path in enumerate(scans):
        volume = read_volume(path)
        body = int((volume.array > foreground_threshold(volume.array)).sum())
        short = thin(volume.array, 1 / 6, np.random.default_rng(k), counts=100 * body)
        assert short.sum() == pytest.approx(volume.array.sum(), rel=0.02)
        assert 0.1 < np.std(short - volume.array) / volume.array.mean() < 0.6
        # one scale from the input, so SUV survive: the noise hardly moves it
        scale, quiet = (Normaliser().fit(v)["scale"] for v in (short, volume.array))
        assert scale == pytest.approx(quiet, rel=0.06)
        pairs.append(Pair(write_like(volume, short, tmp_path / f"{k}.nii.gz"), path, f"s{k}"))
    # the volumes are shorter than the patch along some axes
    items = list(PatchDataset(pairs, (48, 48, 48), patches_per_volume=2))
    assert all(item["input"].shape == (1, 48, 48, 48) for item in items)
    assert all(float(item["target"].max()) > 0.5 for item in items)
