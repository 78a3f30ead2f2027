"""Training pairs from dynamic series and from standard scans."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import SECRET, make_series
from ecat_cases import make_ecat
from pet_trees import SPACING, bids_tree, dynamic_tree, save

from petite_fast.data import Volume, read_pairs, read_volume, to_static, to_suv
from petite_fast.data.bids import images
from petite_fast.data.pairs import Recipe, make_pairs
from petite_fast.data.validate import validate
from petite_fast.errors import InputError


def entries(listing: Path) -> list[dict[str, str]]:
    content = json.loads(listing.read_text())
    return [*content["training"], *content.get("test", [])]


def test_frames_of_a_bids_tree(tmp_path: Path) -> None:
    """The protocol of PETITE: one 5-minute frame against the mean of six."""
    tree = dynamic_tree(tmp_path / "bids", subjects=5)
    listing = make_pairs(images(tree), tmp_path / "out", Recipe(short=2))
    content = json.loads(listing.read_text())
    assert content["units"] == "Bq/mL" and content["pairs"] == {"short_frame": 2}
    assert content["scanner"] == "GE MEDICAL SYSTEMS Discovery ST"
    assert {e["subject"] for e in entries(listing)} == {f"sub-{k:02d}" for k in range(1, 6)}
    for entry in entries(listing):
        series = read_volume(next((tree / entry["subject"]).rglob("*.nii.gz"))).array
        short, standard = (
            read_volume(listing.parent / entry[key]).array for key in ("image", "label")
        )
        np.testing.assert_array_equal(short, series[2])
        np.testing.assert_allclose(standard, series.mean(0, dtype=np.float64), rtol=1e-6)
    assert [problem for problem in validate(listing)[1] if problem.fatal] == []
    folds = [read_pairs(listing, 0, split) for split in ("training", "validation", "test")]
    assert [len(pairs) for pairs in folds] == [3, 1, 1]


def test_frames_of_dicom_and_ecat(tmp_path: Path) -> None:
    """Series of other formats, of one pair each: both are in Bq/mL."""
    scans = [make_series(tmp_path / "pet", frames=3), make_ecat(tmp_path / "a.v", 3)]
    listing = make_pairs(scans, tmp_path / "out", Recipe(short=1))
    for entry, scan in zip(entries(listing), scans, strict=True):
        series = read_volume(scan)
        short, standard = (read_volume(listing.parent / entry[k]) for k in ("image", "label"))
        np.testing.assert_array_equal(short.array, series.array[1])
        np.testing.assert_array_equal(standard.array, to_static(series).array)
        np.testing.assert_allclose(standard.affine, series.affine, atol=1e-5)


def test_only_the_frames_that_are_named_make_the_standard_scan(tmp_path: Path) -> None:
    tree = dynamic_tree(tmp_path / "bids", subjects=1)
    listing = make_pairs(images(tree), tmp_path / "out", Recipe(short=1, standard=(0, 1, 4)))
    series = read_volume(images(tree)[0]).array
    label = read_volume(listing.parent / entries(listing)[0]["label"]).array
    np.testing.assert_allclose(label, series[[0, 1, 4]].mean(0, dtype=np.float64), rtol=1e-6)
    assert json.loads(listing.read_text())["pairs"]["standard_frames"] == [0, 1, 4]


def test_suv_by_the_weight_in_participants(tmp_path: Path) -> None:
    """Corrected to the injection: SUV = c * weight / dose."""
    tree = dynamic_tree(tmp_path / "bids", subjects=2)
    recipe = Recipe(short=0, suv="bw")
    listing = make_pairs(images(tree), tmp_path / "out", recipe)
    assert json.loads(listing.read_text())["units"] == "SUVbw"
    for entry, weight in zip(entries(listing), (61, 62), strict=True):
        series = read_volume(next((tree / entry["subject"]).rglob("*.nii.gz"))).array
        short = read_volume(listing.parent / entry["image"]).array
        np.testing.assert_allclose(short, series[0] * (weight * 1000 / 388.8e6), rtol=1e-6)


def test_one_scan_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume keeps its `array`, so nobody may ask for those of all scans."""
    opened: list[Volume] = []
    monkeypatch.setattr(
        "petite_fast.data.pairs.read_volume",
        lambda path: opened.append(read_volume(path)) or opened[-1],
    )
    static = images(bids_tree(tmp_path / "static", subjects=2))
    make_pairs(static, tmp_path / "a", Recipe(doses=(4,)))
    make_pairs(images(dynamic_tree(tmp_path / "dynamic")), tmp_path / "b", Recipe(short=1))
    assert len(opened) == 7 and not [v for v in opened if "array" in vars(v)]


def test_visits_stay_with_their_subject(tmp_path: Path) -> None:
    tree = dynamic_tree(tmp_path / "bids", subjects=3, sessions=2)
    found = entries(make_pairs(images(tree), tmp_path / "out", Recipe(short=2)))
    assert Counter(e["subject"] for e in found) == {"sub-01": 2, "sub-02": 2, "sub-03": 2}
    assert {e["session"] for e in found} == {"ses-1", "ses-2"}


def test_dicom_of_one_patient_is_one_subject_and_its_id_stays(tmp_path: Path) -> None:
    """Folders named after patients; two series of one, one of another."""

    def other(ds, _):
        ds.PatientID, ds.Manufacturer, ds.ManufacturerModelName = "ID-4712", "GE", "710"

    def first(ds, _):
        ds.Manufacturer, ds.ManufacturerModelName = "GE", "710"

    folders = [
        make_series(tmp_path / SECRET / "1", first),
        make_series(tmp_path / SECRET / "2", other),
        make_series(tmp_path / SECRET / "3", first),
    ]
    out = tmp_path / "out"
    recipe = Recipe(doses=(6,), suv="lbm")
    found = entries(make_pairs(folders, out, recipe))
    assert [(e["subject"], e.get("session")) for e in found] == [
        ("sub-001", "ses-01"),
        ("sub-002", None),
        ("sub-001", "ses-02"),
    ]
    assert json.loads((out / "dataset.json").read_text())["scanner"] == "GE 710"
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        content += gzip.decompress(content) if path.name.endswith(".gz") else b""
        for secret in (SECRET, "ID-471", "19500102", "ACC-0815"):
            assert secret.encode() not in content and secret not in str(path.relative_to(out))
    label = read_volume(out / found[0]["label"]).array
    np.testing.assert_array_equal(label, to_suv(read_volume(folders[0]), "lbm").array)


def test_doses_are_nested_and_as_noisy_as_counts_say(tmp_path: Path) -> None:
    flat = np.zeros((40, 40, 50), np.float32)
    flat[..., :40] = 250
    scans = [save(tmp_path / f"{k}.nii.gz", flat) for k in range(2)]
    out = tmp_path / "out"
    listing = make_pairs(scans, out, Recipe(doses=(20, 4), counts=100))
    found = entries(listing)
    assert [e["session"] for e in found] == ["ses-drf4", "ses-drf20"] * 2
    assert found[0]["label"] == found[1]["label"]
    for entry, dose in zip(found[:2], (4, 20), strict=True):
        relative = read_volume(out / entry["image"]).array[..., :40] / 250
        assert relative.mean() == pytest.approx(1, rel=0.01)
        assert relative.std() == pytest.approx(((dose - 1) / 100) ** 0.5, rel=0.03)
    four, twenty = (read_volume(out / e["image"]).array for e in found[:2])
    assert (np.rint(twenty / 50) <= np.rint(four / 10)).all()  # in counts of 2.5
    other = read_volume(out / found[2]["image"]).array
    assert not np.array_equal(four, other)  # each scan has its own noise
    again = make_pairs(scans, tmp_path / "again", Recipe(doses=(4, 20), counts=100))
    np.testing.assert_array_equal(read_volume(again.parent / found[0]["image"]).array, four)
    assert read_volume(out / found[0]["image"]).spacing == pytest.approx(SPACING)


def test_a_dynamic_series_is_averaged_before_it_is_thinned(tmp_path: Path) -> None:
    tree = dynamic_tree(tmp_path / "bids", subjects=1)
    listing = make_pairs(images(tree), tmp_path / "out", Recipe(doses=(4,), standard=(0, 1)))
    series = read_volume(images(tree)[0]).array
    label = read_volume(listing.parent / entries(listing)[0]["label"]).array
    np.testing.assert_allclose(label, series[:2].mean(0, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({}, "one of them"),
        ({"short": 1, "doses": (4,)}, "one of them"),
        ({"doses": (1,)}, "2 or more"),
        ({"doses": (4,), "counts": 0.0}, "positive"),
        ({"short": 1, "standard": (1,)}, "several"),
    ],
)
def test_recipes_that_make_no_pair(recipe, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recipe(**recipe)


def test_scans_that_make_no_pair(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(scans: list[Path], recipe: Recipe, words: str) -> None:
        with pytest.raises(InputError, match=words):
            make_pairs(scans, out, recipe)
        assert not out.exists() and list(tmp_path.glob(".*")) == []

    static = images(bids_tree(tmp_path / "static", subjects=1))
    dynamic = images(dynamic_tree(tmp_path / "dynamic", subjects=1))
    refused([], Recipe(short=1), "at least one")
    refused(static, Recipe(short=1), "a dynamic series, or a dose reduction")
    refused(dynamic, Recipe(short=6), "frame 6 is not among")
    refused(dynamic, Recipe(short=5, standard=(0, 1)), "frame 5 is not among")
    bare = save(tmp_path / "bare.nii.gz", np.eye(4, dtype=np.float32)[None] + 1)
    refused(
        [*static, bare], Recipe(doses=(4,)), "bare.nii.gz: its units are not given; expected Bq"
    )
    refused([bare], Recipe(doses=(4,), suv="bw"), "no SUV, its units are not given")
    empty = save(tmp_path / "empty.nii.gz", np.zeros((4, 4, 4), np.float32))
    refused([bare, empty], Recipe(doses=(4,)), "empty.nii.gz")
    (tmp_path / "dynamic" / "pet.json").write_text(json.dumps({"Units": "Bq/mL"}))
    refused(dynamic, Recipe(short=1), "frame times are not given")
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(InputError, match="not an empty folder"):
        make_pairs(static, out, Recipe(doses=(4,)))
    assert [p.name for p in out.iterdir()] == ["mine"]
