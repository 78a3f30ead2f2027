"""Pretrain, adapt, merge and export both networks, tiny, with one recipe of every kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from monai.bundle import ConfigParser
from monai.networks import nets
from safetensors.torch import load_file

from petite_fast.data import write_volume
from petite_fast.errors import InputError
from petite_fast.models import UNETR, CVTGANGenerator, build_network, load_network, save_network
from petite_fast.peft.mix import recipes
from petite_fast.training import tasks
from petite_fast.training.about import recipe_sizes
from petite_fast.training.loop import TrainSettings
from petite_fast.training.objectives import GANObjective, L1Objective, MSEObjective

PATCH = (32, 16, 16)
UNETR_SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "feature_size": 4}
CVT_SIZES = {"widths": (8, 8, 16, 16)}
# What may stay beside the folded weights: prompts and bottleneck adapters.
RECIPES = [
    ("unetr", "petite", False),
    ("unetr", "bitfit", False),
    ("unetr", "ssf+lora+bitfit", False),
    ("unetr", "vpt+lora", True),
    ("unetr", "adapter+ssf", True),
    ("unetr", "vpt-deep", True),
    ("cvtgan", "ln", False),
    ("cvtgan", "ssf", False),
    ("cvtgan", "lora+adapter", True),
    ("cvtgan", "petite", True),
]


@dataclass
class Project:
    root: Path
    data: tasks.TrainingData
    settings: TrainSettings
    scan: np.ndarray

    def base(self, network: str) -> Path:
        return self.root / network


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Three noisy and clean volumes, and a base of each network, trained for two steps."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    entries = []
    for k in range(3):
        clean = rng.uniform(1, 2, (1, 1, 1)) + np.linspace(0, 1, 30)[:, None, None] * np.ones(
            (30, 16, 12)
        )
        noisy = clean * rng.uniform(0.5, 1.5, clean.shape)
        for name, array in (("short", noisy), ("standard", clean)):
            path = root / f"{name}-{k}.nii.gz"
            write_volume(array.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]), path)
        entries.append(
            {"image": f"short-{k}.nii.gz", "label": f"standard-{k}.nii.gz", "subject": f"s{k}"}
        )
    listing = root / "dataset.json"
    listing.write_text(json.dumps({"training": entries, "scanner": "63"}))
    data = tasks.TrainingData(listing, None, PATCH)
    settings = TrainSettings(root / "none", steps=2, batch=2, lr=5e-2, seed=1)
    for network, sizes in (("unetr", UNETR_SIZES), ("cvtgan", CVT_SIZES)):
        out = replace(settings, out=root / network)
        tasks.pretrain(data, out, network=network, sizes=sizes)
    return Project(root, data, settings, noisy.astype(np.float32))


def test_pretrained_unetr(project):
    base = project.base("unetr")
    loaded = load_network(base)
    assert loaded.network == "unetr" and loaded.discriminator is None
    assert loaded.generator.config["img_size"] == list(PATCH)
    assert loaded.metadata["patch"] == list(PATCH) and loaded.metadata["scanner"] == "63"
    rows = (base / "log.csv").read_text().splitlines()
    assert rows[0] == "step,loss,l1,lr,seconds" and len(rows) == 3
    assert load_network(project.base("cvtgan")).discriminator is not None


def test_sizes_that_do_not_fit(project, tmp_path):
    settings = replace(project.settings, out=tmp_path)
    for network, sizes, message in (
        ("unetr", {"hidden_size": 25}, "no unetr of these sizes: hidden"),
        ("cvtgan", {"widths": (8, 8)}, "no cvtgan of these sizes: widths must have 4"),
    ):
        with pytest.raises(InputError, match=message):
            tasks.pretrain(project.data, settings, network=network, sizes=sizes)


def test_a_unetr_takes_a_batch_of_one_small_patch(project, tmp_path):
    """CVT-GAN's BatchNorm needs more; InstanceNorm does not."""
    settings = replace(project.settings, out=tmp_path, batch=1, steps=1)
    data = replace(project.data, patch=(16, 16, 16))
    assert len(tasks.pretrain(data, settings, network="unetr", sizes=UNETR_SIZES).rows) == 1
    with pytest.raises(InputError, match="BatchNorm"):
        tasks.pretrain(data, settings, sizes=CVT_SIZES)


@pytest.mark.parametrize(("network", "recipe", "stays"), RECIPES)
def test_adapt_reconstruct_merge(project, network, recipe, stays, tmp_path):
    base, out, merged = project.base(network), tmp_path / "adapter", tmp_path / "merged"
    settings = replace(project.settings, out=out)
    report = tasks.finetune(base, project.data, settings, recipe=recipe, rank=2)
    assert len(report.rows) == 2 and 0 < report.trainable < 0.5 * report.parameters
    before = tasks.load_reconstructor(base).array(project.scan)
    after = tasks.load_reconstructor(base, out).array(project.scan)
    assert not np.allclose(before, after, rtol=1e-4)
    assert tasks.merge(base, out, merged) == stays
    assert (merged / "adapter_config.json").exists() == stays
    again = tasks.load_reconstructor(merged)
    assert again.patch == PATCH
    got = again.array(project.scan)
    assert np.abs(got - after).max() <= 2e-5 * np.abs(after).max()
    if stays:  # what stayed counts: the folded network alone gives something else
        bare = tasks.load_reconstructor(merged / "base").array(project.scan)
        assert np.abs(bare - after).max() > 1e-4 * np.abs(after).max()


@pytest.mark.parametrize("network", ["unetr", "cvtgan"])
def test_full_finetuning_writes_a_base(project, network, tmp_path):
    out = tmp_path / "full"
    settings = replace(project.settings, out=out)
    report = tasks.finetune(project.base(network), project.data, settings, recipe="full")
    assert report.trainable == report.parameters
    assert load_network(out).network == network and not (out / "adapter_config.json").exists()
    after = tasks.load_reconstructor(out).array(project.scan)
    before = tasks.load_reconstructor(project.base(network)).array(project.scan)
    assert not np.allclose(before, after, rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "recipe", "arguments", "message"),
    [
        ("unetr", "lora+vpt", {}, "decoder of unetr is made of convolutions"),
        ("cvtgan", "magic", {}, "recipe is 'magic', expected one of petite, full"),
        ("unetr", "vpt", {"num_prompts": (1, 2, 3)}, r"num_prompts is \(1, 2, 3\), expected 1"),
        ("cvtgan", "lora", {"rank": 0}, "r is 0"),
    ],
)
def test_recipes_that_cannot_be(project, network, recipe, arguments, message, tmp_path):
    settings = replace(project.settings, out=tmp_path / "out")
    with pytest.raises(InputError, match=message):
        tasks.finetune(project.base(network), project.data, settings, recipe=recipe, **arguments)
    assert not (tmp_path / "out").exists()


def test_number_of_prompts(project):
    for network, numbers, count in (("unetr", (3,), 3 * 24), ("unetr", None, 50 * 24)):
        net = tasks.adapted(
            load_network(project.base(network)).generator, network, "vpt", num_prompts=numbers
        )
        assert net.get_submodule("vit.prompt").embedding.numel() == count


def test_objective_of_each_network(project, tmp_path):
    assert isinstance(tasks.finetune_objective(load_network(project.base("unetr"))), MSEObjective)
    gan = tasks.finetune_objective(load_network(project.base("cvtgan")))
    assert isinstance(gan, GANObjective) and not gan.trains_discriminator
    save_network(tmp_path, CVTGANGenerator(**CVT_SIZES))
    assert isinstance(tasks.finetune_objective(load_network(tmp_path)), L1Objective)


def test_a_unetr_without_records_slides_over_its_own_patch(tmp_path):
    save_network(tmp_path, UNETR((32, 48, 16), **UNETR_SIZES))
    assert tasks.load_reconstructor(tmp_path).patch == (32, 48, 16)


def test_parameters_that_ssf_adds_are_saved_and_loaded(project, tmp_path):
    """Folded SSF gives layers a bias that they are built without."""
    base, out, merged = project.base("unetr"), tmp_path / "adapter", tmp_path / "merged"
    tasks.finetune(base, project.data, replace(project.settings, out=out), recipe="petite", rank=2)
    tasks.merge(base, out, merged)
    description = json.loads((merged / "network.json").read_text())
    assert sorted(description["added"]) == [
        f"decoder2.conv_block.norm{k}.{leaf}" for k in (1, 2) for leaf in ("bias", "weight")
    ]
    assert "added" not in json.loads((base / "network.json").read_text())
    loaded = load_network(merged)
    save_network(tmp_path / "again", loaded.generator, **loaded.metadata)
    again = load_network(tmp_path / "again", img_size=(16, 16, 16)).generator
    assert again.config["img_size"] == [16, 16, 16]
    x = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(again(x), loaded.generator(x))
    description["added"] = ["decoder2.conv_block.conv1.conv.weight"]
    (merged / "network.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="'decoder2.conv_block.conv1.conv.weight' is not a weight"):
        load_network(merged)


def test_export_as_a_state_dict(project, tmp_path):
    base, out = project.base("unetr"), tmp_path / "adapter"
    tasks.finetune(base, project.data, replace(project.settings, out=out), recipe="lora", rank=2)
    x = torch.rand(1, 1, *PATCH)
    want = tasks.load_reconstructor(base, out).network(x)
    for name in ("net.safetensors", "net.pt"):
        tasks.export(base, out, tmp_path / name, "state-dict")
        read = load_file if name.endswith("safetensors") else torch.load
        theirs = nets.UNETR(1, 1, PATCH, proj_type="perceptron", **UNETR_SIZES).eval()
        theirs.load_state_dict(read(tmp_path / name))
        torch.testing.assert_close(theirs(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="expected .safetensors or .pt"):
        tasks.export(base, None, tmp_path / "net.bin", "state-dict")


@pytest.mark.parametrize(
    ("network", "recipe", "target"),
    [
        ("unetr", None, "monai.networks.nets.UNETR"),
        ("unetr", "petite", "petite_fast.models.build_network"),
        ("cvtgan", "bitfit", "petite_fast.models.CVTGANGenerator"),
    ],
)
def test_export_as_a_bundle(project, network, recipe, target, tmp_path):
    base, out = project.base(network), None
    if recipe:
        out = tmp_path / "adapter"
        settings = replace(project.settings, out=out)
        tasks.finetune(base, project.data, settings, recipe=recipe, rank=2)
    bundle = tmp_path / "bundles" / "mine"
    tasks.export(base, out, bundle, "monai-bundle")
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    assert parser["network_def"]["_target_"] == target
    theirs = parser.get_parsed_content("network_def").eval()
    theirs.load_state_dict(torch.load(bundle / "models" / "model.pt"))
    x = torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        want = tasks.load_reconstructor(base, out).network(x)
        torch.testing.assert_close(theirs(x), want, rtol=1e-4, atol=1e-5)
    told = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert told["patch"] == list(PATCH)


def test_what_cannot_be_folded_is_not_exported(project, tmp_path):
    base, out = project.base("unetr"), tmp_path / "adapter"
    tasks.finetune(base, project.data, replace(project.settings, out=out), recipe="vpt")
    with pytest.raises(InputError, match="cannot be folded"):
        tasks.export(base, out, tmp_path / "net.pt", "state-dict")
    assert not (tmp_path / "net.pt").exists()


def test_recipe_sizes_are_the_published_ones():
    sizes = {row.recipe: row for row in recipe_sizes("unetr")}
    assert list(sizes) == recipes("unetr")
    published = {
        "ln": 38_400,
        "bitfit": 75_265,
        "adapter": 1_779_840,
        "vpt": 38_400 + 144,
        "vpt-deep": 460_800 + 144,
        "ssf": 205_824,
        "petite": 295_040,
    }
    assert {name: sizes[name].trainable for name in published} == published
    assert sizes["petite"].percent == pytest.approx(0.290, abs=5e-4)
    sizes = {row.recipe: row for row in recipe_sizes("cvtgan")}
    assert sizes["full"].trainable == 28_715_681 and sizes["full"].percent == 100
    assert sizes["adapter"].trainable == 207_392 and sizes["ln"].trainable == 11_776


def test_build_network_with_added_parameters():
    plain = build_network("unetr", **UNETR_SIZES)
    name = "vit.blocks.0.attn.qkv.bias"
    net = build_network("unetr", [name], **UNETR_SIZES)
    assert set(net.state_dict()) - set(plain.state_dict()) == {name}
    assert net.state_dict()[name].shape == (72,) and not net.state_dict()[name].any()
    for wrong in ("vit.norm.bias", "vit.nothing.bias", "vit.norm.gamma", 3):
        with pytest.raises(ValueError, match="is not a weight or bias"):
            build_network("unetr", [wrong], **UNETR_SIZES)
