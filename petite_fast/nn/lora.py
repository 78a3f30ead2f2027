"""LoRA layers: torch's Conv3d, ConvTranspose3d and Linear with a trainable low-rank term."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn.frozen import (
    FrozenConv3d,
    FrozenConvTranspose3d,
    conv_arguments,
    output_padding,
    require_type,
)
from petite_fast.nn.lora_base import LoRALayer, Pair, reduce_again
from petite_fast.nn.per_sample import effective_weights, grouped_conv, low_rank_linear
from petite_fast.ops.adapted_conv import adapted_conv
from petite_fast.ops.adapted_linear import adapted_linear

__all__ = ["LoRAConv3d", "LoRAConvTranspose3d", "LoRALayer", "LoRALinear"]


class _LoRAConv(LoRALayer):
    @classmethod
    def from_conv(cls, conv: Any, r: int = 8, lora_alpha: float = 16, **options: Any) -> Any:
        """An adapted layer that shares the weight and bias of `conv`, which are frozen with it.

        Args:
            conv: the torch layer that this class replaces, or its frozen twin.
            r: rank.
            lora_alpha: scaling * r.
            options: those of `convert_`; adapter_dtype is at least float32 by default.

        Raises:
            TypeError: `conv` is another layer.
            ValueError: as `convert_`.
        """
        if type(conv) is not cls.frozen_class:
            require_type(conv, cls.torch_class, f"{cls.__name__}.from_conv")
        return cls._from(conv, r, lora_alpha, options)

    def _check_per_sample(self, x: Tensor, pairs: list[Pair]) -> None:
        if x.dim() != 5:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted a batch for per_sample")
        super()._check_per_sample(x, pairs)

    def _mixed(self, x: Tensor, pairs: list[Pair], *arguments: Any, **geometry: Any) -> Tensor:
        transposed = geometry.get("transposed", False)
        weights = effective_weights(x, self.weight, pairs, self.scaling, transposed)
        return grouped_conv(x, weights, self.bias, **geometry)


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    """`torch.nn.Conv3d` with LoRA, as one convolution: y = conv(x, W + scaling * B.A, b).

    lora_A (r, C/groups, kD, kH, kW) is shared by all groups, lora_B (O, r). Every stride, padding,
    padding mode, dilation and group count of torch's layer. With ``lora_dropout > 0`` training
    takes two paths (the branch's input differs) and the branch is recomputed in backward.

    With ``crossing=True`` it is the form that Hugging Face PEFT gives to a grouped convolution, for
    its files: lora_A (r, C, kD, kH, kW) is dense and lora_B (O, r/groups) works group by group,

        y = conv(x, W, b) + scaling * conv1x1x1(conv(x, A, groups=1), B, groups=groups)

    The update crosses the groups, so it is no update of the grouped weight and cannot be folded: a
    second path at all times, recomputed in backward from x, which is kept. PEFT's own layer leaves
    dilation and padding mode out of A; here they are those of the convolution.

    Args: those of torch.nn.Conv3d, and by keyword ``r=8, lora_alpha=16, lora_dropout=0.0,
        train_a=True, use_rslora=False, crossing=False``.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1); `crossing`
            without groups, or with an `r` that they do not divide.

    Source: LoRA (Hu et al. 2021); LoRA-FA (Zhang et al. 2023).
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Conv3d
    frozen_class: ClassVar[type[nn.Module]] = FrozenConv3d
    adapter_settings: ClassVar[tuple[str, ...]] = (*LoRALayer.adapter_settings, "crossing")
    form: ClassVar[dict[str, Any]] = {"crossing": False}

    crossing: bool

    @classmethod
    def _check_form(cls, module: Any, r: int, crossing: bool = False) -> None:
        if crossing and (module.groups == 1 or r % module.groups):
            raise ValueError(
                f"crossing: got r={r} and groups={module.groups}, wanted groups > 1 that divide r"
            )

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.crossing:
            kernel = self.weight.shape[2:]
            return (r, self.in_channels, *kernel), (self.out_channels, r // self.groups)
        return (r, *self.weight.shape[1:]), (self.out_channels, r)

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W_eff, in `dtype` (default: the weight's); never the weight itself.

        Raises:
            ValueError: the update crosses the groups.
        """
        if self.crossing:
            raise ValueError(
                "crossing: got LoRA that mixes the channels of all groups, wanted an update of the "
                "grouped weight: it cannot be folded in or merged"
            )
        return super().effective_weight(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        return self._run(adapted_conv, x, **conv_arguments(self))

    def _two_paths(self) -> bool:
        return self.crossing or super()._two_paths()

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        geometry = conv_arguments(self)
        if self.groups > 1 and not self.crossing:
            # r channels per group would be more than the kernel's own work: fold B.A first.
            product = (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(self.weight)
            return adapted_conv(x, product, **geometry)

        def reduce(x: Tensor, lora_A: Tensor) -> Tensor:
            return adapted_conv(x, lora_A, **geometry | {"groups": 1})

        low = reduce_again(reduce, x, lora_A)  # [N, r, D', H', W']
        return adapted_conv(low, lora_B[..., None, None, None], groups=self.groups)

    def _mixed(self, x: Tensor, pairs: list[Pair], *arguments: Any, **geometry: Any) -> Tensor:
        if not self.crossing:
            return super()._mixed(x, pairs, *arguments, **geometry)
        y = adapted_conv(x, self.weight, self.bias, **geometry)
        lora_A, lora_B = (torch.cat(factors).to(x.dtype) for factors in zip(*pairs, strict=True))
        low = grouped_conv(x, lora_A, None, **geometry | {"groups": 1})
        lora_B = (lora_B * self.scaling).to(low.dtype)[..., None, None, None]
        return y + grouped_conv(low, lora_B, None, self.groups)


class LoRAConvTranspose3d(_LoRAConv, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with LoRA, as one transposed convolution.

    lora_A (r, C, 1, 1, 1) reduces the channels and lora_B (r, O/groups, kD, kH, kW) carries the
    kernel: (B.A)[c] = sum_q A[q, c] B[q]. Otherwise as LoRAConv3d.

    Args: those of torch.nn.ConvTranspose3d, and by keyword ``r=8, lora_alpha=16, lora_dropout=0.0,
        train_a=True, use_rslora=False``.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
    """

    torch_class: ClassVar[type[nn.Module]] = nn.ConvTranspose3d
    frozen_class: ClassVar[type[nn.Module]] = FrozenConvTranspose3d

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_channels, 1, 1, 1), (r, *self.weight.shape[1:])

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']; `output_size` as in torch.nn.ConvTranspose3d."""
        extra = output_padding(self, x, output_size)
        geometry = conv_arguments(self) | {"transposed": True, "output_padding": extra}
        return self._run(adapted_conv, x, extra, **geometry)

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        geometry = conv_arguments(self) | {"transposed": True, "output_padding": arguments[0]}
        if self.groups > 1:
            product = (lora_A.flatten(1).t() @ lora_B.flatten(1)).view_as(self.weight)
            return adapted_conv(x, product, **geometry)
        low = reduce_again(adapted_conv, x, lora_A)  # [N, r, D, H, W]
        return adapted_conv(low, lora_B, **geometry)


class LoRALinear(LoRALayer, nn.Linear):
    """`torch.nn.Linear` with LoRA, as one product: y = x (W + scaling * B A)^T + b.

    lora_A (r, in), lora_B (out, r). Otherwise as LoRAConv3d.

    A fused projection makes query, key and value at once, out = 3 D, in that order (MONAI's
    SABlock, Swin's WindowAttention). `qkv_parts` names the n parts of it that are adapted, each
    with an A and a B of its own: lora_A (n*r, in), lora_B (n*D, r); part i has rows i*r..(i+1)*r of
    A and rows i*D..(i+1)*D of B, and the other parts stay as they are. "qkv" is no such case: one A
    for the whole matrix, as in any other Linear.

    Args: those of torch.nn.Linear, and by keyword ``r=8, lora_alpha=16, lora_dropout=0.0,
        train_a=True, use_rslora=False, qkv_parts="qkv"``.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1); `qkv_parts` is
            not some of "qkv" in that order, or names some and out is not divisible by 3.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Linear
    frozen_class: ClassVar[type[nn.Module]] = nn.Linear
    adapter_settings: ClassVar[tuple[str, ...]] = (*LoRALayer.adapter_settings, "qkv_parts")
    form: ClassVar[dict[str, Any]] = {"qkv_parts": "qkv"}

    qkv_parts: str

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, lora_alpha: float = 16, **options: Any
    ) -> LoRALinear:
        """As LoRAConv3d.from_conv.

        Raises:
            TypeError: `linear` is not exactly a torch.nn.Linear.
            ValueError: as `convert_`.
        """
        require_type(linear, nn.Linear, f"{cls.__name__}.from_linear")
        return cls._from(linear, r, lora_alpha, options)

    @classmethod
    def _check_form(cls, module: Any, r: int, qkv_parts: str = "qkv") -> None:
        if qkv_parts not in ("q", "k", "v", "qk", "qv", "kv", "qkv"):
            raise ValueError(f"qkv_parts: got {qkv_parts!r}, wanted some of 'qkv' in that order")
        if qkv_parts != "qkv" and module.out_features % 3:
            raise ValueError(
                f"qkv_parts: got {qkv_parts!r} of {module.out_features} outputs, wanted a multiple "
                "of 3 of them: query, key and value"
            )

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.qkv_parts == "qkv":
            return (r, self.in_features), (self.out_features, r)
        n = len(self.qkv_parts)
        return (n * r, self.in_features), (n * self.out_features // 3, r)

    def _arrange(self, lora_A: Tensor, lora_B: Tensor) -> Pair:
        """B of the parts as blocks of the B (out, n*r) of the whole matrix."""
        if self.qkv_parts == "qkv":
            return lora_A, lora_B
        n = len(self.qkv_parts)
        parts = dict(zip(self.qkv_parts, enumerate(lora_B.chunk(n)), strict=True))
        blocks = []
        for part in "qkv":
            if part in parts:
                i, block = parts[part]
                blocks.append(F.pad(block, (i * self.r, (n - 1 - i) * self.r)))
            else:
                blocks.append(lora_B.new_zeros(self.out_features // 3, n * self.r))
        return lora_A, torch.cat(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self._run(adapted_linear, x)

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        lora_A, lora_B = self._arrange(lora_A, lora_B)
        return adapted_linear(reduce_again(adapted_linear, x, lora_A), lora_B)

    def _check_per_sample(self, x: Tensor, pairs: list[Pair]) -> None:
        if x.dim() < 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted a batch for per_sample")
        super()._check_per_sample(x, pairs)

    def _mixed(self, x: Tensor, pairs: list[Pair], *arguments: Any, **geometry: Any) -> Tensor:
        arranged = [self._arrange(a, b) for a, b in pairs]
        return low_rank_linear(x, self.weight, self.bias, arranged, self.scaling)
