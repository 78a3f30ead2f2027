"""Token prompts: the base at first, learning in two steps, both forms against their formulas."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("monai")

from monai.networks import nets

from petite_fast.models import UNETR
from petite_fast.nn.token_prompt import TokenPrompt, convert_, make_prompt_for, release_

WIDTH, HEADS, DEPTH = 24, 2, 12
SIZES = {"hidden_size": WIDTH, "mlp_dim": 48, "num_heads": HEADS, "feature_size": 4}
FORMS = [(deep, gated) for deep in (False, True) for gated in (False, True)]


@pytest.fixture(params=["ours", "monai"])
def net(request) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "ours":
        return UNETR((32, 32, 16), **SIZES).eval()
    return nets.UNETR(1, 1, (32, 32, 16), proj_type="perceptron", **SIZES).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 1, 32, 32, 16)


def prompted(net: nn.Module, t: int = 3, **form: bool) -> TokenPrompt:
    prompt = make_prompt_for(net.vit, t, **form)
    convert_(net.vit, prompt)
    return prompt


def randomise(prompt: TokenPrompt) -> None:
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.normal_()


def reference_attention(block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T s) v over heads, from [B, N, C]; written out."""
    q, k, v = (z.unflatten(2, (HEADS, -1)).transpose(1, 2) for z in (q, k, v))
    weights = (q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)  # [B, N, heads, C / heads]


def reference(vit: nn.Module, prompt: TokenPrompt, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The formulas of TokenPrompt's docstring, for both forms."""
    tokens, hidden, t = vit.patch_embedding(x), [], prompt.num_prompts
    p = prompt.embedding[:1].expand(len(x), -1, -1)
    for i, block in enumerate(vit.blocks):
        if prompt.deep:
            p = prompt.embedding[i : i + 1].expand(len(x), -1, -1)
        weight = block.attn.qkv.weight
        qh, kh, vh = (block.norm1(tokens) @ weight.T).chunk(3, -1)
        qp, kp, vp = (block.norm1(p) @ weight.T).chunk(3, -1)
        k, v = torch.cat([kp, kh], 1), torch.cat([vp, vh], 1)
        if prompt.gated:
            gate = prompt.gate[i].tanh()[:, None]
            y = reference_attention(block, qh, kh, vh)
            y = y + gate * reference_attention(block, qh, kp, vp)
        else:
            y = reference_attention(block, qh, k, v)
        yp = reference_attention(block, qp, k, v)
        both = torch.cat([p, tokens], 1)
        both = both + block.attn.out_proj(torch.cat([yp, y], 1).flatten(2))
        both = both + block.mlp(block.norm2(both))
        p, tokens = both[:, :t], both[:, t:]
        hidden.append(tokens)
    return vit.norm(tokens), hidden


@pytest.mark.parametrize(("deep", "gated"), FORMS)
def test_formula_in_float64(net, x, deep, gated):
    net.double()
    x = x.double()
    prompt = prompted(net, deep=deep, gated=gated)
    randomise(prompt)
    tokens, hidden = net.vit(x)
    want, want_hidden = reference(net.vit, prompt, x)
    assert len(hidden) == DEPTH and tokens.shape == (2, 4, WIDTH)
    for a, b in zip([tokens, *hidden], [want, *want_hidden], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    loss, want = ((z * torch.linspace(0, 1, WIDTH)).sum() for z in (tokens, want))
    got = torch.autograd.grad(loss, list(prompt.parameters()))
    wanted = torch.autograd.grad(want, list(prompt.parameters()))
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gated_prompts_start_as_the_base_bit_for_bit(net, x, deep, training):
    net.train(training)
    with torch.no_grad():
        want = net(x)
        want_hidden = net.vit(x)[1]
        prompted(net, deep=deep)
        assert torch.equal(net(x), want)
        for a, b in zip(net.vit(x)[1], want_hidden, strict=True):
            assert torch.equal(a, b)


def test_the_published_form_is_another_function(net, x):
    with torch.no_grad():
        want = net(x)
        prompted(net, gated=False)
        assert not torch.allclose(net(x), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("deep", [False, True])
def test_every_number_learns_within_two_steps(net, x, deep):
    net.requires_grad_(False)
    prompt = prompted(net, deep=deep)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=0.0)
    start = {name: p.detach().clone() for name, p in prompt.named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        net(x).sub(0.5).pow(2).mean().backward()
        assert (prompt.gate.grad != 0).all()
        assert (prompt.embedding.grad != 0).all() == bool(step)
        assert bool(prompt.embedding.grad.any()) == bool(step)
        optimizer.step()
    for name, parameter in prompt.named_parameters():
        assert (parameter != start[name]).all(), name


def test_the_published_form_learns_at_once(net, x):
    net.requires_grad_(False)
    prompt = prompted(net, deep=True, gated=False)
    net(x).sub(0.5).pow(2).mean().backward()
    assert (prompt.embedding.grad != 0).all()


def test_counts_names_and_start_are_the_published_ones():
    with torch.device("meta"):
        vit = UNETR().vit
        counts = {
            form: sum(
                p.numel()
                for p in make_prompt_for(vit, 50, deep=form[0], gated=form[1]).parameters()
            )
            for form in FORMS
        }
    assert counts == {
        (False, False): 38_400,
        (False, True): 38_400 + 144,
        (True, False): 460_800,
        (True, True): 460_800 + 144,
    }
    prompt = make_prompt_for(UNETR(32, **SIZES).vit, 50, deep=True)
    bound = (6 / (3 * 16**3 + WIDTH)) ** 0.5
    assert 0.99 * bound < prompt.embedding.abs().max() <= bound
    assert prompt.embedding.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert prompt.embedding.shape == (DEPTH, 50, WIDTH)
    assert prompt.gate.shape == (DEPTH, HEADS) and not prompt.gate.any()


def test_state_dict_and_release(net, x):
    before, vit_class = net.state_dict(), type(net.vit)
    with torch.no_grad():
        want = net(x)
        prompt = prompted(net)
        randomise(prompt)
        assert isinstance(net.vit, nets.ViT)
        assert set(net.state_dict()) - set(before) == {"vit.prompt.embedding", "vit.prompt.gate"}
        assert not torch.equal(net(x), want)
        assert release_(net.vit) is prompt
        assert type(net.vit) is vit_class and not hasattr(net.vit, "prompt")
        assert list(net.state_dict()) == list(before)
        assert torch.equal(net(x), want)
    with pytest.raises(ValueError, match="has no token prompts"):
        release_(net.vit)
    convert_(net.vit, prompt)
    with pytest.raises(ValueError, match="has token prompts already"):
        convert_(net.vit, prompt)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_are_independent(net, x, how):
    prompt = prompted(net, gated=False)
    if how == "copy":
        other = copy.deepcopy(net)
    else:
        other = pickle.load(io.BytesIO(pickle.dumps(net)))
    assert type(other.vit) is type(net.vit)
    with torch.no_grad():
        want = net(x)
        assert torch.equal(other(x), want)
        prompt.embedding.add_(1)
        assert torch.equal(other(x), want) and not torch.equal(net(x), want)


@pytest.mark.parametrize(("deep", "gated"), FORMS)
def test_compiles_as_one_graph(x, deep, gated):
    torch.manual_seed(0)
    vit = nets.ViT(1, (32, 32, 16), 16, WIDTH, 48, 2, HEADS, proj_type="perceptron")
    prompt = make_prompt_for(vit, 3, deep=deep, gated=gated)
    convert_(vit, prompt)
    randomise(prompt)
    torch._dynamo.reset()
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    (got, _), (want, _) = compiled(x), vit(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.pow(3).sum(), prompt.embedding)[0] for y in (got, want)]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("deep", "gated"), FORMS)
def test_autocast_and_low_precision(net, x, deep, gated):
    randomise(prompted(net, deep=deep, gated=gated))
    with torch.no_grad():
        want = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = net(x)
        assert (got - want).abs().max() < 0.1 * want.abs().max()
        half = copy.deepcopy(net).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert (half - want).abs().max() < 0.2 * want.abs().max()


def test_any_grid(x):
    torch.manual_seed(0)
    net = UNETR((32, 32, 16), **SIZES).eval()
    prompt = prompted(net, gated=False)
    for sides in ((16, 16, 48), (32, 48, 32)):
        with torch.no_grad():
            assert net(torch.rand(1, 1, *sides)).shape == (1, 1, *sides)
    assert prompt.embedding.shape == (1, 3, WIDTH)


@pytest.mark.parametrize("gated", [False, True])
def test_the_layers_are_called(net, x, gated):
    """A hook stands in for an adapted layer: each Linear and norm of a block is really called."""
    prompted(net, gated=gated)
    seen = set()
    for name, module in net.vit.blocks[3].named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Dropout)):
            module.register_forward_hook(lambda m, a, out, name=name: seen.add(name))
    net(x)
    wanted = {"norm1", "norm2", "attn.qkv", "attn.out_proj", "attn.drop_output"}
    assert wanted | {"mlp.linear1", "mlp.linear2"} <= seen


def test_dropout_acts_in_training_only(x):
    torch.manual_seed(0)
    net = UNETR((32, 32, 16), dropout_rate=0.3, **SIZES)
    randomise(prompted(net))
    with torch.no_grad():
        assert not torch.equal(net.train().vit(x)[0], net.vit(x)[0])
        assert torch.equal(net.eval().vit(x)[0], net.vit(x)[0])


def test_what_cannot_be_prompted():
    vit = nets.ViT(1, (32, 32, 16), 16, WIDTH, 48, 2, HEADS, classification=True)
    with pytest.raises(ValueError, match="with a class token"):
        make_prompt_for(vit, 3)
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        TokenPrompt(0, WIDTH, 2, HEADS)
