"""Published checkpoints: either slot order, strict, and every bad file refused in one sentence."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from petite_fast.errors import InputError
from petite_fast.models import (
    CVTGANDiscriminator,
    CVTGANGenerator,
    identify,
    load_network,
    load_published,
)
from petite_fast.models import published as published_files


class Code:
    """Pickles to a call of os.mkdir: unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def equal_states(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, CVTGANGenerator, CVTGANDiscriminator]:
    """A file laid out as the published ones, with the generator in the first slot."""
    torch.manual_seed(0)
    generator, discriminator = CVTGANGenerator(), CVTGANDiscriminator()
    path = tmp_path_factory.mktemp("published") / "final.pt"
    torch.save(
        {
            "epoch": 7,
            "best_acc": [np.float64(31.5), np.float32(0.9), 0.1],
            "state_dict": generator.state_dict(),
            "state_dict_G": discriminator.state_dict(),
        },
        path,
    )
    return path, generator, discriminator


def read_published(path: Path) -> dict:
    with torch.serialization.safe_globals(published_files.NUMPY_SCALARS):
        return torch.load(path, weights_only=True)


def test_identify(tiny_generator, tiny_discriminator):
    assert identify(tiny_generator.state_dict()) == ("cvtgan", "generator")
    assert identify(tiny_discriminator.state_dict()) == ("cvtgan", "discriminator")
    assert identify({"vit.norm.weight": torch.zeros(1)}) == ("unetr", "generator")
    for other in ({}, {"model.0.weight": torch.zeros(1)}, {0: 1}):
        with pytest.raises(InputError, match="not that of a CVT-GAN network or a UNETR"):
            identify(other)
    both = {**tiny_generator.state_dict(), **tiny_discriminator.state_dict()}
    with pytest.raises(InputError, match="not that of a CVT-GAN network"):
        identify(both)


def test_published_file_in_either_order(published, tmp_path):
    path, generator, discriminator = published
    content = read_published(path)
    swapped = tmp_path / "swapped.pt"
    slots = {"state_dict": content["state_dict_G"], "state_dict_G": content["state_dict"]}
    torch.save(content | slots, swapped)
    for file in (path, swapped):
        assert equal_states(load_published(file), generator)
        assert equal_states(load_published(file, "discriminator"), discriminator)
    loaded = load_network(swapped)
    assert equal_states(loaded.generator, generator)
    assert equal_states(loaded.discriminator, discriminator)
    assert loaded.metadata == {} and not loaded.generator.training


def test_numpy_scalars_of_numpy_1_are_read(published, tmp_path):
    """The files were written with NumPy 1, which pickles scalars under another module name."""
    discriminator = published[2]
    path = tmp_path / "numpy1.pt"
    content = {"best_acc": [np.float64(31.5)], "state_dict": discriminator.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # no checksums: can be edited
    written = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\n" in written
    path.write_bytes(written)
    assert equal_states(load_published(path, "discriminator"), discriminator)


def test_bare_state_dict(published, tmp_path):
    _, _, discriminator = published
    torch.save(discriminator.state_dict(), tmp_path / "bare.pt")
    assert equal_states(load_published(tmp_path / "bare.pt", "discriminator"), discriminator)


def test_discriminator_file_asked_for_the_generator(published, tmp_path):
    _, _, discriminator = published
    path = tmp_path / "d.pt"
    torch.save({"state_dict": discriminator.state_dict(), "epoch": 3}, path)
    for load in (load_published, load_network):
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(caught.value) == f"{path} holds no generator: found a discriminator"


@pytest.mark.parametrize(
    "content", [{}, [1, 2], {"state_dict": {"model.0.weight": torch.zeros(2)}}, torch.zeros(3)]
)
def test_file_of_another_network(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match="other.pt holds no CVT-GAN network or UNETR"):
        load_published(path)


def test_unknown_kind(published):
    with pytest.raises(ValueError, match="kind must be 'generator' or 'discriminator', got 'G'"):
        load_published(published[0], "G")


def test_published_file_is_read_strictly(tmp_path):
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in CVTGANDiscriminator().state_dict().items()}
    path = tmp_path / "d.pt"
    tensors = {k: torch.zeros(shape) for k, shape in shapes.items()}

    def failing(content: dict, message: str) -> None:
        torch.save({"state_dict": content}, path)
        with pytest.raises(InputError, match=message):
            load_published(path, "discriminator")

    short = {k: v for k, v in tensors.items() if "running" not in k}
    failing(short, "18 of 93 entries are missing, the first is 'conv0.2.running_mean'")
    failing(tensors | {"conv0.0.lora_A": torch.zeros(1)}, "not part of it.*'conv0.0.lora_A'")
    failing(tensors | {"conv1.0.bias": torch.zeros(9)}, r"has shape \[9\], expected \[16\]")
    failing(tensors | {"conv1.0.bias": "zero"}, "'conv1.0.bias' is a str, expected a tensor")


@pytest.mark.parametrize("where", ["beside the weights", "as the file", "among the weights"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, published, where):
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    weights = published[2].state_dict()
    if where == "beside the weights":
        torch.save({"state_dict": weights, "best_acc": Code(trace)}, path)
    elif where == "as the file":
        path.write_bytes(pickle.dumps(Code(trace), protocol=2))
    else:
        torch.save({"state_dict": {**weights, "linear.bias": Code(trace)}}, path)
    for load in (load_published, load_network):
        with pytest.raises(InputError, match="holds Python code or objects.*nothing in it was run"):
            load(path)
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path, tiny_discriminator):
    torch.save(tiny_discriminator, tmp_path / "module.pt")
    with pytest.raises(InputError, match="holds Python code or objects besides tensors"):
        load_published(tmp_path / "module.pt", "discriminator")


def test_damaged_files(tmp_path, published):
    path = tmp_path / "d.pt"
    torch.save({"state_dict": published[2].state_dict()}, path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 30, len(whole) // 2, len(whole) - 10)]
    torch.save(
        {"state_dict": published[2].state_dict()}, path, _use_new_zipfile_serialization=False
    )
    whole = path.read_bytes()
    damaged += [whole[:n] for n in (30, len(whole) // 2, len(whole) - 10)]
    damaged += [b"<!DOCTYPE html><html></html>", bytes(range(256)) * 8]
    damaged += [pickle.dumps(Code(tmp_path / "trace"), protocol=5)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_published(path, "discriminator")
        message = str(caught.value)
        assert re.fullmatch(r"[^\n]* cannot be read as a PyTorch checkpoint: [^\n]*", message)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(InputError, match="no checkpoint at"):
        load_published(tmp_path)
