"""Patches and whole pairs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from petite_fast.data import (
    Normaliser,
    Pair,
    PairDataset,
    PatchDataset,
    dataset,
    load_pair,
    write_volume,
)
from petite_fast.errors import InputError


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that a dataset reads, in order."""
    seen: list[Path] = []
    original = dataset.read_volume
    monkeypatch.setattr(dataset, "read_volume", lambda p: (seen.append(p), original(p))[1])
    return seen


def same(first: dict, second: dict) -> bool:
    return first["subject"] == second["subject"] and all(
        torch.equal(first[k], second[k]) for k in ("input", "target")
    )


def test_item_is_a_function_of_seed_epoch_and_index(pairs: list[Pair]) -> None:
    make = lambda **kw: PatchDataset(pairs, (6, 6, 4), seed=3, **kw)  # noqa: E731
    straight, resumed = make(), make(cache_bytes=0)
    for epoch in range(3):
        straight.set_epoch(epoch)
        items = [straight[i] for i in range(len(straight))]
    resumed.set_epoch(2)
    for i in reversed(range(len(resumed))):  # other order, no cache, no history
        assert same(items[i], resumed[i])
    other_seed, other_epoch = PatchDataset(pairs, (6, 6, 4), seed=4), make()
    other_seed.set_epoch(2)
    assert not all(same(items[i], other_seed[i]) for i in range(len(items)))
    assert not all(same(items[i], other_epoch[i]) for i in range(len(items)))


def test_items_are_aligned_normalised_patches(pairs: list[Pair], blob: np.ndarray) -> None:
    patches = PatchDataset(pairs, (6, 5, 4), patches_per_volume=3)
    assert len(patches) == 15
    scale = Normaliser().fit(blob)["scale"]
    windows = np.lib.stride_tricks.sliding_window_view(blob, (6, 5, 4)).reshape(-1, 6, 5, 4)
    subjects = []
    for item in patches:
        assert item["input"].shape == item["target"].shape == (1, 6, 5, 4)
        assert item["input"].dtype == torch.float32
        assert torch.equal(item["target"], 2 * item["input"])
        number = int(item["subject"][-2:])
        assert item["scale"]["scale"] == pytest.approx(number * scale, rel=1e-6)
        # every pair is a multiple of the same blob: normalised, all patches are windows of it
        distance = np.abs(windows / np.float32(scale) - item["input"][0].numpy()).max((1, 2, 3))
        assert distance.min() < 1e-5
        subjects.append(item["subject"])
    assert sorted(subjects) == sorted(3 * [p.subject for p in pairs])


def test_order_is_shuffled_and_changes_with_the_epoch(pairs: list[Pair]) -> None:
    patches = PatchDataset(pairs, (4, 4, 4))
    orders = []
    for epoch in range(2):
        patches.set_epoch(epoch)
        orders.append([item["subject"] for item in patches])
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[1])


def test_positions_change_with_the_epoch(pairs: list[Pair]) -> None:
    patches = PatchDataset(pairs[:1], (4, 4, 4))  # one pair: the order cannot change
    first = [item["input"] for item in patches]
    patches.set_epoch(1)
    assert not any(torch.equal(a, b["input"]) for a, b in zip(first, patches, strict=True))


def test_half_of_the_patches_are_centred_on_foreground(tmp_path: Path) -> None:
    image = np.zeros((60, 60, 60), np.float32)
    image[28:32, 28:32, 28:32] = 100  # 0.03 % of the volume
    image[28, 28, 28] = 101
    path = write_volume(image, np.eye(4), tmp_path / "v.nii.gz")
    patches = PatchDataset([Pair(path, path, "s")], (3, 3, 3), patches_per_volume=400)
    centred = sum(bool(item["input"][0, 1, 1, 1] > 0) for item in patches)
    assert 160 < centred < 240  # 200 +- 4 sigma


def test_patch_larger_than_the_volume_is_padded_symmetrically(
    pairs: list[Pair], blob: np.ndarray
) -> None:
    scale = Normaliser().fit(blob)["scale"]
    wanted = np.zeros((16, 10, 12), np.float32)
    wanted[2:14, :, 1:10] = blob / scale  # 12 -> 16: 2 + 2; 9 -> 12: 1 + 2
    for item in PatchDataset(pairs[:1], (16, 10, 12)):
        np.testing.assert_allclose(item["input"][0].numpy(), wanted, rtol=1e-6)


def test_padding_of_one_axis_keeps_the_others_random(pairs: list[Pair]) -> None:
    patches = PatchDataset(pairs[:1], (20, 4, 4), patches_per_volume=8)
    items = [item["input"] for item in patches]
    assert all(item.shape == (1, 20, 4, 4) and not item[0, :4].any() for item in items)
    assert not all(torch.equal(items[0], item) for item in items)


def test_every_corner_is_reached(tmp_path: Path) -> None:
    image = np.random.default_rng(0).uniform(1, 2, (6, 6, 6)).astype(np.float32)
    path = write_volume(image, np.eye(4), tmp_path / "v.nii")
    patches = PatchDataset([Pair(path, path, "s")], (5, 5, 5), patches_per_volume=100)
    assert len({float(item["input"][0, 0, 0, 0]) for item in patches}) == 8


def test_cache_holds_what_fits_and_drops_the_oldest(pairs: list[Pair], reads: list[Path]) -> None:
    one = PatchDataset(pairs[:1], (4, 4, 4))
    one[0]
    size = one._cache.nbytes
    assert size > 2 * 4 * 12 * 10 * 9
    reads.clear()

    patches = PatchDataset(pairs, (4, 4, 4), cache_bytes=int(2.5 * size))
    for volume in (0, 1, 0, 2, 0, 1):  # 2 evicts 1: 0 came first but was used later
        patches._load(volume)
        assert patches._cache.nbytes <= 2.5 * size
    assert [p.name for p in reads[::2]] == [f"in_{k}.nii.gz" for k in (1, 2, 3, 2)]


def test_a_pair_larger_than_the_cache_is_read_each_time(
    pairs: list[Pair], reads: list[Path]
) -> None:
    patches = PatchDataset(pairs[:1], (4, 4, 4), cache_bytes=100, patches_per_volume=3)
    assert len([patches[i] for i in range(3)]) == 3
    assert len(reads) == 6 and patches._cache.nbytes == 0


def test_large_folder_is_read_once_per_epoch(
    tmp_path: Path, pairs: list[Pair], reads: list[Path]
) -> None:
    many = [Pair(p.image, p.label, f"{i}-{p.subject}") for i in range(8) for p in pairs]
    one = PatchDataset(pairs[:1], (4, 4, 4))
    one[0]
    reads.clear()
    patches = PatchDataset(many, (4, 4, 4), cache_bytes=10 * one._cache.nbytes)
    for i in range(len(patches)):
        patches[i]
    assert len(reads) == 2 * len(many)


def test_pickle_leaves_the_cache_behind(pairs: list[Pair]) -> None:
    patches = PatchDataset(pairs, (4, 4, 4))
    item = patches[7]
    copy = pickle.loads(pickle.dumps(patches))
    assert patches._cache.nbytes > 0 and copy._cache.nbytes == 0
    assert same(item, copy[7])


@pytest.mark.parametrize("workers", [0, 1])
def test_default_loader_collates(pairs: list[Pair], workers: int) -> None:
    patches = PatchDataset(pairs, (4, 4, 4))
    batches = list(DataLoader(patches, batch_size=5, num_workers=workers))
    assert len(batches) == 4 and batches[0]["input"].shape == (5, 1, 4, 4, 4)
    assert batches[0]["scale"]["scale"].shape == (5,)
    assert torch.equal(batches[1]["target"][2], patches[7]["target"])


def test_petite_normalisation_reaches_the_patches(pairs: list[Pair]) -> None:
    normaliser = Normaliser("petite")
    item = PatchDataset(pairs, (12, 10, 9), normaliser=normaliser)[0]
    for key in ("input", "target"):
        assert float(item[key].min()) == 0 and float(item[key].max()) == pytest.approx(1)


def test_whole_pairs(pairs: list[Pair], blob: np.ndarray) -> None:
    items = list(PairDataset(pairs))
    assert [item["subject"] for item in items] == [p.subject for p in pairs]
    item = items[2]
    assert item["input"].shape == (1, 12, 10, 9) and item["input"].dtype == torch.float32
    np.testing.assert_array_equal(item["image"].array, 3 * blob)
    np.testing.assert_array_equal(item["label"].array, 6 * blob)
    back = Normaliser.inverse(item["target"][0], item["scale"])
    np.testing.assert_allclose(back.numpy(), 6 * blob, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((12, 10, 8), (2, 2, 3)), ((12, 10, 9), (2, 2, 3.01))]
)
def test_pair_on_two_grids_is_refused(
    tmp_path: Path, pairs: list[Pair], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    other = write_volume(np.ones(shape), np.diag([*spacing, 1]), tmp_path / "other.nii.gz")
    pair = Pair(pairs[0].image, other, "s")
    for read in (lambda: load_pair(pair), lambda: PatchDataset([pair], (4, 4, 4))[0]):
        with pytest.raises(InputError, match="different grids.*expected") as caught:
            read()
        assert str(pair.image) in str(caught.value) and str(pair.label) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_same_grid_in_another_orientation_is_accepted(tmp_path: Path, pairs: list[Pair]) -> None:
    image, _ = load_pair(pairs[0])
    flipped = image.affine @ np.array(
        [[-1, 0, 0, 11], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float
    )
    path = write_volume(image.array[::-1], flipped, tmp_path / "flipped.nii.gz")
    _, label = load_pair(Pair(pairs[0].image, path, "s"))
    np.testing.assert_array_equal(label.array, image.array)


@pytest.mark.parametrize("which", ["image", "label"])
def test_empty_volume_is_refused_by_name(tmp_path: Path, pairs: list[Pair], which: str) -> None:
    empty = write_volume(np.zeros((12, 10, 9)), np.diag([2, 2, 3, 1]), tmp_path / "empty.nii.gz")
    files = {"image": pairs[0].image, "label": pairs[0].label, which: empty}
    pair = Pair(files["image"], files["label"], "s")
    for data in (PatchDataset([pair], (4, 4, 4)), PairDataset([pair])):
        with pytest.raises(InputError, match="empty.nii.gz: no voxel is above zero"):
            data[0]


def test_misuse(pairs: list[Pair]) -> None:
    with pytest.raises(ValueError, match="pairs is empty"):
        PatchDataset([], (4, 4, 4))
    with pytest.raises(ValueError, match=r"patch is \(4, 4\)"):
        PatchDataset(pairs, (4, 4))
    with pytest.raises(ValueError, match=r"patch is \(4, 0, 4\)"):
        PatchDataset(pairs, (4, 0, 4))
    with pytest.raises(ValueError, match="patches_per_volume is 0"):
        PatchDataset(pairs, (4, 4, 4), patches_per_volume=0)
    with pytest.raises(IndexError, match="20 patches"):
        PatchDataset(pairs, (4, 4, 4))[20]
