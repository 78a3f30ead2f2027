"""LoRA layers: torch's Conv3d, ConvTranspose3d and Linear with a trainable low-rank term."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petite_fast.nn.frozen import (
    FrozenConv3d,
    FrozenConvTranspose3d,
    conv_arguments,
    conv_like,
    freeze,
    output_padding,
    require_type,
)
from petite_fast.ops import adapted_conv, adapted_linear, effective_weight
from petite_fast.ops.adapted import compute_dtype


class _Folded(NamedTuple):
    """An effective weight and what it was computed from.

    `sources` are the parameters, `aliases` tensors on the same storage: while an alias lives, no
    other tensor can appear at its address, so equal addresses mean the same memory.
    """

    weight: Tensor
    scaling: float
    sources: tuple[nn.Parameter, ...]
    aliases: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def current(self, dtype: torch.dtype, scaling: float, sources: tuple[Tensor, ...]) -> bool:
        """Whether it is still what these sources give."""
        return (
            self.weight.dtype == dtype
            and self.scaling == scaling
            and all(
                now is then and now.data_ptr() == alias.data_ptr() and now._version == version
                for now, then, alias, version in zip(
                    sources, self.sources, self.aliases, self.versions, strict=True
                )
            )
        )


def check_rank(r: Any, lora_dropout: Any) -> None:
    """Refuse a rank or a dropout rate that means nothing.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: got {r!r}, wanted a positive int")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: got {lora_dropout!r}, wanted a number in [0, 1)")


class LoRALayer(nn.Module):
    """What the three LoRA layers have in common: a mixin in front of the torch layer.

        W_eff = W + scaling * B.A        scaling = lora_alpha / r

    W and the bias are frozen; `lora_A` starts Kaiming-uniform (a = sqrt 5), `lora_B` at zero, so
    the layer starts as the one it replaces. In evaluation mode without gradients W_eff is kept
    until the weight, an adapter tensor, `scaling` or the dtype changes. A change is seen by
    identity, address and version of the tensors, so a write that goes round autograd
    (``p.data.add_(...)``) is not seen: call `train()` or `eval()` after one. The kept tensor is not
    part of the state dict, a copy or a pickle.

    Attributes:
        lora_A, lora_B: shapes as in `ops.adapted_conv` and `ops.adapted_linear`; float32 for a base
            in half precision.
        r, lora_alpha, scaling, lora_dropout: as given; `scaling` may be changed at any time.
        train_a: False is LoRA-FA: A stays at its random start and r channels are kept instead of x.
    """

    torch_class: ClassVar[type[nn.Module]]
    frozen_class: ClassVar[type[nn.Module]]

    weight: Any
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    lora_alpha: float
    scaling: float
    lora_dropout: float
    train_a: bool
    _folded: _Folded | None = None

    def __init__(
        self,
        *args: Any,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        train_a: bool = True,
        **kwargs: Any,
    ) -> None:
        check_rank(r, lora_dropout)
        super().__init__(*args, **kwargs)
        freeze(self)
        self._add_lora(r, lora_alpha, lora_dropout, train_a, None)

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B."""
        raise NotImplementedError

    def _add_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        train_a: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout, self.train_a = lora_dropout, train_a
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape_a, shape_b = self._lora_shapes(r)
        options: dict[str, Any] = {"device": self.weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty(shape_a, **options), requires_grad=train_a)
        self.lora_B = nn.Parameter(torch.zeros(shape_b, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def convert_(
        cls,
        module: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        lora_dropout: float = 0.0,
        train_a: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> Any:
        """Turn `module` itself into this class: its name, hooks and every reference to it stay.

        Raises:
            TypeError: `module` is not exactly of the torch class that this one replaces.
            ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
        """
        check_rank(r, lora_dropout)
        require_type(module, cls.torch_class, f"{cls.__name__}.convert_")
        module.__class__ = cls
        freeze(module)
        module._add_lora(r, lora_alpha, lora_dropout, train_a, adapter_dtype)  # type: ignore[operator]
        return module

    @classmethod
    def _from(cls, module: Any, r: int, lora_alpha: float, options: dict[str, Any]) -> Any:
        check_rank(r, options.get("lora_dropout", 0.0))
        return cls.convert_(_plain_twin(module, cls.torch_class), r, lora_alpha, **options)

    def merge(self) -> Any:
        """A plain torch layer with weight W_eff and a copy of the bias; exact, and independent."""
        plain = _plain_twin(self, self.torch_class)
        plain.weight = nn.Parameter(self.effective_weight())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W_eff, in `dtype` (default: the weight's); never the weight itself."""
        return effective_weight(
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            None,
            groups=getattr(self, "groups", 1),
            transposed=isinstance(self, nn.ConvTranspose3d),
            dtype=self.weight.dtype if dtype is None else dtype,
        )

    def _adapters(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The weight and the LoRA arguments of the op: a ready W_eff and none where possible."""
        lora = {"lora_A": self.lora_A, "lora_B": self.lora_B, "scale": self.scaling}
        # A compiled graph computes W_eff itself, and an autograd graph needs A and B.
        if self.training or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.weight, lora
        sources = (self.weight, self.lora_A, self.lora_B)
        # Only true parameters have the version and address that tell a change: not inference
        # tensors, and not the stand-ins that functional_call puts in their place.
        if not all(type(p) is nn.Parameter and not p.is_inference() for p in sources):
            return self.weight, lora
        dtype = compute_dtype(x, self.weight)
        folded = self._folded
        if folded is None or not folded.current(dtype, self.scaling, sources):
            with torch.inference_mode(False), torch.no_grad():
                folded = _Folded(
                    self.effective_weight(dtype),
                    self.scaling,
                    sources,
                    tuple(p.detach() for p in sources),
                    tuple(p._version for p in sources),
                )
            self._folded = folded
        return folded.weight, {}

    def _two_paths(self) -> bool:
        """Whether dropout on the low-rank branch keeps it from being folded into the weight."""
        return self.training and self.lora_dropout > 0.0

    def _branch(self, x: Tensor, *arguments: Any) -> Tensor:
        """scaling * B(A(dropout(x))), recomputed in backward with the same mask: keeps x alone."""
        if not torch.is_grad_enabled():
            return self._low_rank(x, self.lora_A, self.lora_B, *arguments)
        return checkpoint(
            self._low_rank, x, self.lora_A, self.lora_B, *arguments, use_reentrant=False
        )

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set the mode and drop the kept W_eff."""
        self._folded = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._folded = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_folded", None)
        return state

    def extra_repr(self) -> str:
        """The torch layer's text and the LoRA settings."""
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout}"
        return text if self.train_a else text + ", train_a=False"


class _LoRAConv(LoRALayer):
    @classmethod
    def from_conv(cls, conv: Any, r: int = 8, lora_alpha: float = 16, **options: Any) -> Any:
        """An adapted layer that shares the weight and bias of `conv`, which are frozen with it.

        Args:
            conv: the torch layer that this class replaces, or its frozen twin.
            r: rank.
            lora_alpha: scaling * r.
            options: lora_dropout, train_a, adapter_dtype (default: at least float32).

        Raises:
            TypeError: `conv` is another layer.
            ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
        """
        if type(conv) is not cls.frozen_class:
            require_type(conv, cls.torch_class, f"{cls.__name__}.from_conv")
        return cls._from(conv, r, lora_alpha, options)


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    """`torch.nn.Conv3d` with LoRA, as one convolution: y = conv(x, W + scaling * B.A, b).

    lora_A (r, C/groups, kD, kH, kW) is shared by all groups, lora_B (O, r). Every stride, padding,
    padding mode, dilation and group count of torch's layer. With ``lora_dropout > 0`` training
    takes two paths (the branch's input differs) and the branch is recomputed in backward.

    Args: those of torch.nn.Conv3d, and by keyword ``r=8, lora_alpha=16, lora_dropout=0.0,
        train_a=True``.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).

    Source: LoRA (Hu et al. 2021); LoRA-FA (Zhang et al. 2023).
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Conv3d
    frozen_class: ClassVar[type[nn.Module]] = FrozenConv3d

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, *self.weight.shape[1:]), (self.out_channels, r)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        geometry = conv_arguments(self)
        if self._two_paths():
            return adapted_conv(x, self.weight, self.bias, **geometry) + self._branch(x)
        weight, lora = self._adapters(x)
        return adapted_conv(x, weight, self.bias, **lora, **geometry)

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        x = F.dropout(x, self.lora_dropout)
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype) * self.scaling
        if self.groups == 1:
            low = self._conv_forward(x, lora_A, None)  # [N, r, D', H', W']
            return F.conv3d(low, lora_B[..., None, None, None])
        # r channels per group would be more than the kernel's own work: fold B.A first.
        return self._conv_forward(x, (lora_B @ lora_A.flatten(1)).view_as(self.weight), None)


class LoRAConvTranspose3d(_LoRAConv, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with LoRA, as one transposed convolution.

    lora_A (r, C, 1, 1, 1) reduces the channels and lora_B (r, O/groups, kD, kH, kW) carries the
    kernel: (B.A)[c] = sum_q A[q, c] B[q]. Otherwise as LoRAConv3d.

    Args: those of torch.nn.ConvTranspose3d, and by keyword ``r=8, lora_alpha=16, lora_dropout=0.0,
        train_a=True``.

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
        if self._two_paths():
            return adapted_conv(x, self.weight, self.bias, **geometry) + self._branch(x, extra)
        weight, lora = self._adapters(x)
        return adapted_conv(x, weight, self.bias, **lora, **geometry)

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        x = F.dropout(x, self.lora_dropout)
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype) * self.scaling
        if self.groups == 1:
            x, kernel = F.conv3d(x, lora_A), lora_B  # [N, r, D, H, W]
        else:
            kernel = (lora_A.flatten(1).t() @ lora_B.flatten(1)).view_as(self.weight)
        (extra,) = arguments
        padding: Any = self.padding  # a string only in plain convolutions
        return F.conv_transpose3d(
            x, kernel, None, self.stride, padding, extra, self.groups, self.dilation
        )


class LoRALinear(LoRALayer, nn.Linear):
    """`torch.nn.Linear` with LoRA, as one product: y = x (W + scaling * B A)^T + b.

    lora_A (r, in), lora_B (out, r). Otherwise as LoRAConv3d.

    Args: those of torch.nn.Linear, and by keyword ``r=8, lora_alpha=16, lora_dropout=0.0,
        train_a=True``.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Linear
    frozen_class: ClassVar[type[nn.Module]] = nn.Linear

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, lora_alpha: float = 16, **options: Any
    ) -> LoRALinear:
        """As LoRAConv3d.from_conv.

        Raises:
            TypeError: `linear` is not exactly a torch.nn.Linear.
            ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
        """
        require_type(linear, nn.Linear, f"{cls.__name__}.from_linear")
        return cls._from(linear, r, lora_alpha, options)

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self._two_paths():
            return adapted_linear(x, self.weight, self.bias) + self._branch(x)
        weight, lora = self._adapters(x)
        return adapted_linear(x, weight, self.bias, **lora)

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        x = F.dropout(x, self.lora_dropout)
        low = F.linear(x, lora_A.to(x.dtype))
        return F.linear(low, lora_B.to(x.dtype) * self.scaling)


def _plain_twin(module: Any, torch_class: Any) -> Any:
    """A new `torch_class` that shares the parameters of `module`."""
    if torch_class is not nn.Linear:
        return conv_like(module, torch_class)
    new = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
    new.weight, new.bias = module.weight, module.bias
    return new.train(module.training)
