"""Simulated scan pairs: files, physics, determinism."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from petite_fast.data import SCANNERS, load_pair, read_datalist
from petite_fast.errors import InputError

pytest.importorskip("scipy")
if importlib.util.find_spec("nilearn") is None:
    pytest.skip("nilearn is not installed", allow_module_level=True)

from petite_fast.data import phantom, simulate  # noqa: E402
from petite_fast.data.phantom import Subject, load_tissue  # noqa: E402

REDUCE = 4


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven subjects of scanner 136 at 48 x 48 x 34."""
    return simulate.simulate(tmp_path_factory.mktemp("sim"), "136", 7, seed=5, reduce=REDUCE)


def content(path: Path) -> dict[str, bytes]:
    """Every file under the folder of `path`, by relative name."""
    files = (p for p in path.parent.rglob("*") if p.is_file())
    return {str(p.relative_to(path.parent)): p.read_bytes() for p in files}


def test_files_and_listing(listing: Path) -> None:
    data = json.loads(listing.read_text())
    assert data["scanner"] == "136" and data["matrix"] == [48, 48, 34]
    assert data["training"][0].keys() == {"image", "label", "subject", "fold"}
    assert data["training"][0]["image"] == "images/sub-01_scanner-136_short.nii.gz"
    assert data["training"][0]["label"] == "labels/sub-01_scanner-136_standard.nii.gz"
    named = {entry[key] for entry in data["training"] for key in ("image", "label")}
    assert set(content(listing)) == named | {"dataset.json"}


def test_three_folds_split_by_subject(listing: Path) -> None:
    data = json.loads(listing.read_text())
    everyone = {f"sub-{k:02d}" for k in range(1, 8)}
    validations = [set(fold["validation"]) for fold in data["folds"]]
    assert sorted(len(v) for v in validations) == [2, 2, 3]
    assert set.union(*validations) == everyone and sum(map(len, validations)) == 7
    for number, fold in enumerate(data["folds"]):
        assert set(fold["training"]) == everyone - set(fold["validation"])
        of_fold = {e["subject"] for e in data["training"] if e["fold"] == number}
        assert of_fold == set(fold["validation"])
        assert len(read_datalist(listing, number, "validation")) == len(fold["validation"])


def test_grid_units_and_header(listing: Path) -> None:
    image = nib.load(read_datalist(listing)[0].image)
    assert image.get_data_dtype() == np.float32 and nib.aff2axcodes(image.affine) == tuple("RAS")
    assert image.header.get_xyzt_units()[0] == "mm" and int(image.header["sform_code"]) == 1
    np.testing.assert_allclose(image.header.get_zooms(), (4.875, 4.875, 4.875), rtol=1e-6)
    centre = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-4)


def test_scans_look_like_a_brain(listing: Path) -> None:
    for pair in read_datalist(listing):
        short, standard = load_pair(pair)
        assert 3e3 < np.percentile(standard.array, 99) < 25e3  # Bq/mL
        assert short.array.min() >= 0
        assert short.array.sum() == pytest.approx(standard.array.sum(), rel=0.02)
        places = np.argwhere(standard.array > standard.array.max() / 4) * 4.875
        extent = places.max(0) - places.min(0)
        assert (np.array([110, 130, 90]) < extent).all() and (extent < [180, 210, 170]).all()
        assert np.abs(places.mean(0) - np.array(standard.array.shape) * 4.875 / 2).max() < 25
        noise = (short.array - standard.array)[standard.array > standard.array.max() / 4]
        level = noise.std() / standard.array[standard.array > standard.array.max() / 4].mean()
        assert 0.08 < level < 0.4  # visible, yet the structure is there


def test_same_seed_same_bytes_whatever_came_before(tmp_path: Path, listing: Path) -> None:
    simulate.simulate(tmp_path / "first", "63", 3, seed=5, reduce=REDUCE)
    again = simulate.simulate(tmp_path / "again", "136", 7, seed=5, reduce=REDUCE)
    assert content(again) == content(listing)


def test_subjects_do_not_depend_on_how_many_there_are(tmp_path: Path, listing: Path) -> None:
    fewer = content(simulate.simulate(tmp_path, "136", 3, seed=5, reduce=REDUCE))
    more = content(listing)
    assert all(more[name] == data for name, data in fewer.items() if name.endswith(".gz"))


def test_no_two_subjects_share_anatomy(tmp_path: Path, listing: Path) -> None:
    other_seed = simulate.simulate(tmp_path / "seed", "136", 3, seed=6, reduce=REDUCE)
    twin = replace(SCANNERS["136"], tag="other")  # the same machine under another name
    other_scanner = simulate.simulate(tmp_path / "tag", twin, 3, seed=5, reduce=REDUCE)
    standards = [
        load_pair(pair)[1].array
        for path in (listing, other_seed, other_scanner)
        for pair in read_datalist(path)
    ]
    heads = [volume > np.percentile(volume, 99) / 3 for volume in standards]
    for i, first in enumerate(heads):
        for second in heads[:i]:
            assert 0.6 < 2 * (first & second).sum() / (first.sum() + second.sum()) < 0.96


def test_short_counts_are_part_of_the_standard_counts() -> None:
    scanner = replace(SCANNERS["90"].reduced(4), post_filter_fwhm_mm=0.01, counts=1e5)
    activity = np.full(scanner.matrix, 100, np.float32)
    activity[10:20, 10:20, 5:15] = 5000
    short, standard = simulate.scan(activity, scanner, np.random.default_rng(0))
    unit = activity.sum(dtype=np.float64) / 1e5  # Bq/mL per count
    counts, part = standard / unit, short / 6 / unit
    np.testing.assert_allclose(counts, np.round(counts), atol=0.02)
    np.testing.assert_allclose(part, np.round(part), atol=0.02)
    assert (part <= counts + 0.02).all()
    assert counts.sum() == pytest.approx(1e5, abs=4 * 1e5**0.5)
    assert part.sum() == pytest.approx(1e5 / 6, rel=0.04)


def test_psf_has_the_stated_width() -> None:
    scanner = replace(SCANNERS["63"], post_filter_fwhm_mm=0.01, counts=1e12)
    point = np.zeros(scanner.matrix, np.float32)
    point[64, 64, 31] = 1e6
    _, standard = simulate.scan(point, scanner, np.random.default_rng(0))
    for axis, mm in enumerate(scanner.spacing):
        profile = standard.sum(tuple(a for a in range(3) if a != axis), dtype=np.float64)
        place = np.arange(len(profile)) * mm
        mean = (profile * place).sum() / profile.sum()
        sigma = np.sqrt((profile * (place - mean) ** 2).sum() / profile.sum())
        assert 2.3548 * sigma == pytest.approx(7.0, rel=0.02)


def test_post_filter_correlates_the_noise() -> None:
    flat = np.full((40, 40, 30), 100, np.float32)
    white, filtered = (
        simulate.scan(
            flat,
            replace(SCANNERS["90"], post_filter_fwhm_mm=mm),
            np.random.default_rng(0),
        )[1]
        for mm in (0.01, 5.0)
    )

    def neighbours(image: np.ndarray) -> float:
        return float(np.corrcoef(image[:-1].ravel(), image[1:].ravel())[0, 1])

    # a Gaussian filter of sigma s voxels correlates neighbours by exp(-1 / (4 s^2))
    sigma = 5.0 / 2.3548 / 2.0
    assert abs(neighbours(white)) < 0.03
    assert neighbours(filtered) == pytest.approx(np.exp(-1 / (4 * sigma**2)), abs=0.03)


def test_activity_is_quantitative_and_does_not_depend_on_the_grid() -> None:
    subject = Subject.draw(load_tissue(), np.random.default_rng(2))
    coarse, fine = (subject.activity(SCANNERS["90"].reduced(factor)) for factor in (2, 1))
    assert fine.sum(dtype=np.float64) == pytest.approx(8 * coarse.sum(dtype=np.float64), rel=0.01)
    # regional factors are some ten per cent around the subject's uptake in pure grey matter
    assert np.percentile(fine, 99) == pytest.approx(subject.uptake, rel=0.3)
    merged = fine.reshape(64, 2, 64, 2, 45, 2).mean((1, 3, 5))
    assert np.corrcoef(merged.ravel(), coarse.ravel())[0, 1] > 0.97


def test_spots_lower_the_uptake_where_they_are() -> None:
    subject = Subject.draw(load_tissue(), np.random.default_rng(3))
    healthy = replace(subject, spots=np.zeros((0, 5)))
    scanner = SCANNERS["136"].reduced(2)
    with_spots, without = subject.activity(scanner), healthy.activity(scanner)
    inside = without > 1
    ratio = with_spots[inside] / without[inside]
    assert ratio.max() <= 1 + 1e-6
    assert 0.25 <= 1 - ratio.min() <= 0.75  # one spot takes 25-50 %, two may overlap
    assert (ratio > 0.98).mean() > 0.7  # and most of the brain keeps its uptake


def test_deformation_is_smooth_and_invertible() -> None:
    tissue = load_tissue()
    axes = [np.arange(-120, 121, 8.0)] * 3
    for seed in range(20):
        subject = Subject.draw(tissue, np.random.default_rng(seed))
        points = subject.template_points(axes).astype(np.float64)
        jacobian = np.stack([np.stack(np.gradient(points[i], 8.0)) for i in range(3)])
        determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))
        assert 0.3 < determinant.min() and determinant.max() < 3
        affine = replace(subject, warp=np.zeros_like(subject.warp)).template_points(axes)
        displacement = np.linalg.norm(points - affine, axis=0)  # mm
        assert 2 < displacement.mean() < 5


def test_listing_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate.simulate(tmp_path, "63", 3, reduce=REDUCE)
    assert (tmp_path / "dataset.json").is_file()

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.simulate(tmp_path, "63", 3, seed=1, reduce=REDUCE, progress=interrupt)
    assert not (tmp_path / "dataset.json").exists()  # no list over files of two runs
    assert not list(tmp_path.rglob(".*"))


def test_progress_counts_subjects(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    simulate.simulate(
        tmp_path, "63", 3, reduce=REDUCE, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scanner": "7"}, "scanner is '7'; expected one of"),
        ({"subjects": 2}, "subjects is 2; expected at least 3"),
        ({"seed": -1}, "seed is -1; expected"),
        ({"reduce": 0}, "reduce is 0; expected"),
        ({"reduce": 30}, "reduce is 30.*expected"),
    ],
)
def test_bad_arguments_leave_nothing(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    arguments = {"scanner": "63", "subjects": 3, "seed": 0, "reduce": REDUCE, **changes}
    with pytest.raises(InputError, match=message):
        simulate.simulate(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_without_nilearn_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tissue.cache_clear()
    monkeypatch.setattr(phantom.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install petite_fast\[app\]"):
        simulate.simulate(tmp_path / "out", "63", 3)
    assert not (tmp_path / "out").exists()


def test_nilearn_is_read_but_not_imported() -> None:
    code = (
        "import sys; from petite_fast.data.phantom import load_tissue; load_tissue();"
        "sys.exit('nilearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
