"""What to adapt, and how: small records that go to JSON and come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
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
        known = {field.name for field in fields(cls)}
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
        train_a: False is LoRA-FA: A keeps its random start.

    Raises:
        InputError: a value outside these ranges.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 16
    target_modules: Targets = None
    lora_dropout: float = 0.0
    train_a: bool = True

    def __post_init__(self) -> None:
        if not _is_int(self.r) or self.r < 1:
            raise InputError(f"LoraConfig: r is {self.r!r}, expected a positive integer")
        if not _is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise InputError(
                f"LoraConfig: lora_alpha is {self.lora_alpha!r}, expected a positive number"
            )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"LoraConfig: lora_dropout is {self.lora_dropout!r}, expected a number in [0, 1)"
            )
        if not isinstance(self.train_a, bool):
            raise InputError(f"LoraConfig: train_a is {self.train_a!r}, expected true or false")
        self.target_modules = _targets("LoraConfig", self.target_modules)


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

    Args:
        num_prompts: number of prompts per stage, {pattern: t}. A pattern must match the whole
            dotted name of a stage (`re.fullmatch`); t = 0 leaves the stage as it is.

    Raises:
        InputError: not a mapping of strings to integers, or no number above 0.
    """

    peft_type: ClassVar[str] = "PROMPT"

    num_prompts: dict[str, int]

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


@dataclass
class MixConfig(PeftConfig):
    """One method in the encoder, another in the decoder, biases on top if wanted (Mix-PEFT).

    The network says what its encoder and decoder are (its class attributes `peft_encoder` and
    `peft_decoder`).

    Args:
        encoder: config for the modules of the encoder.
        decoder: config for the modules of the decoder.
        bitfit: train every bias of the network as well.

    Raises:
        InputError: nothing is asked for, or a part is not a method's config.
    """

    peft_type: ClassVar[str] = "MIX"

    encoder: MethodConfig | None = None
    decoder: MethodConfig | None = None
    bitfit: bool = False

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
        if self.encoder is None and self.decoder is None and not self.bitfit:
            raise InputError("MixConfig: encoder, decoder and bitfit are all empty, expected one")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the parts with their own `peft_type`."""
        return {
            "peft_type": self.peft_type,
            "encoder": None if self.encoder is None else self.encoder.to_dict(),
            "decoder": None if self.decoder is None else self.decoder.to_dict(),
            "bitfit": self.bitfit,
        }


MethodConfig = LoraConfig | BitFitConfig | PromptConfig
"""The config of one method."""
AnyConfig = LoraConfig | BitFitConfig | PromptConfig | MixConfig
METHODS = (LoraConfig, BitFitConfig, PromptConfig)
_TYPES: dict[str, type[LoraConfig] | type[BitFitConfig] | type[PromptConfig] | type[MixConfig]] = {
    cls.peft_type: cls for cls in (*METHODS, MixConfig)
}


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
