"""adapted_linear: a frozen linear layer with LoRA, scale-and-shift and bias as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.ops import adapted


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scale: float = 1.0,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """One linear layer on tokens with the adapters folded into its weight and bias.

    ``y = x W_eff^T + b_eff``, ``W_eff = gamma * (W + scale * B A)``, ``b_eff = gamma * b + beta``.
    What is kept for backward is as in `adapted_conv`: nothing, t = x A^T (r per token), y or x.

    Args:
        x: [..., C].
        weight: [O, C].
        bias: [O].
        lora_A: [r, C].
        lora_B: [O, r].
        scale: lora_alpha / r.
        gamma: [O], SSF scale.
        beta: [O], SSF shift.

    Returns:
        y [..., O].

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: x and weight of different dtypes without autocast.
        RuntimeError: a second derivative is asked for.

    Source: LoRA (Hu et al. 2021), LoRA-FA (Zhang et al. 2023), SSF (Lian et al. 2022).
    """
    tensors = (x, weight, bias, lora_A, lora_B, gamma, beta)
    if has_torch_function(tensors):
        return handle_torch_function(
            adapted_linear, tensors, x, weight, bias, lora_A=lora_A, lora_B=lora_B, scale=scale,
            gamma=gamma, beta=beta,
        )  # fmt: skip
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted two dimensions")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {inputs}]")
    for name, vector in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if vector is not None and tuple(vector.shape) != (outputs,):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, wanted ({outputs},)")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B: got one of them, wanted both or neither")
    if lora_A is not None and lora_B is not None:
        r = lora_A.shape[0]
        for name, tensor, wanted in (
            ("lora_A", lora_A, (r, inputs)),
            ("lora_B", lora_B, (outputs, r)),
        ):
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
    return adapted.apply(LinearMap(), x, weight, bias, lora_A, lora_B, scale, gamma, beta)


@dataclass(frozen=True)
class LinearMap:
    """`adapted.Map` of a linear layer on the last axis."""

    groups: int = 1
    transposed: bool = False

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """y = x weight^T + bias."""
        return F.linear(x, weight, bias)

    def grad_input(
        self, grad_y: torch.Tensor, weight: torch.Tensor, size: torch.Size
    ) -> torch.Tensor:
        """grad_x = grad_y weight."""
        return grad_y @ weight

    def grad_weight(
        self, grad_y: torch.Tensor, x: torch.Tensor, size: Sequence[int]
    ) -> torch.Tensor:
        """grad_y^T x over all tokens."""
        return _tokens(grad_y).t() @ _tokens(x)

    def grad_bias(self, grad_y: torch.Tensor) -> torch.Tensor:
        """Sum over tokens."""
        wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
        return _tokens(grad_y).sum(0, dtype=wide)

    def low_rank_input(self, x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
        """t = x A^T."""
        return F.linear(x, lora_A)

    def low_rank_grad_A(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """(grad_y (gamma B))^T x."""
        b = lora_B if gamma is None else lora_B * gamma.to(lora_B.dtype).unsqueeze(1)
        return (_tokens(grad_y) @ b).t() @ _tokens(x)

    def low_rank_grad_B(
        self,
        grad_y: torch.Tensor,
        t: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """gamma * grad_y^T t."""
        grad = _tokens(grad_y).t() @ _tokens(t)
        return grad if gamma is None else grad * gamma.unsqueeze(1)

    def low_rank_gradient(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor | None,
        t: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
        wants: adapted.Wants,
    ) -> adapted.LowRankGradients:
        """Three products and a sum."""
        return adapted.composed_low_rank_gradient(self, grad_y, x, t, lora_A, lora_B, gamma, wants)

    def low_rank_is_smaller(self, x: torch.Tensor, lora_A: torch.Tensor) -> bool:
        """r < C."""
        return lora_A.shape[0] < lora_A.shape[1]

    def low_rank_is_faster(self, weight: torch.Tensor, r: int) -> bool:
        """2 r (C + O) multiply-adds per token against C O."""
        outputs, inputs = weight.shape
        return 2 * r * (inputs + outputs) < inputs * outputs


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [tokens, C]."""
    return x.reshape(-1, x.shape[-1])
