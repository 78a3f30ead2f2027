"""What the LoRA layers have in common: settings, conversion, folding, the kept effective weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petite_fast.nn.adapted import AdaptedLayer
from petite_fast.nn.frozen import conv_like, freeze, require_type
from petite_fast.nn.weight_cache import CachedWeight
from petite_fast.ops import effective_weight
from petite_fast.ops.adapted import compute_dtype
from petite_fast.ops.dropout import dropout
from petite_fast.ops.remade import remember

Pair = tuple[Tensor, Tensor]
"""A and B of one adapter."""


def check_rank(r: Any, lora_dropout: Any) -> None:
    """Refuse a rank or a dropout rate that means nothing.

    Raises:
        ValueError: `r` is not a positive int, or `lora_dropout` is outside [0, 1).
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: got {r!r}, wanted a positive int")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: got {lora_dropout!r}, wanted a number in [0, 1)")


def reduce_again(op: Callable[..., Tensor], x: Tensor, lora_A: Tensor) -> Tensor:
    """op(x, A): a few channels, which are not kept but made again where x is kept anyway."""
    low = op(x, lora_A)
    return remember(low, [x, lora_A], op) if lora_A.requires_grad else low


class LoRALayer(AdaptedLayer):
    """What the three LoRA layers have in common: a mixin in front of the torch layer.

        W_eff = W + scaling * B.A        scaling = lora_alpha / r, or lora_alpha / sqrt(r)

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
        use_rslora: scaling is lora_alpha / sqrt(r) (Kalajdzievski 2023).
        per_sample: None, or one pair (A, B) for each sample of the next batches, of the shapes of
            `lora_A` and `lora_B` and used in their place: a batch with several adapters in one
            pass. Not part of the state dict, a copy or a pickle.
    """

    frozen_class: ClassVar[type[nn.Module]]
    adapter_parameters: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    adapter_settings: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "scaling", "lora_dropout", "train_a", "use_rslora",
        "per_sample", "_kept",
    )  # fmt: skip
    form: ClassVar[dict[str, Any]] = {}
    """Keywords that one layer takes beyond those of all, and their defaults."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    lora_alpha: float
    scaling: float
    lora_dropout: float
    train_a: bool
    use_rslora: bool
    per_sample: list[Pair] | None = None
    _kept: CachedWeight | None = None

    def __init__(
        self,
        *args: Any,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        train_a: bool = True,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        check_rank(r, lora_dropout)
        form = {name: kwargs.pop(name, default) for name, default in self.form.items()}
        super().__init__(*args, **kwargs)
        self._check_form(self, r, **form)
        freeze(self)
        self._add_lora(r, lora_alpha, lora_dropout, train_a, use_rslora, None, form)

    @classmethod
    def _check_form(cls, module: Any, r: int) -> None:
        """Take the keywords of `form` and refuse those that do not fit `module`."""

    def _lora_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B."""
        raise NotImplementedError

    def _add_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        train_a: bool,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        form: dict[str, Any],
    ) -> None:
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout, self.train_a = lora_dropout, train_a
        for name, value in form.items():
            setattr(self, name, value)
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
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        **form: Any,
    ) -> Any:
        """Turn `module` itself into this class: its name, hooks and every reference to it stay.

        Args:
            module: the torch layer that this class replaces.
            r, lora_alpha, lora_dropout, train_a, use_rslora: as the attributes of those names.
            adapter_dtype: of lora_A and lora_B; by default the weight's, at least float32.
            form: keywords of the class itself: `crossing` of LoRAConv3d, `qkv_parts` of LoRALinear.

        Raises:
            TypeError: `module` is not exactly of the torch class that this one replaces.
            ValueError: `r` is not a positive int, `lora_dropout` is outside [0, 1), or what the
                class itself refuses.
        """
        check_rank(r, lora_dropout)
        require_type(module, cls.torch_class, f"{cls.__name__}.convert_")
        form = cls.form | form
        cls._check_form(module, r, **form)
        module.__class__ = cls
        freeze(module)
        module._add_lora(  # type: ignore[operator]
            r, lora_alpha, lora_dropout, train_a, use_rslora, adapter_dtype, form
        )
        return module

    @classmethod
    def _from(cls, module: Any, r: int, lora_alpha: float, options: dict[str, Any]) -> Any:
        check_rank(r, options.get("lora_dropout", 0.0))
        return cls.convert_(_plain_twin(module, cls.torch_class), r, lora_alpha, **options)

    def factors(self) -> Pair:
        """(A, B) as the op sees them: ``W_eff = W + scaling * B.A``. Differentiable."""
        return self._arrange(self.lora_A, self.lora_B)

    def _arrange(self, lora_A: Tensor, lora_B: Tensor) -> Pair:
        """`factors` of any two tensors of the shapes of lora_A and lora_B."""
        return lora_A, lora_B

    def merge(self) -> Any:
        """A plain torch layer with weight W_eff and a copy of the bias; exact, and independent."""
        plain = _plain_twin(self, self.torch_class)
        plain.weight = nn.Parameter(self.effective_weight())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W_eff, in `dtype` (default: the weight's); never the weight itself."""
        dtype = self.weight.dtype if dtype is None else dtype
        if self.is_folded:
            return self.weight.detach().to(dtype, copy=True)
        lora_A, lora_B = self.factors()
        return effective_weight(
            self.weight,
            lora_A,
            lora_B,
            self.scaling,
            None,
            groups=getattr(self, "groups", 1),
            transposed=isinstance(self, nn.ConvTranspose3d),
            dtype=dtype,
        )

    def _folded_values(self) -> dict[str, Tensor]:
        return {"weight": self.effective_weight()}

    def _run(
        self, op: Callable[..., Tensor], x: Tensor, *arguments: Any, **geometry: Any
    ) -> Tensor:
        """op(x, W_eff, bias), the branch apart where it cannot be folded into W_eff."""
        if self.per_sample is not None:
            self._check_per_sample(x, self.per_sample)
            return self._mixed(x, self.per_sample, *arguments, **geometry)
        if self._two_paths():
            return op(x, self.weight, self.bias, **geometry) + self._branch(x, *arguments)
        weight, lora = self._adapters(x)
        return op(x, weight, self.bias, **lora, **geometry)

    def _adapters(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The weight and the LoRA arguments of the op: a ready W_eff and none where possible."""
        if self.is_folded:
            return self.weight, {}
        sources = (self.weight, self.lora_A, self.lora_B)
        # A compiled graph computes W_eff itself, and an autograd graph needs A and B. Only true
        # parameters have the version and address that tell a change: not inference tensors, and
        # not the stand-ins that functional_call puts in their place.
        if (
            self.training
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or not all(type(p) is nn.Parameter and not p.is_inference() for p in sources)
        ):
            lora_A, lora_B = self.factors()
            return self.weight, {"lora_A": lora_A, "lora_B": lora_B, "scale": self.scaling}
        dtype = compute_dtype(x, self.weight)
        kept = self._kept
        if kept is None or not kept.current(dtype, self.scaling, sources):
            with torch.inference_mode(False), torch.no_grad():
                kept = CachedWeight.of(self.effective_weight(dtype), self.scaling, sources)
            self._kept = kept
        return kept.weight, {}

    def _two_paths(self) -> bool:
        """Whether dropout on the low-rank branch keeps it from being folded into the weight."""
        return self.training and self.lora_dropout > 0.0 and not self.is_folded

    def _branch(self, x: Tensor, *arguments: Any) -> Tensor:
        """scaling * B(A(dropout(x))): keeps x, or A(dropout(x)) where A does not train (LoRA-FA).

        The mask and A(dropout(x)) are made again in backward.
        """
        x = x.to(compute_dtype(x, self.weight))
        if self.training and self.lora_dropout > 0.0:
            x = dropout(x, self.lora_dropout)
        return self._low_rank(
            x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype) * self.scaling, *arguments
        )

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
        raise NotImplementedError

    def _check_per_sample(self, x: Tensor, pairs: list[Pair]) -> None:
        if self.is_folded:
            raise ValueError("per_sample: got a folded layer, wanted unfold_() first")
        if self.training and self.lora_dropout > 0.0:
            raise ValueError(
                f"per_sample: got training with lora_dropout={self.lora_dropout}, wanted eval()"
            )
        if len(pairs) != len(x):
            raise ValueError(
                f"per_sample: got {len(pairs)} pairs for {len(x)} samples, wanted one each"
            )
        wanted = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        for a, b in pairs:
            if (got := (tuple(a.shape), tuple(b.shape))) != wanted:
                raise ValueError(f"per_sample: got shapes {got}, wanted {wanted}")

    def _mixed(self, x: Tensor, pairs: list[Pair], *arguments: Any, **geometry: Any) -> Tensor:
        """Sample i with `pairs` [i]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set the mode and drop the kept W_eff."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_kept", "per_sample"):
            state.pop(name, None)
        return state

    def extra_repr(self) -> str:
        """The torch layer's text and the LoRA settings."""
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"
        defaults = {"lora_dropout": 0.0, "train_a": True, "use_rslora": False, **self.form}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                text += f", {name}={value!r}"
        return text


def _plain_twin(module: Any, torch_class: Any) -> Any:
    """A new `torch_class` that shares the parameters of `module`."""
    if torch_class is not nn.Linear:
        return conv_like(module, torch_class)
    new = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
    new.weight, new.bias = module.weight, module.bias
    return new.train(module.training)
