"""UNETR: MONAI's network with the published names and values, on any grid."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("monai")

from monai.data import MetaTensor
from monai.networks import nets

from petite_fast.models import UNETR
from petite_fast.models.unetr import at_grid, sides_of

TINY = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "feature_size": 4}


@pytest.fixture
def tiny() -> UNETR:
    torch.manual_seed(0)
    return UNETR((32, 32, 16), **TINY).eval()


def published(blocks: int = 12, size: int = 768, features: int = 32) -> dict[str, tuple[int, ...]]:
    """The 170 published names with their shapes for 64 x 64 x 64 (facts about the .pt files)."""
    embedding = "vit.patch_embedding"
    names = {
        f"{embedding}.position_embeddings": (1, 64, size),
        f"{embedding}.patch_embeddings.1.weight": (size, 4096),
        f"{embedding}.patch_embeddings.1.bias": (size,),
    }
    layers = {
        "mlp.linear1": (4 * size, size),
        "mlp.linear2": (size, 4 * size),
        "norm1": (size,),
        "norm2": (size,),
        "attn.out_proj": (size, size),
    }
    for i in range(blocks):
        names[f"vit.blocks.{i}.attn.qkv.weight"] = (3 * size, size)
        for layer, shape in layers.items():
            names[f"vit.blocks.{i}.{layer}.weight"] = shape
            names[f"vit.blocks.{i}.{layer}.bias"] = shape[:1]
    names |= {"vit.norm.weight": (size,), "vit.norm.bias": (size,)}

    def residual(name: str, cin: int, cout: int) -> None:
        for k, (source, side) in enumerate(((cin, 3), (cout, 3), (cin, 1)), 1):
            if k < 3 or cin != cout:
                names[f"{name}.conv{k}.conv.weight"] = (cout, source, side, side, side)

    residual("encoder1.layer", 1, features)
    for k, (factor, steps) in {2: (2, 2), 3: (4, 1), 4: (8, 0)}.items():
        wide = factor * features
        names[f"encoder{k}.transp_conv_init.conv.weight"] = (size, wide, 2, 2, 2)
        for i in range(steps):
            names[f"encoder{k}.blocks.{i}.0.conv.weight"] = (wide, wide, 2, 2, 2)
            residual(f"encoder{k}.blocks.{i}.1", wide, wide)
    widths = [size, 8 * features, 4 * features, 2 * features, features]
    for k, cin, cout in zip((5, 4, 3, 2), widths, widths[1:], strict=False):
        names[f"decoder{k}.transp_conv.conv.weight"] = (cin, cout, 2, 2, 2)
        residual(f"decoder{k}.conv_block", 2 * cout, cout)
    return names | {"out.conv.conv.weight": (1, features, 1, 1, 1), "out.conv.conv.bias": (1,)}


def test_names_shapes_and_counts_are_the_published_ones():
    with torch.device("meta"):
        network = UNETR()
    state = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    used = {k: v for k, v in state.items() if not re.match(network.peft_unused, k)}
    assert used == published()
    assert len(used) == 170
    assert sum(np.prod(shape) for shape in used.values()) == 101_670_049
    assert set(state) - set(used) == {
        f"vit.blocks.{i}.norm_cross_attn.{leaf}" for i in range(12) for leaf in ("weight", "bias")
    }
    with torch.device("meta"):
        smaller = UNETR((64, 64, 32))
    unused = 2 * 12 * 768
    assert sum(p.numel() for p in smaller.parameters()) == 101_645_473 + unused


def test_ssf_goes_where_the_published_one_does():
    with torch.device("meta"):
        network = UNETR()
    channels = {
        name: module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
        for name, module in network.named_modules()
        if re.fullmatch(network.peft_ssf, name)
    }
    assert len(channels) == 2 + 12 * 6
    assert 2 * sum(channels.values()) == 205_824


def test_golden_output_and_gradients(filled, formula, golden_unetr):
    """The golden values are float32; ours here are float64, as good as exact.

    The output agrees to 1e-4 of its largest value. A gradient is compared as a whole, by its
    Euclidean norm: a float32 sum that falls on the other side of a LeakyReLU's kink moves single
    elements, in MONAI's own float32 network by up to 7e-3 of the largest.
    """
    network = filled(UNETR(32)).double()
    x = torch.from_numpy(formula.volume("unetr", (1, 1, 32, 32, 32))).double().requires_grad_()
    y = network(x)
    want = golden_unetr["unetr_y"]
    assert np.abs(y.detach().numpy() - want).max() < 1e-4 * np.abs(want).max()
    y.pow(2).mean().backward()
    gradients = {f"unetr_grad/{name}": p.grad for name, p in network.named_parameters()}
    gradients["unetr_dx"] = x.grad
    keys = [key for key in golden_unetr if key != "unetr_y"]
    assert len(keys) == 4
    for key in keys:
        want, got = golden_unetr[key], gradients[key].numpy()
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"proj_type": "conv", "norm_name": ("group", {"num_groups": 2})},
        {"qkv_bias": True, "res_block": False, "conv_block": False},
    ],
)
def test_it_is_monais_network(options):
    """Same draws, same names, same outputs and gradients, in float64."""
    arguments = {"proj_type": "perceptron", **TINY, **options}
    torch.manual_seed(3)
    theirs = nets.UNETR(1, 2, (32, 16, 32), **arguments).double()
    torch.manual_seed(3)
    ours = UNETR((32, 16, 32), out_channels=2, **arguments).double()
    assert isinstance(ours, nets.UNETR)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x = torch.rand(2, 1, 32, 16, 32, dtype=torch.float64)
    outputs = [net(x) for net in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for y in outputs:
        y.pow(2).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not re.match(ours.peft_unused, name):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_no_attention_matrix_is_kept(tiny):
    """B x heads x N x N numbers per block would be kept if attention were a softmax of its own."""
    kept = set()

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.add(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tiny(torch.rand(1, 1, 48, 48, 48, requires_grad=True))
    assert not any(shape[-2:] == (27, 27) for shape in kept)


def test_every_used_parameter_gets_a_gradient(tiny):
    tiny(torch.rand(2, 1, 32, 32, 16)).sub(0.3).pow(2).mean().backward()
    unused = {n for n, p in tiny.named_parameters() if p.grad is None}
    assert unused == {n for n, _ in tiny.named_parameters() if re.match(tiny.peft_unused, n)}
    assert len(unused) == 24
    assert all(p.grad.any() for n, p in tiny.named_parameters() if n not in unused)


def test_encoder_and_decoder_cover_the_network(tiny):
    for name, _ in tiny.named_parameters():
        encoder, decoder = (re.match(p, name) for p in (tiny.peft_encoder, tiny.peft_decoder))
        assert bool(encoder) != bool(decoder), name
        assert bool(encoder) == name.startswith("vit.")
    assert re.match(tiny.peft_encoder, "vit") and not re.match(tiny.peft_encoder, "vitamin")


@pytest.mark.parametrize("sides", [(32, 32, 16), (16, 16, 16), (64, 16, 48)])
def test_any_grid(tiny, sides):
    positions = tiny.vit.patch_embedding.position_embeddings
    with torch.no_grad():
        y = tiny(torch.rand(2, 1, *sides))
    assert y.shape == (2, 1, *sides) and y.isfinite().all()
    assert positions.shape == (1, 4, 24)


def test_another_grid_is_the_network_of_that_grid_with_interpolated_embeddings(tiny):
    other = UNETR((64, 32, 48), **TINY).eval()
    state = tiny.state_dict()
    name = "vit.patch_embedding.position_embeddings"
    old = state[name][0].T.reshape(1, 24, 2, 2, 1)
    new = nn.functional.interpolate(old, size=(4, 2, 3), mode="trilinear", align_corners=False)
    state[name] = new.reshape(1, 24, 24).transpose(1, 2)
    other.load_state_dict(state)
    x = torch.rand(1, 1, 64, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(tiny(x), other(x), rtol=1e-5, atol=1e-6)


def test_interpolated_embeddings_learn(tiny):
    tiny(torch.rand(1, 1, 32, 64, 32)).pow(2).mean().backward()
    assert (tiny.vit.patch_embedding.position_embeddings.grad != 0).all()


def test_embeddings_are_interpolated_along_each_axis():
    """A ramp along one axis of the grid stays one, in (x, y, z) order of the tokens."""
    ramp = torch.arange(4.0)
    for axis, grid in enumerate(((4, 2, 3), (2, 4, 3), (2, 3, 4))):
        shape = [1, 1, 1]
        shape[axis] = 4
        volume = ramp.reshape(shape).expand(grid)
        new = list(grid)
        new[axis] = 8
        got = at_grid(volume.reshape(1, -1, 1), grid, tuple(new)).reshape(new)
        want = ((torch.arange(8.0) + 0.5) / 2 - 0.5).clamp(0, 3)
        torch.testing.assert_close(got.movedim(axis, -1)[0, 0], want)
    embeddings = torch.rand(1, 24, 5)
    assert at_grid(embeddings, (4, 2, 3), (4, 2, 3)) is embeddings


@pytest.mark.parametrize("sides", [(40, 32, 32), (32, 32, 31), (32, 0, 32)])
def test_sides_that_do_not_fit_are_named(tiny, sides):
    with pytest.raises(ValueError, match=re.escape(f"multiples of 16, got {list(sides)}")):
        tiny(torch.zeros(1, 1, *sides))


@pytest.mark.parametrize("shape", [(1, 2, 32, 32, 32), (1, 32, 32, 32)])
def test_input_shape(tiny, shape):
    with pytest.raises(ValueError, match=re.escape(f"[B, 1, X, Y, Z], got {list(shape)}")):
        tiny(torch.zeros(shape))


@pytest.mark.parametrize("img_size", [(64, 64), (64, 64, 40), 0, (64, 64, -16)])
def test_img_size_that_does_not_fit(img_size):
    with pytest.raises(ValueError, match="img_size must be one or three multiples of 16"):
        sides_of(img_size)


def test_config_builds_the_same_network():
    net = UNETR(32, out_channels=2, norm_name=("instance", {"affine": True}), **TINY)
    config = json.loads(json.dumps(net.config))
    again = UNETR(**config)
    assert again.config == net.config == config
    assert str(again) == str(net)
    net.config["img_size"][0] = 0
    assert net.config == config  # a fresh dict each time
    assert UNETR(**TINY).config["img_size"] == [64, 64, 64]


def test_dropout_acts_in_training_only():
    net = UNETR((32, 32, 16), dropout_rate=0.4, **TINY)
    attention = net.vit.blocks[0].attn
    for other in net.vit.modules():
        if isinstance(other, nn.Dropout) and other is not attention.drop_weights:
            other.p = 0.0
    x = torch.rand(1, 1, 32, 32, 16)
    with torch.no_grad():
        assert not torch.equal(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


def test_compiles_as_one_graph(tiny):
    torch._dynamo.reset()
    compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 1, 16, 48, 32)  # not its own grid
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), tiny(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast(tiny):
    for sides in ((32, 32, 16), (48, 32, 32)):
        x = torch.rand(1, 1, *sides)
        with torch.no_grad():
            want = tiny(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = tiny(x)
        assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_meta_tensor(tiny):
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        y = tiny(MetaTensor(x))
        assert isinstance(y, MetaTensor)
        assert torch.equal(y.as_tensor(), tiny(x))


def test_copies(tiny):
    other = copy.deepcopy(tiny)
    x = torch.rand(1, 1, 16, 16, 16)
    assert torch.equal(other(x), tiny(x)) and other.config == tiny.config


def test_monai_is_imported_when_it_is_asked_for():
    code = (
        "import sys, petite_fast.models as m; assert 'monai' not in sys.modules; "
        "from petite_fast.models import UNETR; assert 'monai' in sys.modules; "
        "assert UNETR is m.UNETR and 'UNETR' in m.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["monai", "einops"])
def test_what_is_missing_is_one_sentence(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try: from petite_fast.models import UNETR\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r'UNETR needs MONAI and einops \(.*\): pip install "petite_fast\[app\]"\n', done.stdout
    )
    assert missing in done.stdout.removeprefix("UNETR needs MONAI and einops")
