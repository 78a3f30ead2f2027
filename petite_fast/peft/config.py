"""What to adapt, and how: small records that go to JSON and come back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from petite_fast.errors import InputError

Targets = str | list[str] | None
"""Which modules: a regular expression for the whole dotted name, a list of names or name endings
(on a dot), or None for every module that the method can adapt."""


@dataclass
class PeftConfig:
    """What all configs share: `peft_type`, to_dict and from_dict."""

    peft_type: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict: `peft_type` and the fields."""
        return {"peft_type": self.peft_type, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> AnyConfig:
        """The config that `to_dict` was called on.

        Raises:
            InputError: unknown `peft_type`, an unknown field, or a value that the config refuses.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", None)
        cls = _TYPES.get(peft_type) if isinstance(peft_type, str) else None
        if cls is None:
            raise InputError(f"peft_type is {peft_type!r}, expected one of {sorted(_TYPES)}")
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"a {peft_type} config has the fields {sorted(known)}, got also {unknown}"
            )
        return cls(**values)


@dataclass
class LoraConfig(PeftConfig):
    """Low-rank adapters: W_eff = W + (lora_alpha / r) B.A.

    Args:
        r: rank.
        lora_alpha: numerator of the scale.
        target_modules: Conv3d, ConvTranspose3d and Linear modules. A string must match the whole
            dotted name (`re.fullmatch`); a list holds names or their endings ("conv1" also finds
            "encoder.conv1"). None is every one of them, inside the encoder or the decoder when the
            config is half of a MixConfig.
        lora_dropout: dropout rate on the branch's input, in [0, 1).
        use_rslora: scale lora_alpha / sqrt(r) instead (Kalajdzievski 2023).
        train_a: False is LoRA-FA: A keeps its random start.
        qkv_parts: for a Linear called "qkv", which makes query, key and value at once: the parts
            that are adapted, each with an A of its own. "qkv" adapts it as any other Linear.
        rank_pattern, alpha_pattern: r and lora_alpha of single modules, {pattern: number}; a
            pattern matches a dotted name or an ending of it, as in Hugging Face PEFT.

    Raises:
        InputError: a value outside these ranges.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 16
    target_modules: Targets = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    train_a: bool = True
    qkv_parts: str = "qkv"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"r": self.r, **_mapping("LoraConfig", "rank_pattern", self)}.items():
            if not _is_int(value) or value < 1:
                raise InputError(f"LoraConfig: {name} is {value!r}, expected a positive integer")
        alphas = {"lora_alpha": self.lora_alpha, **_mapping("LoraConfig", "alpha_pattern", self)}
        for name, alpha in alphas.items():
            if not _is_number(alpha) or alpha <= 0:
                raise InputError(f"LoraConfig: {name} is {alpha!r}, expected a positive number")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"LoraConfig: lora_dropout is {self.lora_dropout!r}, expected a number in [0, 1)"
            )
        for name in ("use_rslora", "train_a"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"LoraConfig: {name} is {getattr(self, name)!r}, expected true or false"
                )
        parts = self.qkv_parts
        if (
            not isinstance(parts, str)
            or not parts
            or parts != "".join(p for p in "qkv" if p in parts)
        ):
            raise InputError(
                f"LoraConfig: qkv_parts is {parts!r}, expected some of 'qkv' in that order"
            )
        self.target_modules = _targets("LoraConfig", self.target_modules)

    def settings(self, name: str) -> tuple[int, float]:
        """(r, lora_alpha) of the module called `name`; the first pattern that matches counts."""

        def of(pattern: Mapping[str, Any], default: Any) -> Any:
            hits = (v for k, v in pattern.items() if re.fullmatch(rf"(.*\.)?({k})", name))
            return next(hits, default)

        return of(self.rank_pattern, self.r), of(self.alpha_pattern, self.lora_alpha)


@dataclass
class SSFConfig(PeftConfig):
    """Scale and shift of features: y -> gamma * y + beta per channel (Lian et al., NeurIPS 2022).

    Folded into the layer that makes the features, so it costs no pass of its own.

    Args:
        target_modules: Linear, Conv3d, ConvTranspose3d and norm layers, matched as in LoraConfig.
            None is what the network itself names (`peft_ssf`), else every norm and every Linear,
            else (a network with neither) every convolution.

    Raises:
        InputError: `target_modules` is not a string, a list of strings or None.
    """

    peft_type: ClassVar[str] = "SSF"

    target_modules: Targets = None

    def __post_init__(self) -> None:
        self.target_modules = _targets("SSFConfig", self.target_modules)


@dataclass
class AdapterConfig(PeftConfig):
    """Bottleneck adapters: y -> y + up(act(down(y))) behind a block (Houlsby et al., ICML 2019).

    Behind an MLP it acts inside the block's residual, as in PETITE; behind a block of convolutions
    it acts on channels (two 1x1x1 convolutions). `down` starts random, `up` at zero. In the
    published networks both start random (CVT-GAN: not the identity) or both at zero (UNETR: only
    the bias of `up` ever learns).

    Args:
        reduction: hidden channels = max(1, channels // reduction).
        activation: "gelu" or "relu".
        target_modules: modules that an adapter is put behind, matched as in LoraConfig. None is
            every MLP and every residual block of convolutions of the kinds that are known.

    Raises:
        InputError: a value outside these ranges.
    """

    peft_type: ClassVar[str] = "ADAPTER"

    reduction: int = 8
    activation: str = "gelu"
    target_modules: Targets = None

    def __post_init__(self) -> None:
        if not _is_int(self.reduction) or self.reduction < 1:
            raise InputError(
                f"AdapterConfig: reduction is {self.reduction!r}, expected a positive integer"
            )
        if self.activation not in ("gelu", "relu"):
            raise InputError(
                f"AdapterConfig: activation is {self.activation!r}, expected 'gelu' or 'relu'"
            )
        self.target_modules = _targets("AdapterConfig", self.target_modules)


@dataclass
class LayerNormConfig(PeftConfig):
    """Train weight and bias of layer norms and nothing else.

    Args:
        target_modules: norms with a weight, matched as in LoraConfig; None is every LayerNorm,
            except those that the network itself declares unused.

    Raises:
        InputError: `target_modules` is not a string, a list of strings or None.
    """

    peft_type: ClassVar[str] = "LAYER_NORM"

    target_modules: Targets = None

    def __post_init__(self) -> None:
        self.target_modules = _targets("LayerNormConfig", self.target_modules)


@dataclass
class BitFitConfig(PeftConfig):
    """Train biases and nothing else (Ben Zaken et al., ACL 2022).

    Args:
        target_modules: modules whose bias trains, matched as in LoraConfig; None is every bias of
            the network, convolutions, Linears and norms alike, except parameters that the network
            itself declares unused.

    Raises:
        InputError: `target_modules` is not a string, a list of strings or None.
    """

    peft_type: ClassVar[str] = "BITFIT"

    target_modules: Targets = None

    def __post_init__(self) -> None:
        self.target_modules = _targets("BitFitConfig", self.target_modules)


@dataclass
class PromptConfig(PeftConfig):
    """Learned prompts in the stages of a transformer (VPT, Jia et al., ECCV 2022).

    Channel prompts in CVT-GAN (`nn.ChannelPrompt`), token prompts in MONAI's ViT
    (`nn.TokenPrompt`).

    Args:
        num_prompts: number of prompts per stage, {pattern: t}. A pattern must match the whole
            dotted name of a stage (`re.fullmatch`); t = 0 leaves the stage as it is.
        deep: prompts of its own for every block (VPT-deep), instead of one set for the stage.
        gated: token prompts are attended to through a gate that starts at zero, so the network
            starts as the base. False is the published form, which does not.

    Raises:
        InputError: not a mapping of strings to integers, or no number above 0.
    """

    peft_type: ClassVar[str] = "PROMPT"

    num_prompts: dict[str, int]
    deep: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        counts = self.num_prompts
        if (
            not isinstance(counts, Mapping)
            or not all(isinstance(name, str) for name in counts)
            or not all(_is_int(count) and count >= 0 for count in counts.values())
        ):
            raise InputError(
                f"PromptConfig: num_prompts is {counts!r}, expected module names with integers >= 0"
            )
        if not any(counts.values()):
            raise InputError(
                f"PromptConfig: num_prompts is {counts!r}, expected at least one number above 0"
            )
        self.num_prompts = dict(counts)
        for name in ("deep", "gated"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"PromptConfig: {name} is {getattr(self, name)!r}, expected true or false"
                )


@dataclass
class MixConfig(PeftConfig):
    """One method in the encoder, another in the decoder, biases on top if wanted (Mix-PEFT).

    What encoder and decoder are is known for the networks of `peft.networks`; another network says
    it (class attributes `peft_encoder` and `peft_decoder`), or the two patterns do.

    Args:
        encoder: config for the modules of the encoder.
        decoder: config for the modules of the decoder.
        bitfit: train every bias of the network as well.
        encoder_modules, decoder_modules: regular expressions; a module belongs to the side whose
            pattern matches the beginning of its dotted name.

    Raises:
        InputError: nothing is asked for, or a part is not a method's config.
    """

    peft_type: ClassVar[str] = "MIX"

    encoder: MethodConfig | None = None
    decoder: MethodConfig | None = None
    bitfit: bool = False
    encoder_modules: str | None = None
    decoder_modules: str | None = None

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            part = getattr(self, side)
            if isinstance(part, Mapping):
                part = PeftConfig.from_dict(part)
                setattr(self, side, part)
            if part is not None and not isinstance(part, METHODS):
                raise InputError(
                    f"MixConfig: {side} is {part!r}, expected a config of one method or None"
                )
        if not isinstance(self.bitfit, bool):
            raise InputError(f"MixConfig: bitfit is {self.bitfit!r}, expected true or false")
        for name in ("encoder_modules", "decoder_modules"):
            pattern = getattr(self, name)
            if pattern is not None:
                _require_pattern(f"MixConfig: {name}", pattern)
        if self.encoder is None and self.decoder is None and not self.bitfit:
            raise InputError("MixConfig: encoder, decoder and bitfit are all empty, expected one")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the parts with their own `peft_type`."""
        return {
            "peft_type": self.peft_type,
            "encoder": None if self.encoder is None else self.encoder.to_dict(),
            "decoder": None if self.decoder is None else self.decoder.to_dict(),
            "bitfit": self.bitfit,
            "encoder_modules": self.encoder_modules,
            "decoder_modules": self.decoder_modules,
        }


MethodConfig = (
    LoraConfig | SSFConfig | AdapterConfig | PromptConfig | BitFitConfig | LayerNormConfig
)
"""The config of one method."""
AnyConfig = MethodConfig | MixConfig
METHODS = (LoraConfig, SSFConfig, AdapterConfig, PromptConfig, BitFitConfig, LayerNormConfig)
_TYPES: dict[str, Any] = {cls.peft_type: cls for cls in (*METHODS, MixConfig)}


def _mapping(owner: str, name: str, config: Any) -> dict[str, Any]:
    """The mapping {pattern: number} called `name`, its patterns checked."""
    value = getattr(config, name)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{owner}: {name} is {value!r}, expected patterns with numbers")
    for key in value:
        _require_pattern(f"{owner}: {name}", key)
    return {f"{name}[{key!r}]": number for key, number in value.items()}


def _require_pattern(what: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"{what} {pattern!r} is not a regular expression: {error}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _targets(owner: str, value: Any) -> Targets:
    """`value` as Targets; a tuple or a set becomes a list, as JSON would make it."""
    if isinstance(value, (tuple, set, frozenset)):
        value = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return value
    raise InputError(
        f"{owner}: target_modules is {value!r}, expected a string, a list of strings or None"
    )
