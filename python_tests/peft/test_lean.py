"""Memory of whole networks: what is kept, to the byte, and that it changes no gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft_cases import CASES, build, inputs, run, scramble
from torch import nn

from petite_fast import BitFitConfig, LoraConfig, SSFConfig, get_peft_model
from petite_fast.nn.twin import Twin
from petite_fast.ops import saved_bytes

pytest.importorskip("monai")
pytest.importorskip("dynamic_network_architectures")

CHANNELS, SIZE, BATCH, RANK = 16, 8, 2, 4
UNIT = 4 * BATCH * CHANNELS * SIZE**3
RSTD = 4 * BATCH * CHANNELS  # one number per sample and channel
MASK = UNIT // 32
DROPOUT = 4 * 4 * CHANNELS * RANK + 3 * 8  # scaled B; seeds, but for the network's input


def block(norm: nn.Module, activation: nn.Module | None = None) -> list[nn.Module]:
    activation = activation or nn.LeakyReLU(0.01, inplace=True)
    return [nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm, activation]


def chain(make_norm, make_activation=lambda: None, blocks: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for _ in range(blocks) for m in block(make_norm(), make_activation())]
    return nn.Sequential(*layers).eval()


def instance() -> nn.Module:
    return nn.InstanceNorm3d(CHANNELS)


def fixed() -> nn.Module:
    norm = nn.BatchNorm3d(CHANNELS)
    norm.running_var.uniform_(0.5, 1.5)
    return norm


def kept(net: nn.Module, config, x: torch.Tensor, memory="exact") -> int:
    model = get_peft_model(net, config, memory=memory).train()
    return saved_bytes(lambda: model(x).square().mean())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, CHANNELS, SIZE, SIZE, SIZE)


LORA, LORA_FA = LoraConfig(r=RANK), LoraConfig(r=RANK, train_a=False)


def test_plain_pytorch_keeps_nine_units(x) -> None:
    net = chain(instance).train()
    bytes_ = saved_bytes(lambda: net(x).square().mean())
    assert 9 * UNIT <= bytes_ < 9.2 * UNIT


def test_lora_keeps_five(x) -> None:
    # the input of each convolution, and the last output: norm and activation are read off it
    assert kept(chain(instance), LORA, x) == 5 * UNIT + 4 * RSTD


def test_lora_dropout_keeps_as_little(x) -> None:
    config = LoraConfig(r=RANK, lora_dropout=0.1)
    assert kept(chain(instance), config, x) == 5 * UNIT + 4 * RSTD + DROPOUT


def test_lora_fa_with_fixed_statistics_keeps_a_bit_and_r_channels(x) -> None:
    variance = 4 * CHANNELS  # the running one, which is there anyway
    blocks = 4 * (UNIT * RANK // CHANNELS + MASK + variance)
    assert kept(chain(fixed), LORA_FA, x) == blocks + UNIT  # the loss keeps the output


def test_lora_fa_in_8_bits_keeps_less_than_two(x) -> None:
    bytes_ = kept(chain(instance), LORA_FA, x, "int8") - UNIT  # the loss keeps the output
    assert bytes_ < 2 * UNIT


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_lora_in_8_bits_keeps_one_code_and_one_sign_a_value(lora_dropout, x) -> None:
    """The codes of the normalised value; the convolution behind makes its input from them."""
    codes = UNIT // 4 + UNIT // 256  # and a scale for 256 of them
    config = LoraConfig(r=RANK, lora_dropout=lora_dropout)
    small = 4 * RSTD + (DROPOUT if lora_dropout else 0)
    bytes_ = kept(chain(instance), config, x, "int8") - UNIT  # the loss keeps the output
    assert bytes_ == 5 * codes + 4 * MASK + small


def test_gradients_in_8_bits_are_close_and_unbiased(x) -> None:
    """Reading xhat off the rounded output would divide the rounding by the slope: 30 %."""
    exact = scramble(get_peft_model(chain(instance), LORA))
    rounded = get_peft_model(chain(instance), LORA, memory="int8")
    rounded.load_state_dict(exact.state_dict())
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def gradient(net) -> torch.Tensor:
        trained = [p for p in net.parameters() if p.requires_grad]
        grads = torch.autograd.grad((net(x) - target).square().mean(), trained)
        return torch.cat([g.flatten() for g in grads])

    wanted = gradient(exact)
    errors = torch.stack([gradient(rounded) - wanted for _ in range(16)]) / wanted.norm()
    one, mean = errors.norm(dim=1).mean().item(), errors.mean(0).norm().item()
    assert one < 0.03
    assert mean < 1.6 * one / 16**0.5


def test_bitfit_keeps_what_the_norms_need(x) -> None:
    net = chain(instance)
    for layer in net:
        if isinstance(layer, nn.Conv3d):
            layer.bias = nn.Parameter(torch.zeros(CHANNELS))
    assert kept(net, BitFitConfig(), x) == 4 * UNIT + 4 * RSTD


def test_frozen_prefix_has_no_graph(x) -> None:
    config = LoraConfig(r=RANK, target_modules=["9"])  # the last of four convolutions
    assert kept(chain(instance), config, x) == 2 * UNIT + RSTD


@pytest.mark.parametrize(
    ("act", "signs"), [(nn.ReLU, MASK), (lambda: nn.LeakyReLU(0.0), MASK), (nn.GELU, 0)]
)
def test_what_cannot_be_inverted(act, signs, x) -> None:
    """The normalised value and the signs beside the output: one more unit a block."""
    assert kept(chain(instance, act), LORA, x) == 9 * UNIT + 4 * (RSTD + signs)


GRADIENTS = ["unetr-petite", "unetr-ssf", "cvtgan-petite", "dynunet-mix", "unet-lora",
             "plain-conv-unet-mix", "plain-conv-unet-adapter"]  # fmt: skip


def loss_gradients(net, x):
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad((net(x) - x).square().mean(), [x, *trained])


@pytest.mark.parametrize("memory", ["exact", "checkpoint"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_torchs_layers(name, memory) -> None:
    network, config = CASES[name]
    lean = scramble(get_peft_model(build(network), config, memory=memory))
    plain = copy.deepcopy(lean)
    for module in plain.modules():  # the adapters stay, every norm and block is torch's again
        while isinstance(module, Twin) and type(module).__name__[:4] in ("Lean", "Reco", "Chec"):
            module.leave_()
        if type(module).__module__ == "petite_fast.nn.lean":
            module.__class__ = module.torch_class
    x = inputs(network).requires_grad_()
    for ours, theirs in zip(loss_gradients(lean, x), loss_gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("memory", ["exact", "int8", "checkpoint"])
def test_everything_is_undone(memory) -> None:
    base = build("dynunet")
    model = get_peft_model(copy.deepcopy(base), LORA, memory=memory)
    plain = model.merge_and_unload()
    for (name, a), (_, b) in zip(base.named_modules(), plain.named_modules(), strict=True):
        assert type(a) is type(b), name


@pytest.mark.parametrize("memory", ["exact", "int8", "checkpoint"])
def test_pickle_and_copy(memory) -> None:
    model = scramble(get_peft_model(build("unet"), LORA, memory=memory))
    x = inputs("unet")
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model) and torch.equal(run(twin, x), run(model, x))


def test_a_written_output_is_an_error_not_a_wrong_gradient(x) -> None:
    model = get_peft_model(chain(instance, blocks=1), LORA)
    y = model(x)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="memory: got 'tiny', wanted one of"):
        get_peft_model(chain(instance), LORA, memory="tiny")


def test_ssf_on_norms_without_weights_is_one_op_too(x) -> None:
    assert kept(chain(instance), SSFConfig(), x) <= 4 * UNIT + 4 * (RSTD + 8 * CHANNELS)
