"""CVT-GAN: published names, counts and values; tiny networks; gradients; shapes; compile."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from petite_fast.models import CVTGANDiscriminator, CVTGANGenerator
from petite_fast.models.cvt import Attention, TransformerStage

BN = ("weight", "bias", "running_mean", "running_var")


def assert_close(got: torch.Tensor, want: np.ndarray) -> None:
    """1e-4 of the largest value, the agreement the golden values promise in float32."""
    assert got.shape == want.shape
    error = np.abs(got.detach().numpy() - want).max() / np.abs(want).max()
    assert error < 1e-4, f"relative error {error:.1e}"


def batch_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (width,) for leaf in BN} | {f"{name}.num_batches_tracked": ()}


def layer(name: str, *shape: int, out: int | None = None) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0] if out is None else out,)}


def stage(name: str, cin: int, c: int, depth: int, up: bool = False) -> dict[str, tuple[int, ...]]:
    proj = (cin, c, 2, 2, 2) if up else (c, cin, 3, 3, 3)
    names = layer(f"{name}.patch_embed.proj", *proj, out=c) | layer(f"{name}.patch_embed.norm", c)
    for j in range(depth):
        block = f"{name}.blocks.{j}"
        names |= layer(f"{block}.norm1", c) | layer(f"{block}.norm2", c)
        for p in "qkv":
            names[f"{block}.attn.conv_proj_{p}.conv.weight"] = (c, 1, 3, 3, 3)
            names |= batch_norm(f"{block}.attn.conv_proj_{p}.bn", c)
            names[f"{block}.attn.proj_{p}.weight"] = (c, c)
        names |= layer(f"{block}.attn.proj", c, c)
        names |= layer(f"{block}.mlp.fc1", 4 * c, c) | layer(f"{block}.mlp.fc2", c, 4 * c)
    return names


def unit(name: str, norm: int, cin: int, cout: int) -> dict[str, tuple[int, ...]]:
    return layer(f"{name}.0", cout, cin, 3, 3, 3) | batch_norm(f"{name}.{norm}", cout)


def shortcut(name: str, cin: int, cout: int) -> dict[str, tuple[int, ...]]:
    return layer(f"{name}.conv", cout, cin, 1, 1, 1) | layer(
        f"{name}.transconv", cin, cout, 1, 1, 1, out=cout
    )


PUBLISHED_GENERATOR = (
    unit("encoder_layer0_down", 2, 1, 64)
    | stage("encoder_layer1_down.0", 64, 128, 1)
    | stage("encoder_layer2_down.0", 128, 256, 2)
    | stage("encoder_layer3_down.0", 256, 512, 2)
    | unit("decoder_layer1", 2, 512, 512)
    | shortcut("resup1", 512, 512)
    | stage("decoder_layer1_up", 512, 256, 2, up=True)
    | unit("decoder_layer2", 3, 512, 256)
    | shortcut("resup2", 512, 256)
    | stage("decoder_layer2_up", 256, 128, 1, up=True)
    | unit("decoder_layer3", 2, 256, 128)
    | shortcut("resup3", 256, 128)
    | layer("decoder_layer3_up", 128, 64, 2, 2, 2, out=64)
    | layer("decoder_layer4.0", 64, 128, 3, 3, 3)
    | layer("decoder_layer4.1", 32, 64, 3, 3, 3)
    | layer("decoder_layer4.2", 32, 1, 2, 2, 2, out=1)
)
PUBLISHED_DISCRIMINATOR = (
    unit("conv0", 2, 2, 8)
    | unit("conv1", 2, 8, 16)
    | unit("conv2", 2, 16, 32)
    | stage("conv3", 32, 64, 1)
    | stage("conv4", 64, 64, 1)
    | layer("linear", 1, 128)
)


@pytest.mark.parametrize(
    ("build", "published", "numbers", "tensors", "entries"),
    [
        (CVTGANGenerator, PUBLISHED_GENERATOR, 28_715_681, 232, 316),
        (CVTGANDiscriminator, PUBLISHED_DISCRIMINATOR, 295_001, 66, 93),
    ],
)
def test_names_shapes_and_counts_are_the_published_ones(
    build, published, numbers, tensors, entries
):
    with torch.device("meta"):
        network = build()
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == published
    assert len(network.state_dict()) == entries
    assert len(list(network.parameters())) == tensors
    assert sum(p.numel() for p in network.parameters()) == numbers


def test_generator_golden_output_and_gradients(filled, formula, golden):
    generator = filled(CVTGANGenerator())
    x = torch.from_numpy(formula.volume("cvt0", (1, 1, 32, 32, 48))).requires_grad_()
    y = generator(x)
    assert_close(y, golden["cvtgan_g0"])
    y.pow(2).mean().backward()
    assert_close(x.grad, golden["cvtgan_g0_dx"])
    parameters = dict(generator.named_parameters())
    prefix = "cvtgan_g0_grad/"
    keys = [k.removeprefix(prefix) for k in golden if k.startswith(prefix)]
    assert len(keys) == 4
    for key in keys:
        assert_close(parameters[key].grad, golden[prefix + key])


def test_discriminator_golden_output(filled, formula, golden):
    discriminator = filled(CVTGANDiscriminator())
    shape = (1, 1, 32, 32, 48)
    pair = [torch.from_numpy(formula.volume(name, shape)) for name in ("cvt0", "cvty0")]
    with torch.no_grad():
        y = discriminator(torch.cat(pair, 1))
        logits = discriminator(torch.cat(pair, 1), logits=True)
    assert_close(y, golden["cvtgan_d0"])
    assert torch.equal(logits.sigmoid(), y)


def rates(network: nn.Module) -> dict[str, float]:
    return {
        name: m.p
        for name, m in network.named_modules()
        if isinstance(m, (nn.Dropout, nn.Dropout3d)) and m.p
    }


def test_dropout_rates_are_the_published_ones(tiny_generator, tiny_discriminator):
    generator = rates(tiny_generator)
    assert set(generator.values()) == {0.2}
    assert {name.split(".")[0] for name in generator} == {"encoder_layer2_down", "decoder_layer2"}
    assert len(generator) == 1 + 1 + 2 * 2  # decoder_layer2, pos_drop, two blocks of two
    discriminator = rates(tiny_discriminator)
    assert discriminator.pop("conv2.3") == 0.2
    assert set(discriminator.values()) == {0.3}
    assert len(discriminator) == 2 * (1 + 2)


def test_initialisation(tiny_generator):
    for module in tiny_generator.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.8 * bound < module.weight.abs().max() <= bound
            assert module.bias is None or not module.bias.any()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm3d)):
            assert module.eps == 1e-5 and (module.weight == 1).all() and not module.bias.any()


@pytest.mark.parametrize("sides", [(32, 32, 32), (16, 48, 32), (64, 16, 16)])
def test_generator_keeps_the_grid(tiny_generator, sides):
    x = torch.rand(2, 1, *sides)
    with torch.no_grad():
        y = tiny_generator.eval()(x)
    assert y.shape == x.shape and y.isfinite().all() and not torch.equal(x, y)


@pytest.mark.parametrize("sides", [(32, 32, 32), (33, 20, 47), (16, 16, 16)])
def test_discriminator_takes_any_grid(tiny_discriminator, sides):
    with torch.no_grad():
        y = tiny_discriminator.eval()(torch.rand(1, 2, *sides))
    assert list(y.shape) == [1, 16, *(-(-side // 16) for side in sides)]
    assert (y > 0).all() and (y < 1).all()


def test_the_output_is_a_correction_of_the_input(tiny_generator):
    with torch.no_grad():
        for p in tiny_generator.decoder_layer4.parameters():
            p.zero_()
        x = torch.rand(1, 1, 16, 16, 32)
        assert torch.equal(tiny_generator.eval()(x), x)


@pytest.mark.parametrize("sides", [(40, 48, 48), (64, 64, 63)])
def test_sides_that_do_not_fit_are_named(tiny_generator, sides):
    with pytest.raises(ValueError, match=re.escape(f"multiples of 16, got {list(sides)}")):
        tiny_generator(torch.zeros(1, 1, *sides))


@pytest.mark.parametrize("shape", [(1, 2, 32, 32, 32), (1, 32, 32, 32)])
def test_generator_input_shape(tiny_generator, shape):
    with pytest.raises(ValueError, match=re.escape(f"[B, 1, D, H, W], got {list(shape)}")):
        tiny_generator(torch.zeros(shape))


def test_discriminator_input_shape(tiny_discriminator):
    with pytest.raises(ValueError, match=re.escape("[B, 2, D, H, W], got [1, 1, 32, 32, 32]")):
        tiny_discriminator(torch.zeros(1, 1, 32, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (8, 16, 32)}, "widths must have 4 entries"),
        ({"encoder_depths": (1, 2)}, "encoder_depths must have 3 entries"),
        ({"widths": (8, 16, 30, 64)}, "4 heads for 30"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        CVTGANGenerator(**arguments)


def test_config_builds_the_same_network():
    generator = CVTGANGenerator(
        (8, 12, 16, 20), encoder_depths=(1, 1, 3), encoder_drop=(0, 0.5, 0), channel_drop=0.1
    )
    discriminator = CVTGANDiscriminator((4, 8, 8, 16), depths=(2, 1), heads=(4, 2), drop=(0, 0.1))
    for network in (generator, discriminator):
        config = json.loads(json.dumps(network.config))
        again = type(network)(**config)
        assert again.config == network.config
        assert str(again) == str(network)
        network.config["widths"][0] = 0
        assert network.config == config  # a fresh dict each time


@pytest.mark.parametrize("build", [CVTGANGenerator, CVTGANDiscriminator])
def test_every_used_parameter_gets_a_gradient(build):
    torch.manual_seed(0)
    network = build(widths=(8, 16, 32, 64))
    x = torch.rand(2, 1 if build is CVTGANGenerator else 2, 32, 32, 32)
    network(x).sub(0.3).pow(2).mean().backward()
    unused = {n for n, p in network.named_parameters() if p.grad is None}
    declared = {n for n, _ in network.named_parameters() if re.match(network.peft_unused, n)}
    assert unused == declared != set()
    zero = {n for n, p in network.named_parameters() if n not in unused and not p.grad.any()}
    # The same vector added to every key is invisible to the softmax.
    assert all(n.endswith("attn.conv_proj_k.bn.bias") for n in zero)


def test_encoder_and_decoder_cover_the_generator(tiny_generator):
    for name, _ in tiny_generator.named_parameters():
        encoder = re.match(tiny_generator.peft_encoder, name)
        decoder = re.match(tiny_generator.peft_decoder, name)
        assert bool(encoder) != bool(decoder), name


def test_discriminator_has_no_decoder(tiny_discriminator):
    for name, _ in tiny_discriminator.named_parameters():
        assert re.match(tiny_discriminator.peft_encoder, name) or name.startswith("linear.")
        assert not re.match(tiny_discriminator.peft_decoder, name)


def test_channels_last_and_strided_input(tiny_generator):
    x = torch.rand(2, 1, 32, 16, 32)
    strided = torch.rand(2, 1, 32, 32, 32)[..., ::2].transpose(3, 4)
    tiny_generator.eval()
    with torch.no_grad():
        for value in (x.to(memory_format=torch.channels_last_3d), strided):
            want = tiny_generator(value.contiguous())
            torch.testing.assert_close(tiny_generator(value), want, rtol=1e-5, atol=1e-6)
        want = tiny_generator(x)
        tiny_generator.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(tiny_generator(x), want, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast(tiny_generator):
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        want = tiny_generator.eval()(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = tiny_generator(x)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_attention_formula(tiny_generator):
    """softmax(q k^T C^-0.5) v written out, with the scale of the full width."""
    attention = tiny_generator.encoder_layer1_down[0].blocks[0].attn.eval()
    width, heads, grid = 16, 2, (4, 2, 6)
    x = torch.randn(2, 48, width)
    volume = x.transpose(1, 2).reshape(2, width, *grid).contiguous()
    q, k, v = (
        getattr(attention, f"proj_{n}")(getattr(attention, f"conv_proj_{n}")(volume)).reshape(
            2, -1, heads, width // heads
        )
        for n in "qkv"
    )
    assert q.shape[1] == 48 and k.shape[1] == v.shape[1] == 2 * 1 * 3
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(width**-0.5).softmax(-1)
    want = attention.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
    torch.testing.assert_close(attention(x, grid), want, rtol=1e-4, atol=1e-5)


def test_tokens_and_grid_share_memory(tiny_generator):
    """Going from the normed tokens to the convolutions' grid copies nothing."""
    attention = tiny_generator.encoder_layer2_down[0].blocks[0].attn
    seen = []
    hook = attention.conv_proj_q.conv.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    x = torch.randn(1, 64, 32)
    attention.eval()(x, (4, 4, 4))
    hook.remove()
    assert seen[0].data_ptr() == x.data_ptr()
    assert seen[0].is_contiguous(memory_format=torch.channels_last_3d)


def test_stage_order_of_voxels(tiny_generator):
    """Tokens run in (d, h, w) order: a stage with blocks that do nothing is its embedding."""
    stage_module = tiny_generator.encoder_layer1_down[0].eval()
    assert isinstance(stage_module, TransformerStage)
    with torch.no_grad():
        for block in stage_module.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
        x = torch.randn(2, 8, 8, 6, 10)
        embedded = stage_module.patch_embed.proj(x).movedim(1, -1)
        want = nn.functional.layer_norm(embedded, (16,)).movedim(-1, 1)
        torch.testing.assert_close(stage_module(x), want, rtol=1e-5, atol=1e-6)


def test_train_mode_updates_batch_norm_and_eval_does_not(tiny_generator):
    x = torch.rand(2, 1, 32, 32, 32)
    norm = tiny_generator.encoder_layer0_down[2]
    before = norm.running_mean.clone()
    tiny_generator.eval()(x)
    assert torch.equal(norm.running_mean, before)
    tiny_generator.train()(x)
    assert not torch.equal(norm.running_mean, before)


def test_compiles_as_one_graph(tiny_generator):
    tiny_generator.eval()
    x = torch.rand(1, 1, 16, 32, 16)
    torch._dynamo.reset()
    compiled = torch.compile(tiny_generator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), tiny_generator(x), rtol=1e-5, atol=1e-6)


def test_gradients_of_a_batch_of_one() -> None:
    """With torch's own batch norm, whose backward misreads some strides of a batch of one."""
    torch.manual_seed(0)
    attention = Attention(8, 2, 0.0).double().eval().requires_grad_(False)
    attention.conv_proj_q.bn.running_var.uniform_(0.5, 2)
    tokens = torch.randn(1, 27, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: attention(t, (3, 3, 3)), (tokens,))
