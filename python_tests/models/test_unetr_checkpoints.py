"""UNETR in files: both directories and .pt files, every layout of MONAI, any trained patch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("monai")

from petite_fast.errors import InputError
from petite_fast.models import UNETR, load_network, load_published, save_network
from petite_fast.models.unetr import at_grid

TINY = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "feature_size": 4}
POSITIONS = "vit.patch_embedding.position_embeddings"
UNUSED = re.compile(UNETR.peft_unused)


@pytest.fixture
def tiny() -> UNETR:
    torch.manual_seed(0)
    return UNETR((32, 32, 16), **TINY).eval()


def full_size(count: int = 64) -> dict[str, Tensor]:
    """Entries of the published size that take no room: one number each, but real positions."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in UNETR().state_dict().items()}
    state = {k: torch.tensor(i / 100).expand(shape) for i, (k, shape) in enumerate(shapes.items())}
    return {**state, POSITIONS: torch.randn(1, count, 768)}


def file_of(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 3, "best_acc": [31.5, 0.9, 0.1], "state_dict": state}, path)
    return path


def used(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not UNUSED.match(k)}


def require_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def test_round_trip_of_a_directory(tmp_path, tiny):
    save_network(tmp_path, tiny, scanner="63")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generator.safetensors", "network.json"]
    description = json.loads((tmp_path / "network.json").read_text())
    assert description == {
        "network": "unetr",
        "generator": tiny.config,
        "discriminator": None,
        "metadata": {"scanner": "63"},
    }
    state = torch.random.get_rng_state()
    loaded = load_network(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.network == "unetr" and loaded.discriminator is None
    assert loaded.metadata == {"scanner": "63"}
    assert isinstance(loaded.generator, UNETR) and not loaded.generator.training
    assert loaded.generator.config == tiny.config
    x = torch.rand(1, 1, 32, 32, 16)
    assert torch.equal(loaded.generator(x), tiny(x))


def test_a_cvtgan_says_so(tmp_path, tiny_generator):
    save_network(tmp_path, tiny_generator)
    assert load_network(tmp_path).network == "cvtgan"
    with pytest.raises(InputError, match="a CVT-GAN, which has no position embeddings"):
        load_network(tmp_path, img_size=(64, 64, 32))


def test_another_img_size_interpolates_a_directory_once(tmp_path, tiny):
    save_network(tmp_path, tiny)
    loaded = load_network(tmp_path, img_size=(48, 32, 32)).generator
    assert loaded.config == {**tiny.config, "img_size": [48, 32, 32]}
    want = at_grid(tiny.state_dict()[POSITIONS], (2, 2, 1), (3, 2, 2))
    require_equal(loaded.state_dict(), {**tiny.state_dict(), POSITIONS: want})
    x = torch.rand(1, 1, 48, 32, 32)
    torch.testing.assert_close(loaded(x), tiny(x))
    save_network(tmp_path / "again", loaded)
    assert load_network(tmp_path / "again").generator.config == loaded.config
    same = load_network(tmp_path, img_size=(32, 32, 16)).generator
    require_equal(same.state_dict(), tiny.state_dict())


@pytest.mark.parametrize("layout", ["194 entries", "170 entries", "stale cross-attention"])
def test_published_files_of_every_monai(tmp_path, layout):
    state = full_size()
    written = dict(state)
    if layout != "194 entries":
        written = used(state)
        assert len(written) == 170
    if layout.startswith("stale"):
        for i in range(12):
            for name in ("to_q.weight", "to_k.weight", "out_proj.bias"):
                written[f"vit.blocks.{i}.cross_attn.{name}"] = torch.zeros(3)
    path = file_of(tmp_path / "final.pt", written)
    loaded = load_network(path)
    assert loaded.network == "unetr" and loaded.discriminator is None and loaded.metadata == {}
    assert loaded.generator.config == UNETR(64, **TINY).config | {
        "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "feature_size": 32
    }  # fmt: skip
    got = loaded.generator.state_dict()
    assert len(got) == 194
    require_equal(got, used(state))
    for key, value in got.items():
        if UNUSED.match(key):
            initial = torch.full((768,), float(key.endswith("weight")))
            assert torch.equal(value, state[key] if layout == "194 entries" else initial)


@pytest.mark.parametrize(
    ("count", "img_size"),
    [(8, [32, 32, 32]), (27, [48, 48, 48]), (32, [64, 64, 32]), (216, [96, 96, 96])],
)
def test_patch_is_told_by_the_number_of_positions(tmp_path, count, img_size):
    path = file_of(tmp_path / "final.pt", used(full_size(count)))
    network = load_published(path)
    assert isinstance(network, UNETR) and network.config["img_size"] == img_size
    assert network.state_dict()[POSITIONS].shape == (1, count, 768)


def test_another_img_size_interpolates_a_published_file(tmp_path):
    state = full_size()
    network = load_published(file_of(tmp_path / "final.pt", state), img_size=(64, 64, 32))
    assert network.config["img_size"] == [64, 64, 32]
    want = at_grid(state[POSITIONS], (4, 4, 4), (4, 4, 2))
    assert torch.equal(network.state_dict()[POSITIONS], want)


def test_a_patch_that_is_not_told_is_asked_for(tmp_path):
    state = full_size(24)
    path = file_of(tmp_path / "final.pt", state)
    with pytest.raises(InputError, match="24 position embeddings, which do not tell .* img_size"):
        load_network(path)
    with pytest.raises(InputError, match="24 position embeddings"):
        load_network(path, img_size=(64, 64, 64))
    loaded = load_network(path, img_size=(64, 48, 32)).generator
    assert loaded.config["img_size"] == [64, 48, 32]
    assert torch.equal(loaded.state_dict()[POSITIONS], state[POSITIONS])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit.norm.bias": None}, "1 of 194 entries are missing, the first is 'vit.norm.bias'"),
        ({POSITIONS: None}, f"entries are missing, the first is '{POSITIONS}'"),
        ({POSITIONS: torch.zeros(1, 64, 9)}, r"has shape \[1, 64, 9\], expected \[1, 64, 768\]"),
        ({"vit.cls_token": torch.zeros(3)}, "are not part of it, the first is 'vit.cls_token'"),
        ({"out.conv.conv.bias": torch.zeros(4)}, r"has shape \[4\], expected \[1\]"),
        ({"vit.norm.bias": "zero"}, "'vit.norm.bias' is a str, expected a tensor"),
    ],
)
def test_published_file_is_read_strictly(tmp_path, change, message):
    state = {k: v for k, v in (used(full_size()) | change).items() if v is not None}
    with pytest.raises(InputError, match=message):
        load_network(file_of(tmp_path / "final.pt", state))


def test_img_size_that_does_not_fit(tmp_path, tiny):
    save_network(tmp_path, tiny)
    with pytest.raises(InputError, match="img_size must be one or three multiples of 16"):
        load_network(tmp_path, img_size=(48, 40, 32))
    path = file_of(tmp_path / "final.pt", used(full_size()))
    for img_size in ((64, 64), (64, 64, 40)):
        with pytest.raises(InputError, match="img_size must be one or three multiples of 16"):
            load_network(path, img_size=img_size)


def test_there_is_no_discriminator(tmp_path):
    path = file_of(tmp_path / "final.pt", used(full_size()))
    with pytest.raises(InputError, match="holds no discriminator: found a generator"):
        load_published(path, "discriminator")


def test_both_networks_in_one_file(tmp_path, tiny_generator, tiny):
    path = tmp_path / "both.pt"
    torch.save({"state_dict": tiny.state_dict(), "state_dict_G": tiny_generator.state_dict()}, path)
    with pytest.raises(InputError, match="both a CVT-GAN network and a UNETR: expected one"):
        load_network(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 3}, "does not fit its description: .*unexpected keyword argument 'depth'"),
        ({"img_size": [30, 32, 32]}, "does not fit its description: img_size must be"),
        ({"num_heads": 5}, "does not fit its description: hidden"),
        (
            {"img_size": [32, 32, 32]},
            rf"'{POSITIONS}' has shape \[1, 4, 24\], expected \[1, 8, 24\]",
        ),
    ],
)
def test_description_of_another_size(tmp_path, tiny, config, message):
    save_network(tmp_path, tiny)
    path = tmp_path / "network.json"
    description = json.loads(path.read_text())
    description["generator"] |= config
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match=message):
        load_network(tmp_path)
