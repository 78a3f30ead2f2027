"""Channel prompts: the identity at first, every element learns at once, any grid, few numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from petite_fast.models import CVTGANDiscriminator, CVTGANGenerator
from petite_fast.nn.prompt import ChannelPrompt

TINY = (8, 16, 32, 64)


def prompted(generator: CVTGANGenerator, counts: dict[int, int]) -> list[ChannelPrompt]:
    prompts = []
    for i, t in counts.items():
        stage = getattr(generator, f"encoder_layer{i}_down")[0]
        stage.prompt = stage.make_prompt(t)
        prompts.append(stage.prompt)
    return prompts


@pytest.fixture
def generator() -> CVTGANGenerator:
    torch.manual_seed(0)
    return CVTGANGenerator(widths=TINY)


def test_counts_are_the_published_ones():
    generator = CVTGANGenerator(widths=(8, 16, 256, 512))
    two, three = prompted(generator, {2: 8, 3: 32})
    assert two.embedding.shape == (1, 8, 8, 8, 8) and two.embedding.numel() == 4096
    assert three.embedding.shape == (1, 32, 4, 4, 4) and three.embedding.numel() == 2048
    for prompt in (two, three):
        assert [name for name, _ in prompt.named_parameters()] == ["embedding"]
        assert not prompt.embedding.any()


def test_grids_are_those_of_a_64_voxel_patch(generator):
    stages = {
        name: module
        for network in (generator, CVTGANDiscriminator())
        for name, module in network.named_modules()
        if hasattr(module, "make_prompt")
    }
    assert {name: stage.make_prompt(1).embedding.shape[-1] for name, stage in stages.items()} == {
        "encoder_layer1_down.0": 16,
        "encoder_layer2_down.0": 8,
        "encoder_layer3_down.0": 4,
        "decoder_layer1_up": 8,
        "decoder_layer2_up": 16,
        "conv3": 8,
        "conv4": 4,
    }
    grids = {}
    for name, stage in stages.items():
        stage.patch_embed.register_forward_hook(
            lambda module, args, out, name=name: grids.update({name: out[1]})
        )
    with torch.no_grad():
        generator.eval()(torch.zeros(1, 1, 64, 64, 64))
    for name, grid in grids.items():
        assert grid == (stages[name].prompt_side,) * 3, name


def test_without_prompts_the_state_dict_is_that_of_the_base(generator):
    before = list(generator.state_dict())
    assert not any("prompt" in name for name in before)
    stage = generator.encoder_layer2_down[0]
    stage.prompt = stage.make_prompt(4)
    added = set(generator.state_dict()) - set(before)
    names = ("embedding", "cross_q", "cross_k", "cross_v", "cross_mlp")
    assert added == {f"encoder_layer2_down.0.prompt.{name}" for name in names}
    stage.prompt = None
    assert list(generator.state_dict()) == before


@pytest.mark.parametrize("sides", [(64, 64, 64), (64, 64, 32), (32, 48, 80)])
@pytest.mark.parametrize("training", [False, True])
def test_identity_at_the_start(generator, sides, training):
    adapted = copy.deepcopy(generator)
    prompted(adapted, {1: 3, 2: 8, 3: 32})
    for stage in (adapted.decoder_layer1_up, adapted.decoder_layer2_up):
        stage.prompt = stage.make_prompt(2)
    x = torch.rand(2 if training else 1, 1, *sides)
    outputs = []
    for network in (generator, adapted):
        torch.manual_seed(1)  # dropout
        with torch.no_grad():
            outputs.append(network.train(training)(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "sides",
    [(64, 64, 64), (64, 64, 32), (96, 80, 112), (32, 32, 32), (16, 32, 48)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_every_element_learns_at_the_first_step(generator, sides):
    generator.eval().requires_grad_(False)
    prompts = prompted(generator, {1: 2, 2: 8, 3: 16})
    x = torch.rand(1, 1, *sides)
    y = generator(x)
    (y - torch.rand_like(y)).pow(2).mean().backward()
    for prompt in prompts:
        assert (prompt.embedding.grad != 0).all()
        before = prompt.embedding.detach().clone()
        torch.optim.AdamW([prompt.embedding], lr=1e-3).step()
        assert (prompt.embedding != before).all()
    assert all(p.grad is None for n, p in generator.named_parameters() if "embedding" not in n)
    with torch.no_grad():
        assert not torch.equal(generator(x), y)


@pytest.mark.parametrize("term", ["query", "key", "value", "hidden"])
def test_every_way_in_is_open(generator, term):
    """Each of the four terms moves the output, by itself."""
    generator.eval()
    (prompt,) = prompted(generator, {2: 4})
    x = torch.rand(1, 1, 48, 32, 48)
    with torch.no_grad():
        want = generator(x)
        prompt.embedding.normal_()
        buffers = {"query": "cross_q", "key": "cross_k", "value": "cross_v", "hidden": "cross_mlp"}
        for name in buffers.values():
            if name != buffers[term]:
                getattr(prompt, name).zero_()
        assert not torch.equal(generator(x), want)


def test_terms_are_the_formula(generator):
    """The block with its terms is the block with the cross products added by hand."""
    stage = generator.encoder_layer2_down[0].eval()
    prompt = stage.make_prompt(5, seed=3)
    grid, keys = (8, 8, 8), (4, 4, 4)
    with torch.no_grad():
        prompt.embedding.normal_()
    tokens = prompt.embedding[0].reshape(5, -1).T
    pooled = prompt.embedding[0].reshape(5, 4, 2, 4, 2, 4, 2).mean((2, 4, 6)).reshape(5, -1).T
    terms = prompt(grid, keys)
    assert len(terms) == len(stage.blocks) == 2
    for j, got in enumerate(terms):
        want = (
            tokens @ prompt.cross_q[j].T,
            pooled @ prompt.cross_k[j].T,
            pooled @ prompt.cross_v[j].T,
            tokens @ prompt.cross_mlp[j].T,
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b[None])
    block, x = stage.blocks[1], torch.randn(2, 512, 32)
    hooks = [
        block.attn.proj_q.register_forward_hook(lambda m, i, o: o + terms[1].query),
        block.attn.proj_k.register_forward_hook(lambda m, i, o: o + terms[1].key),
        block.attn.proj_v.register_forward_hook(lambda m, i, o: o + terms[1].value),
        block.mlp.fc1.register_forward_hook(lambda m, i, o: o + terms[1].hidden),
    ]
    want = block(x, grid)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(block(x, grid, terms[1]), want)
    assert not torch.allclose(block(x, grid), want)


def test_grid_of_the_embedding_is_left_alone():
    prompt = ChannelPrompt(3, 16, 1, (8, 8, 8))
    assert prompt.at((8, 8, 8)) is prompt.embedding


def test_finer_grids_are_interpolated_and_coarser_ones_averaged():
    prompt = ChannelPrompt(1, 16, 1, (4, 4, 4))
    ramp = (torch.arange(4.0) + 0.5)[:, None, None].expand(4, 4, 4)
    with torch.no_grad():
        prompt.embedding.copy_(ramp)
        fine, coarse, mixed = (prompt.at(g) for g in ((8, 4, 5), (2, 1, 4), (1, 8, 4)))
    assert fine.shape == (1, 1, 8, 4, 5)
    want = ((torch.arange(8.0) + 0.5) / 2).clamp(0.5, 3.5)  # linear inside, held at the border
    torch.testing.assert_close(fine[0, 0, :, 0, 0], want)
    torch.testing.assert_close(coarse[0, 0, :, 0, 0], torch.tensor([1.0, 3.0]))
    assert mixed.shape == (1, 1, 1, 8, 4) and (mixed == 2).all()


def test_cross_terms_are_fixed_by_the_seed_alone():
    torch.manual_seed(0)
    first = ChannelPrompt(8, 32, 2, (4, 4, 4), seed=5)
    state = torch.random.get_rng_state()
    second = ChannelPrompt(8, 32, 2, (4, 4, 4), seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    other = ChannelPrompt(8, 32, 2, (4, 4, 4), seed=6)
    for name, value in first.named_buffers():
        assert torch.equal(value, second.get_buffer(name))
        assert not torch.equal(value, other.get_buffer(name))
        assert not torch.equal(value[0], value[1])  # each block has its own


def test_cross_terms_have_the_bounds_of_the_widened_matrices():
    t, c = 8, 256
    prompt = ChannelPrompt(t, c, 2, (8, 8, 8))
    bounds = {
        "cross_q": (6 / (2 * (c + t))) ** 0.5,
        "cross_k": (6 / (2 * (c + t))) ** 0.5,
        "cross_v": (6 / (2 * (c + t))) ** 0.5,
        "cross_mlp": (6 / (5 * (c + t))) ** 0.5,
    }
    assert {name for name, _ in prompt.named_buffers()} == set(bounds)
    for name, bound in bounds.items():
        cross = prompt.get_buffer(name)
        assert cross.shape == (2, 4 * c if name == "cross_mlp" else c, t)
        assert 0.99 * bound < cross.abs().max() <= bound
        assert cross.mean().abs() < 0.05 * bound


def test_state_dict_round_trip(generator):
    (prompt,) = prompted(generator, {3: 4})
    with torch.no_grad():
        prompt.embedding.normal_()
    other = ChannelPrompt(4, 64, 2, (4, 4, 4), seed=9)
    other.load_state_dict(prompt.state_dict())
    for a, b in zip(prompt((3, 4, 5), (2, 2, 3)), other((3, 4, 5), (2, 2, 3)), strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_prompt_follows_the_dtype_of_the_stage(generator):
    stage = generator.double().encoder_layer2_down[0]
    prompt = stage.make_prompt(2)
    assert all(value.dtype == torch.float64 for value in prompt.state_dict().values())


def test_prompts_keep_nothing_per_sample(generator):
    """The terms are broadcast: kept bytes do not grow with the batch because of them."""
    stage = generator.encoder_layer2_down[0].eval().requires_grad_(False)

    def kept(batch: int, prompt: ChannelPrompt) -> int:
        storages = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            terms = prompt((8, 8, 8), (4, 4, 4))
            q = torch.zeros(batch, 512, 32) + terms[0].query
        assert q.requires_grad
        return sum(storages.values())

    prompt = stage.make_prompt(4)
    assert kept(1, prompt) == kept(16, prompt)


def test_compiles_with_the_network_as_one_graph(generator):
    generator.eval()
    prompts = prompted(generator, {2: 4, 3: 8})
    with torch.no_grad():
        for prompt in prompts:
            prompt.embedding.normal_()
    torch._dynamo.reset()
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 1, 16, 32, 48)
    torch.testing.assert_close(compiled(x), generator(x), rtol=1e-5, atol=1e-6)


# --- deep prompts: one volume per block -----------------------------------------------------------


def test_deep_prompts_have_a_row_per_block(generator):
    stage = generator.encoder_layer2_down[0]
    shallow, deep = stage.make_prompt(4), stage.make_prompt(4, deep=True)
    assert shallow.embedding.shape == (1, 4, 8, 8, 8)
    assert deep.embedding.shape == (2, 4, 8, 8, 8) and not deep.embedding.any()
    assert "deep" not in repr(shallow) and "deep=True" in repr(deep)
    assert list(deep.state_dict()) == list(shallow.state_dict())
    for name, value in deep.named_buffers():
        assert torch.equal(value, shallow.get_buffer(name))  # of the same seed


@pytest.mark.parametrize("grid", [(8, 8, 8), (5, 9, 12)])
def test_block_j_reads_row_j(grid):
    deep = ChannelPrompt(3, 16, 3, (8, 8, 8), deep=True)
    shallow = ChannelPrompt(3, 16, 3, (8, 8, 8))
    with torch.no_grad():
        deep.embedding.normal_()
    assert deep.at((8, 8, 8)) is deep.embedding
    for j, terms in enumerate(deep(grid, (4, 4, 4))):
        with torch.no_grad():
            shallow.embedding.copy_(deep.embedding[j : j + 1])
        for got, want in zip(terms, shallow(grid, (4, 4, 4))[j], strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)
        (row,) = torch.autograd.grad(
            sum(term.sum() for term in terms), deep.embedding, retain_graph=True
        )
        assert [bool(r.any()) for r in row] == [i == j for i in range(3)]


def test_deep_prompts_start_as_the_base_and_every_row_learns(generator):
    generator.eval().requires_grad_(False)
    x = torch.rand(1, 1, 32, 48, 80)
    with torch.no_grad():
        want = generator(x)
    stages = [generator.encoder_layer2_down[0], generator.encoder_layer3_down[0]]
    for stage in stages:
        stage.prompt = stage.make_prompt(4, deep=True)
    y = generator(x)
    assert torch.equal(y, want)
    (y - torch.rand_like(y)).pow(2).mean().backward()
    assert all((stage.prompt.embedding.grad != 0).all() for stage in stages)
    copied = copy.deepcopy(generator)
    assert torch.equal(copied(x), y)


def test_deep_prompts_compile_as_one_graph():
    prompt = ChannelPrompt(3, 16, 2, (4, 4, 4), deep=True)
    with torch.no_grad():
        prompt.embedding.normal_()
    torch._dynamo.reset()
    compiled = torch.compile(prompt, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled((6, 4, 3), (3, 2, 2)), prompt((6, 4, 3), (3, 2, 2)), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_at_least_one_prompt():
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        ChannelPrompt(0, 16, 1, (4, 4, 4))
