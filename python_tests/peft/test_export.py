"""Export of merged networks: state dicts and MONAI bundles that rebuild the network."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import safetensors.torch
import torch
from peft_cases import run, scramble
from torch import nn

from petite_fast import LoraConfig, PromptConfig, get_peft_model
from petite_fast.data.normalise import Normaliser
from petite_fast.errors import InputError
from petite_fast.peft.export import export_bundle, export_state_dict

monai = pytest.importorskip("monai")
pytest.importorskip("einops")
KWARGS = {
    "in_channels": 1, "out_channels": 1, "img_size": [16, 16, 16], "feature_size": 4,
    "hidden_size": 24, "mlp_dim": 48, "num_heads": 2,
}  # fmt: skip
DESCRIPTION = {"_target_": "monai.networks.nets.UNETR", **KWARGS}
METADATA = {"patch": [16, 16, 16], "scanner": "63", "authors": "A. Author"}


def make():
    torch.manual_seed(0)
    return monai.networks.nets.UNETR(**KWARGS).eval()


def merge(net):
    return scramble(get_peft_model(net, LoraConfig(r=2))).merge_and_unload()


@pytest.fixture(scope="module")
def merged():
    return merge(make())


@pytest.fixture
def x():
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def parse(bundle, **changes):
    parser = monai.bundle.ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser.read_meta(bundle / "configs" / "metadata.json")
    parser["bundle_root"] = str(bundle)
    for key, value in changes.items():
        parser[key] = value
    return parser


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_state_dict(merged, x, tmp_path, suffix):
    path = tmp_path / "new" / f"network{suffix}"
    export_state_dict(merged, path)
    if suffix == ".pt":
        state = torch.load(path, weights_only=True)
    else:
        state = safetensors.torch.load_file(path)
    plain = make()
    assert all(type(value) is torch.Tensor for value in state.values())
    plain.load_state_dict(state, strict=True)
    assert torch.equal(run(plain, x), run(merged, x))
    assert not torch.allclose(run(make(), x), run(merged, x))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tied_weights_are_written_twice(tmp_path, suffix):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    export_state_dict(net, tmp_path / f"a{suffix}")
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if suffix == ".pt":
        fresh.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    else:
        fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    assert torch.equal(fresh[1].weight, net[0].weight)


def test_what_is_not_a_plain_network_is_refused(generator, tmp_path):
    adapted = get_peft_model(make(), LoraConfig(r=2))
    prompted = get_peft_model(
        generator, PromptConfig({"encoder_layer2_down.0": 2})
    ).merge_and_unload()
    for net, words in (
        (adapted, "expected it after merge_and_unload"),
        (prompted, "encoder_layer2_down.0 still has .* prompts, which cannot be folded"),
        (nn.Sequential(adapted), "still has a LoRA"),
    ):
        with pytest.raises(InputError, match=words):
            export_state_dict(net, tmp_path / "a.pt")
        with pytest.raises(InputError, match=words):
            export_bundle(
                net, tmp_path, "a", network_config=DESCRIPTION, metadata=METADATA
            )  # fmt: skip
    with pytest.raises(InputError, match="ends in '.onnx', expected .safetensors or .pt"):
        export_state_dict(make(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(merged, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def full_disk(path, content, real=Path.write_bytes):
        real(path, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_state_dict(merged, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_bundle_rebuilds_the_network(merged, x, tmp_path):
    state = torch.random.get_rng_state()
    bundle = export_bundle(
        merged, tmp_path, "unetr-63", network_config=DESCRIPTION, metadata=METADATA
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bundle == tmp_path / "unetr-63"
    files = sorted(str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file())
    assert files == ["configs/inference.json", "configs/metadata.json", "models/model.pt"]
    parser = parse(bundle)
    net = parser.get_parsed_content("network_def").eval()
    state = torch.load(parser.get_parsed_content("ckpt_path"), weights_only=True)
    net.load_state_dict(state, strict=True)
    assert torch.equal(run(net, x), run(merged, x))
    inferer = parser.get_parsed_content("inferer")
    assert inferer.roi_size == [16, 16, 16] and inferer.overlap == 0.5
    torch.testing.assert_close(inferer(x, merged), run(merged, x))


def test_bundle_of_our_own_network(generator, tmp_path):
    net = merge(generator.float())
    description = {"_target_": "petite_fast.models.CVTGANGenerator", **net.config}
    metadata = {"patch": (32, 32, 16), "normalisation": "paired"}
    bundle = export_bundle(net, tmp_path, "g", network_config=description, metadata=metadata)
    parser = parse(bundle)
    rebuilt = parser.get_parsed_content("network_def").eval()
    rebuilt.load_state_dict(torch.load(bundle / "models/model.pt", weights_only=True), strict=True)
    x = torch.randn(1, 1, 32, 32, 16)
    assert torch.equal(run(rebuilt, x), run(net, x))
    record = json.loads((bundle / "configs/metadata.json").read_text())
    assert set(record["required_packages_version"]) == {"nibabel", "petite_fast"}


def test_metadata_has_what_the_specification_demands(merged, tmp_path):
    bundle = export_bundle(merged, tmp_path, "a", network_config=DESCRIPTION, metadata=METADATA)
    parser = parse(bundle)
    for name, about in monai.bundle.properties.MetaProperties.items():
        about = {str(key): value for key, value in about.items()}
        assert parser.get(about["id"]) is not None, name
    for name, about in monai.bundle.properties.InferProperties.items():
        about = {str(key): value for key, value in about.items()}
        assert not about["required"] or about["id"] in parser, name
    record = json.loads((bundle / "configs/metadata.json").read_text())
    assert {
        "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
        "required_packages_version", "authors", "copyright", "network_data_format",
    } <= record.keys()  # fmt: skip
    assert record["monai_version"] == monai.__version__.partition("+")[0]
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["pytorch_version"])
    assert record["scanner"] == "63" and record["authors"] == "A. Author"
    formats = record["network_data_format"]
    for tensor in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        assert {
            "type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range",
            "is_patch_data", "channel_def",
        } == tensor.keys()  # fmt: skip
        assert tensor["dtype"] == "float32" and tensor["num_channels"] == 1
    for path in bundle.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("kind", ["paired", "petite", None])
def test_bundle_inference_is_ours(merged, tmp_path, kind):
    """From a NIfTI to a NIfTI, with the normalisation of training and back."""
    rng = np.random.default_rng(0)
    volume = (1000 * rng.random((24, 20, 16)) ** 3 - 5).astype(np.float32)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = 5
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "in" / "a.nii.gz")
    metadata = METADATA if kind is None else METADATA | {"normalisation": kind}
    bundle = export_bundle(merged, tmp_path, "a", network_config=DESCRIPTION, metadata=metadata)
    parser = parse(
        bundle, dataset_dir=str(tmp_path / "in"), output_dir=str(tmp_path / "out"), device="cpu"
    )
    (item,) = parser.get_parsed_content("dataset")
    (batch,) = parser.get_parsed_content("dataloader")
    assert torch.equal(batch["image"][0], item["image"])
    network = copy.deepcopy(merged)
    pred = parser.get_parsed_content("inferer")(batch["image"], network).detach()
    parser.get_parsed_content("postprocessing")({**item, "pred": pred[0]})
    (written,) = (tmp_path / "out").iterdir()
    result = nibabel.load(written)
    assert np.allclose(result.affine, affine)

    window = monai.inferers.SlidingWindowInferer((16, 16, 16), 4, 0.5, "constant")
    if kind is None:
        expected = run_window(window, volume, network)
    else:
        normaliser = Normaliser(kind)
        record = normaliser.fit(volume)
        y = run_window(window, normaliser.apply(volume, record).astype(np.float32), network)
        expected = normaliser.inverse(y, record)
    np.testing.assert_allclose(result.get_fdata(), expected, rtol=1e-4, atol=1e-3)


def run_window(window, volume, network):
    with torch.no_grad():
        return window(torch.from_numpy(volume)[None, None], network)[0, 0].numpy()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": ".."}, "name is '..'"),
        ({"network_config": {}}, "_target_ is None"),
        (
            {"network_config": {**DESCRIPTION, "_target_": "no.such.Class"}},
            "does not build no.such",
        ),
        (
            {"network_config": {**DESCRIPTION, "feature": 3}},
            "does not build monai.networks.nets.UN",
        ),
        ({"network_config": {"_target_": "pathlib.Path"}}, "builds a P.*, expected a network"),
        (
            {"network_config": {**DESCRIPTION, "feature_size": 8}},
            "describes another network: encoder1.* is .4, 1, 3, 3, 3. in this one, expected .8, 1",
        ),
        ({"metadata": {}}, "patch is None, expected three sides"),
        ({"metadata": {"patch": [16, 16]}}, r"patch is \[16, 16\]"),
        ({"metadata": {**METADATA, "subjects": ["a"]}}, r"metadata has \['subjects'\], expected"),
        ({"metadata": {**METADATA, "normalisation": "z"}}, "normalisation is 'z', expected one of"),
    ],
)
def test_bad_descriptions_are_refused(merged, tmp_path, changes, words):
    arguments = {"name": "a", "network_config": DESCRIPTION, "metadata": METADATA} | changes
    with pytest.raises(InputError, match=words) as caught:
        export_bundle(merged, tmp_path, **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
