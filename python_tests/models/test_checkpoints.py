"""Saved networks: round trips, a full disk, and every bad directory by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petite_fast.errors import InputError
from petite_fast.models import load_network, save_network


def equal_states(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path, tiny_generator, tiny_discriminator) -> Path:
    save_network(tmp_path / "net", tiny_generator, tiny_discriminator, scanner="136")
    return tmp_path / "net"


def test_round_trip(saved, tiny_generator, tiny_discriminator):
    state = torch.random.get_rng_state()
    loaded = load_network(saved)
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal_states(loaded.generator, tiny_generator)
    assert equal_states(loaded.discriminator, tiny_discriminator)
    assert loaded.generator.config == tiny_generator.config
    assert loaded.discriminator.config == tiny_discriminator.config
    assert loaded.metadata == {"scanner": "136"}
    assert not loaded.generator.training and not loaded.discriminator.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.generator.parameters())
    x = torch.rand(1, 1, 16, 16, 16)
    assert torch.equal(loaded.generator(x), tiny_generator.eval()(x))


def test_directory_layout(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "discriminator.safetensors",
        "generator.safetensors",
        "network.json",
    ]
    description = json.loads((saved / "network.json").read_text())
    assert list(description) == ["network", "generator", "discriminator", "metadata"]
    assert description["network"] == "cvtgan"
    assert description["generator"]["widths"] == [8, 16, 32, 64]


def test_generator_alone_replaces_a_pair(saved, tiny_generator):
    save_network(saved, tiny_generator, patch=[32, 32, 32])
    assert sorted(p.name for p in saved.iterdir()) == ["generator.safetensors", "network.json"]
    loaded = load_network(saved)
    assert loaded.discriminator is None and loaded.metadata == {"patch": [32, 32, 32]}


def test_channels_last_and_half_networks_come_back(tmp_path, tiny_generator):
    tiny_generator.half().to(memory_format=torch.channels_last_3d)
    save_network(tmp_path, tiny_generator)
    loaded = load_network(tmp_path).generator
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert equal_states(loaded, tiny_generator.float())


def test_adapters_are_not_a_base_network(tmp_path, tiny_generator):
    stage = tiny_generator.encoder_layer2_down[0]
    stage.prompt = stage.make_prompt(4)
    with pytest.raises(ValueError, match="generator cannot be saved as a base.*prompt.embedding"):
        save_network(tmp_path / "net", tiny_generator)
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_not_json_writes_nothing(tmp_path, tiny_generator):
    with pytest.raises(TypeError):
        save_network(tmp_path / "net", tiny_generator, scanner=object())
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_directory(tmp_path, tiny_generator):
    path = tmp_path / "net"
    path.write_text("mine")
    with pytest.raises(InputError, match="net is a file: expected a directory"):
        save_network(path, tiny_generator)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("room", [100, 100_000])
def test_full_disk_leaves_what_was_there(
    tmp_path, monkeypatch, tiny_generator, tiny_discriminator, existing, room
):
    """The writer stops after `room` bytes: within network.json, or within the generator."""
    directory = tmp_path / "net"
    if existing:
        save_network(directory, tiny_generator, tiny_discriminator, scanner="old")
    old = {p.name: p.read_bytes() for p in directory.iterdir()} if existing else {}

    def failing(write):
        def writer(self, content, *args, **kwargs):
            write(self, content[:room], *args, **kwargs)
            if len(content) > room:
                raise OSError(errno.ENOSPC, "No space left on device")

        return writer

    monkeypatch.setattr(Path, "write_bytes", failing(Path.write_bytes))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    with torch.no_grad():
        tiny_generator.decoder_layer3_up.bias.add_(1)
    with pytest.raises(OSError, match="No space left"):
        save_network(directory, tiny_generator, tiny_discriminator, scanner="new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == old
    if existing:
        assert load_network(directory).metadata == {"scanner": "old"}


def test_full_disk_for_real(saved, tiny_generator):
    """The kernel stops the write, by a limit on file size."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = {p.name: p.read_bytes() for p in saved.iterdir()}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError):
            save_network(saved, tiny_generator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == old


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no network at .*nowhere: expected a directory or a"):
        load_network(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no checkpoint at .*nowhere.pt"):
        load_network(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="is not a saved network: it has no network.json"):
        load_network(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"<html>"])
def test_damaged_description(saved, content):
    (saved / "network.json").write_bytes(content)
    with pytest.raises(InputError, match="network.json cannot be read as JSON"):
        load_network(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"network": "unet"},
        {"generator": None},
        {"discriminator": 3},
        {"metadata": []},
    ],
)
def test_foreign_description(saved, change):
    path = saved / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="network.json does not describe a network"):
        load_network(saved)


@pytest.mark.parametrize("content", [[], {}, "cvtgan", None])
def test_description_of_something_else(saved, content):
    (saved / "network.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="network.json does not describe a network"):
        load_network(saved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 3}, "does not fit its description: .*unexpected keyword argument 'depth'"),
        ({"widths": [8, 16]}, "widths must have 4 entries"),
        ({"widths": "none"}, "does not fit its description"),
        (
            {"widths": [8, 16, 32, 128]},
            r"generator.safetensors does not fit the network: "
            r"'encoder_layer3_down.0.patch_embed.proj.weight' has shape \[64, 32, 3, 3, 3\], "
            r"expected \[128, 32, 3, 3, 3\]",
        ),
        ({"encoder_depths": [2, 2, 2]}, "entries are missing, the first is 'encoder_layer1_down"),
        ({"decoder_depths": [1, 1]}, "entries are not part of it, the first is 'decoder_layer1_up"),
    ],
)
def test_description_of_another_size(saved, config, message):
    path = saved / "network.json"
    description = json.loads(path.read_text())
    description["generator"] |= config
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match=message):
        load_network(saved)


def test_missing_tensor_file(saved):
    (saved / "discriminator.safetensors").unlink()
    with pytest.raises(InputError, match="lacks the file .*discriminator.safetensors"):
        load_network(saved)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_tensor_file(saved, keep):
    path = saved / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="generator.safetensors is damaged or not a safetensors"):
        load_network(saved)


def test_discriminator_given_as_generator(saved):
    os.replace(saved / "discriminator.safetensors", saved / "generator.safetensors")
    with pytest.raises(InputError, match="entries are missing, the first is 'encoder_layer0_down"):
        load_network(saved)


def test_tensor_of_another_shape_is_named(saved):
    path = saved / "generator.safetensors"
    tensors = load_file(path)
    tensors["decoder_layer4.1.bias"] = torch.zeros(7)
    save_file(tensors, path)
    with pytest.raises(
        InputError, match=r"'decoder_layer4.1.bias' has shape \[7\], expected \[4\]"
    ):
        load_network(saved)
