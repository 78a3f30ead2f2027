"""Published combinations: which method goes into the encoder, which into the decoder."""

from __future__ import annotations

from collections.abc import Sequence

from petite_fast.errors import InputError
from petite_fast.peft.config import LoraConfig, MixConfig, PromptConfig

RECIPES = ("cvtgan",)
"""Networks with a published optimum."""

_CVTGAN_STAGES = ("encoder_layer1_down.0", "encoder_layer2_down.0", "encoder_layer3_down.0")


def petite_recipe(
    network: str,
    r: int = 8,
    lora_alpha: float = 16,
    num_prompts: Sequence[int] = (0, 8, 32),
) -> MixConfig:
    """PETITE: the best of the published encoder and decoder mixes for a network.

    "cvtgan": channel prompts in the three encoder stages, LoRA on the depthwise convolutions in
    front of query, key and value in the decoder, and every bias. The published prompts and LoRA
    shapes are not the identity at the start, or do not run at all; `ChannelPrompt` and `LoRAConv3d`
    say how these differ. On the full-size generator 54,329 parameters train, 0.19 %.

    Args:
        network: "cvtgan".
        r: LoRA rank.
        lora_alpha: LoRA scale times r.
        num_prompts: channel prompts of the three encoder stages.

    Raises:
        InputError: unknown network, or a value outside its range.

    Source: PETITE (arXiv 2407.07517, MICCAI 2024).
    """
    if network not in RECIPES:
        raise InputError(f"no PETITE recipe for {network!r}, expected one of {sorted(RECIPES)}")
    if len(num_prompts) != len(_CVTGAN_STAGES):
        raise InputError(
            f"num_prompts is {tuple(num_prompts)}, expected {len(_CVTGAN_STAGES)} numbers, "
            "one per encoder stage"
        )
    return MixConfig(
        encoder=PromptConfig(dict(zip(_CVTGAN_STAGES, num_prompts, strict=True))),
        decoder=LoraConfig(
            r=r, lora_alpha=lora_alpha, target_modules=r".*\.attn\.conv_proj_[qkv]\.conv"
        ),
        bitfit=True,
    )
