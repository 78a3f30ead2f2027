"""Recipes: the published methods and their encoder/decoder mixes (Mix-PEFT), by name.

    full  ln  bitfit  adapter  lora  lora-linear  vpt  vpt-deep  ssf        one method
    ENCODER+DECODER                                                         21 mixes
    petite                                                                  the published optimum

A mix is two different ones of adapter, lora, ssf and vpt; with "+bitfit" behind it every bias
trains as well. UNETR's decoder is made of convolutions, which have no tokens to put prompts
beside: 12 mixes for CVT-GAN, 9 for UNETR.

Source: PETITE (arXiv 2407.07517, MICCAI 2024); places and sizes are those of its public code where
that runs. CVT-GAN: LoRA on the depthwise convolutions in front of query and key (in a mix: and of
value), adapters behind the MLPs, 0, 8 and 32 channel prompts in stages of width 128, 256 and 512.
UNETR: everything in the encoder goes into the ViT, with LoRA on the query and key rows of the fused
projection and 50 token prompts; the decoder's methods go into its last block, `decoder2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from petite_fast.errors import InputError
from petite_fast.peft.config import (
    AdapterConfig,
    AnyConfig,
    BitFitConfig,
    LayerNormConfig,
    LoraConfig,
    MethodConfig,
    MixConfig,
    PromptConfig,
    SSFConfig,
)

NETWORKS = ("cvtgan", "unetr")
SINGLE = ("full", "ln", "bitfit", "adapter", "lora", "lora-linear", "vpt", "vpt-deep", "ssf")
MIXABLE = ("adapter", "lora", "ssf", "vpt")

_CVTGAN_STAGES = ("encoder_layer1_down.0", "encoder_layer2_down.0", "encoder_layer3_down.0")
_CVTGAN_PROMPTS = (0, 8, 32)
_CVTGAN_UP = {"decoder_layer1_up": 8, "decoder_layer2_up": 0}  # as in the encoder at that width
_VIT_PROMPTS = (50,)


def feasible(network: str) -> list[tuple[str, str]]:
    """The (encoder, decoder) pairs of a network: two different methods, each possible there.

    Raises:
        InputError: unknown network.
    """
    _require_network(network)
    pairs = permutations(MIXABLE, 2)
    return [pair for pair in pairs if network == "cvtgan" or pair[1] != "vpt"]


def recipes(network: str) -> list[str]:
    """Names of all recipes of a network: PETITE, the single methods, the mixes.

    Raises:
        InputError: unknown network.
    """
    single = [name for name in SINGLE if network == "cvtgan" or name != "lora-linear"]
    return ["petite", *single, *("+".join(pair) for pair in feasible(network))]


def recipe(
    network: str, name: str, *, r: int = 8, num_prompts: Sequence[int] | None = None
) -> AnyConfig:
    """The config behind a recipe's name; "full", which freezes nothing, has none.

    Args:
        network: "cvtgan" or "unetr".
        name: one of `recipes`; a mix may have "+bitfit" behind it.
        r: LoRA rank; lora_alpha is twice that, as published.
        num_prompts: of the encoder's stages: three numbers for CVT-GAN, one for UNETR.

    Raises:
        InputError: unknown network or recipe, a mix that is not possible, or a value outside its
            range.
    """
    _require_network(network)
    if name == "petite":
        return petite_recipe(network, r, 2 * r, num_prompts)
    if name in recipes(network) and "+" not in name and name != "full":
        return _single(network, name, r, num_prompts)
    encoder, _, rest = name.partition("+")
    decoder, _, bitfit = rest.partition("+")
    if encoder not in MIXABLE or decoder not in MIXABLE or bitfit not in ("", "bitfit"):
        raise InputError(
            f"recipe is {name!r}, expected one of {', '.join(recipes(network))} ({network})"
        )
    if encoder == decoder:
        raise InputError(
            f"recipe is {name!r}, expected two different methods in a mix "
            f"({encoder!r} alone is the recipe for both halves)"
        )
    if (encoder, decoder) not in feasible(network):
        raise InputError(
            f"recipe is {name!r}, but the decoder of {network} is made of convolutions, which have "
            "no tokens to put prompts beside; expected adapter, lora or ssf there"
        )
    return MixConfig(
        encoder=_half(network, "encoder", encoder, r, num_prompts),
        decoder=_half(network, "decoder", decoder, r, num_prompts),
        bitfit=bool(bitfit),
    )


def petite_recipe(
    network: str,
    r: int = 8,
    lora_alpha: float = 16,
    num_prompts: Sequence[int] | None = None,
    placement: str = "reference",
) -> MixConfig:
    """PETITE: the best of the published encoder and decoder mixes for a network.

    "cvtgan": channel prompts in the three encoder stages, LoRA on the depthwise convolutions in
    front of query, key and value in the decoder, and every bias. The published prompts and LoRA
    shapes are not the identity at the start, or do not run at all; `ChannelPrompt` and `LoRAConv3d`
    say how these differ. On the full-size generator 54,329 parameters train, 0.19 %.

    "unetr": LoRA on the query and key rows of every fused projection of the ViT, SSF behind the
    first two norms of the last decoder block, no biases. The published network has 589,824 more
    parameters that train and are never used.

    Args:
        network: "cvtgan" or "unetr".
        r: LoRA rank.
        lora_alpha: LoRA scale times r.
        num_prompts: channel prompts of CVT-GAN's three encoder stages; default 0, 8, 32.
        placement: of CVT-GAN's LoRA. "reference" is where it was published, on the depthwise
            convolutions. Their kernels are small, 27 C numbers: 6,912 at C = 256, where the
            published LoRA of rank 8 has 18,648, more than it adapts; ours shares A between the
            channels and has r C + 27 r = 2,264. "linear" is on the dense projections proj_q, proj_k
            and proj_v behind them: 2 r C = 4,096 against C^2 = 65,536.

    Raises:
        InputError: unknown network, or a value outside its range.

    Source: PETITE (arXiv 2407.07517, MICCAI 2024).
    """
    _require_network(network)
    if network == "unetr":
        if placement != "reference":
            raise InputError(f"placement is {placement!r}, expected 'reference' for unetr")
        if num_prompts is not None:
            raise InputError("num_prompts is given, but PETITE for unetr has no prompts")
        return MixConfig(
            encoder=_vit_lora(r, lora_alpha),
            decoder=_half("unetr", "decoder", "ssf", r, num_prompts),
        )
    if placement not in ("reference", "linear"):
        raise InputError(f"placement is {placement!r}, expected 'reference' or 'linear'")
    targets = r".*\.attn\.conv_proj_[qkv]\.conv"
    if placement == "linear":
        targets = r".*\.attn\.proj_[qkv]"
    return MixConfig(
        encoder=_cvtgan_prompts(num_prompts),
        decoder=LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets),
        bitfit=True,
    )


def _single(network: str, name: str, r: int, num_prompts: Sequence[int] | None) -> AnyConfig:
    """One method in the whole network, as published."""
    if name == "ln":
        return LayerNormConfig()
    if name == "bitfit":
        return BitFitConfig()
    if name == "ssf":
        return SSFConfig()
    if network == "unetr" and name == "adapter":
        return AdapterConfig(target_modules=r"vit\.blocks\.\d+\.mlp")
    if name == "adapter":
        return AdapterConfig()
    if name == "lora-linear":
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=r".*\.attn\.proj_[qkv]")
    if name == "lora":
        if network == "unetr":
            return _vit_lora(r, 2 * r)
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=r".*\.attn\.conv_proj_[qk]\.conv")
    prompts = _vit_prompts if network == "unetr" else _cvtgan_prompts
    return prompts(num_prompts, deep=name == "vpt-deep")


def _half(
    network: str, side: str, method: str, r: int, num_prompts: Sequence[int] | None
) -> MethodConfig:
    """One method in one half."""
    if network == "cvtgan":
        if method == "lora":
            return LoraConfig(
                r=r, lora_alpha=2 * r, target_modules=r".*\.attn\.conv_proj_[qkv]\.conv"
            )
        if method == "vpt":
            return _cvtgan_prompts(num_prompts) if side == "encoder" else PromptConfig(_CVTGAN_UP)
        return AdapterConfig() if method == "adapter" else SSFConfig()
    if side == "encoder":
        if method == "lora":
            return _vit_lora(r, 2 * r)
        if method == "vpt":
            return _vit_prompts(num_prompts)
        if method == "adapter":
            return AdapterConfig(target_modules=r"vit\.blocks\.\d+\.mlp")
        return SSFConfig()
    if method == "lora":
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=r"decoder2\..*\.conv")
    if method == "adapter":
        return AdapterConfig(target_modules=r"decoder2\.conv_block")
    return SSFConfig(target_modules=r"decoder2\.conv_block\.norm[12]")


def _vit_lora(r: int, lora_alpha: float) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=lora_alpha, target_modules=r"vit\.blocks\.\d+\.attn\.qkv", qkv_parts="qk"
    )


def _vit_prompts(num_prompts: Sequence[int] | None, deep: bool = False) -> PromptConfig:
    (count,) = _counts(num_prompts, _VIT_PROMPTS, "the number of token prompts")
    return PromptConfig({"vit": count}, deep=deep)


def _cvtgan_prompts(num_prompts: Sequence[int] | None, deep: bool = False) -> PromptConfig:
    counts = _counts(num_prompts, _CVTGAN_PROMPTS, "one number per encoder stage")
    return PromptConfig(dict(zip(_CVTGAN_STAGES, counts, strict=True)), deep=deep)


def _counts(given: Sequence[int] | None, default: Sequence[int], what: str) -> Sequence[int]:
    counts = default if given is None else given
    if len(counts) != len(default):
        raise InputError(f"num_prompts is {tuple(counts)}, expected {len(default)}: {what}")
    return counts


def _require_network(network: str) -> None:
    if network not in NETWORKS:
        raise InputError(f"no recipes for {network!r}, expected one of {', '.join(NETWORKS)}")
