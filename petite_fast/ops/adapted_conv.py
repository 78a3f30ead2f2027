"""adapted_conv: a frozen 3-D convolution with LoRA, scale-and-shift and bias as one convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.overrides import handle_torch_function, has_torch_function

from petite_fast.backends import native_low_rank
from petite_fast.backends.eager import scale_outputs
from petite_fast.backends.geometry import ConvGeometry, make_geometry, pad_input, unpad_gradient
from petite_fast.ops import adapted, dispatch, library

# Cost of the two weight gradients in multiply-adds per input channel and voxel, measured with
# bench/run.py: libraries compute 16 channels at a time, and G and dB are bound by reading grad_y,
# which costs about as much as PASS_COST multiply-adds per output channel.
RANK_TILE = 16
PASS_COST = 8
# The same for the native kernel, which does t and dA together and goes through x and grad_y once.
NATIVE_COST = 3
NATIVE_PASS_COST = 30
# Up to so many outputs (in bfloat16) and inputs the native kernel beats a library that computes 16
# outputs at a time. Measured on 1 to 256 channels: 1.1 to 10 times; 0.8 times on 256.
NARROW = 8
NARROW_BFLOAT16 = 4
NARROW_INPUTS = 128


def adapted_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scale: float = 1.0,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """One convolution with the adapters folded into its weight and bias.

    ``y = conv(x, W_eff, b_eff)``, ``W_eff = gamma * (W + scale * B.A)``,
    ``b_eff = gamma * b + beta``, ``(B.A)[o] = sum_q B[o, q] A[q]``.

    Kept for backward, besides the parameters (one unit = one x):

    ======================  =========================================================
    what requires grad      kept
    ======================  =========================================================
    nothing, bias or beta   no activation
    lora_B only (LoRA-FA)   t = A*x (r channels per group), or x where that is smaller
    lora_A (and lora_B)     x
    gamma only              y; x where gamma is near 0
    weight, or gamma + A/B  x
    ======================  =========================================================

    W_eff is rebuilt in backward, in float32 (float64 for float64), rounded once to the dtype of
    x. Under autocast x and W_eff have the autocast dtype. Differentiable once.

    Args:
        x: [N, C, D, H, W] or [C, D, H, W], contiguous or channels_last_3d.
        weight: [O, C/groups, kD, kH, kW]; transposed [C, O/groups, kD, kH, kW].
        bias: [O].
        lora_A: [r, C/groups, kD, kH, kW], shared by all groups; transposed [r, C, 1, 1, 1].
        lora_B: [O, r]; transposed [r, O/groups, kD, kH, kW], shared by all groups.
        scale: lora_alpha / r.
        gamma: [O], SSF scale.
        beta: [O], SSF shift.
        stride: int or three ints.
        padding: int, three ints, "same" or "valid".
        dilation: int or three ints.
        groups: channels are split into that many independent groups.
        transposed: transposed convolution.
        output_padding: of the transposed convolution.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        y [N, O, D', H', W'], in the memory format torch's own convolution would give.

    Raises:
        ValueError: shapes that do not fit together; name, got and wanted are in the text.
        TypeError: x and weight of different dtypes without autocast.
        RuntimeError: a second derivative is asked for.

    Source: LoRA (Hu et al. 2021), LoRA-FA (Zhang et al. 2023), SSF (Lian et al. 2022).
    """
    tensors = (x, weight, bias, lora_A, lora_B, gamma, beta)
    if has_torch_function(tensors):
        return handle_torch_function(
            adapted_conv, tensors, x, weight, bias, lora_A=lora_A, lora_B=lora_B, scale=scale,
            gamma=gamma, beta=beta, stride=stride, padding=padding, dilation=dilation,
            groups=groups, transposed=transposed, output_padding=output_padding,
            padding_mode=padding_mode,
        )  # fmt: skip
    if weight.dim() != 5:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted five dimensions")
    if x.dim() == 4:
        x, batched = x.unsqueeze(0), False
    else:
        batched = True
    geometry = make_geometry(
        weight.shape[2:], stride, padding, dilation, groups, transposed, output_padding,
        padding_mode,
    )  # fmt: skip
    _check(geometry, x, weight, bias, lora_A, lora_B, gamma, beta)
    y = adapted.apply(ConvMap(geometry), x, weight, bias, lora_A, lora_B, scale, gamma, beta)
    return y if batched else y.squeeze(0)


def _check(
    geometry: ConvGeometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
) -> None:
    groups = geometry.groups
    first, second, *kernel = weight.shape
    inputs = first if geometry.transposed else second * groups
    outputs = second * groups if geometry.transposed else first
    if first % groups:
        raise ValueError(f"weight: got {first} rows, wanted a multiple of groups = {groups}")
    if x.dim() != 5 or x.shape[1] != inputs:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [N, {inputs}, D, H, W]")
    for name, vector in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if vector is not None and tuple(vector.shape) != (outputs,):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, wanted ({outputs},)")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B: got one of them, wanted both or neither")
    if lora_A is None or lora_B is None:
        return
    r = lora_A.shape[0]
    wanted_a: tuple[int, ...] = (r, second, *kernel)
    wanted_b: tuple[int, ...] = (outputs, r)
    if geometry.transposed:
        wanted_a, wanted_b = (r, first, 1, 1, 1), (r, second, *kernel)
    for name, tensor, wanted in (("lora_A", lora_A, wanted_a), ("lora_B", lora_B, wanted_b)):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")


@dataclass(frozen=True)
class ConvMap:
    """`adapted.Map` of a convolution; low-rank space = r channels per group."""

    geometry: ConvGeometry

    @property
    def groups(self) -> int:
        """Independent channel groups."""
        return self.geometry.groups

    @property
    def transposed(self) -> bool:
        """Whether the map is a transposed convolution."""
        return self.geometry.transposed

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """y = conv(pad(x), weight, bias)."""
        g = self.geometry
        if bias is None and self._is_narrow(x, weight.shape):
            return library.low_rank_input(pad_input(x, g), weight, g.stride, g.padding)
        return library.conv(
            pad_input(x, g), weight, bias, g.stride, g.padding, g.dilation, g.transposed,
            g.output_padding, g.groups,
        )  # fmt: skip

    def grad_input(
        self, grad_y: torch.Tensor, weight: torch.Tensor, size: torch.Size
    ) -> torch.Tensor:
        """grad_x by the adjoint convolution; x itself is not needed."""
        g = self.geometry
        spatial = g.padded_size(size[2:])
        grad = library.conv_grad_input(
            grad_y, weight, [size[0], size[1], *spatial], g.stride, g.padding, g.dilation,
            g.transposed, g.output_padding, g.groups,
        )  # fmt: skip
        return unpad_gradient(grad, g)

    def grad_weight(
        self, grad_y: torch.Tensor, x: torch.Tensor, size: Sequence[int]
    ) -> torch.Tensor:
        """Full weight gradient; a transposed convolution's is the plain one's, roles exchanged."""
        g = self.geometry
        x = pad_input(x, g)
        if self._is_narrow(grad_y, size):
            stand_in = grad_y.new_empty(tuple(size))  # only its shape is read
            wants = (True, False, False)
            grad, _, _ = library.low_rank_gradient(
                grad_y, x, None, stand_in, None, g.stride, g.padding, *wants
            )
            return grad.to(x.dtype)
        if g.transposed:
            grad_y, x = x, grad_y
        return library.conv_grad_weight(
            grad_y, x, list(size), g.stride, g.padding, g.dilation, g.groups
        )

    def grad_bias(self, grad_y: torch.Tensor) -> torch.Tensor:
        """Sum over N, D, H, W."""
        wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
        return grad_y.sum((0, 2, 3, 4), dtype=wide)

    def low_rank_input(self, x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
        """t [N, groups*r, ...]: A applied to each group (transposed: 1x1x1, at input size)."""
        if self.transposed:
            return ConvMap(self.geometry.pointwise()).forward(x, self._split_a(lora_A), None)
        return self.forward(x, self._repeat(lora_A), None)

    def low_rank_grad_A(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """G = (gamma B)' grad_y, then the weight gradient of A with G in grad_y's place."""
        groups, r = self.groups, lora_A.shape[0]
        pointwise = ConvMap(self.geometry.pointwise())
        if self.transposed:
            b = self._scaled_b(lora_B, gamma)
            g = self.geometry
            low = library.conv(
                grad_y, b, None, g.stride, g.padding, g.dilation, False, (0, 0, 0), groups
            )
            grad = pointwise.grad_weight(low, x, self._split_a(lora_A).shape)
            return grad.view(groups, r, -1).transpose(0, 1).reshape(lora_A.shape)
        b = lora_B if gamma is None else lora_B * gamma.to(lora_B.dtype).unsqueeze(1)
        b = b.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [groups*r, O/groups]
        low = pointwise.forward(grad_y, b[..., None, None, None].contiguous(), None)
        grad = self.grad_weight(low, x, (groups * r, *lora_A.shape[1:]))
        return grad.unflatten(0, (groups, r)).sum(0)

    def low_rank_grad_B(
        self,
        grad_y: torch.Tensor,
        t: torch.Tensor,
        lora_B: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weight gradient of B with t in x's place."""
        if self.transposed:
            r = lora_B.shape[0]
            grad = self.grad_weight(grad_y, t, (self.groups * r, *lora_B.shape[1:]))
            grad = grad.unflatten(0, (self.groups, r))
            if gamma is not None:
                grad = grad * gamma.view(self.groups, 1, -1, 1, 1, 1)
            return grad.sum(0)
        pointwise = ConvMap(self.geometry.pointwise())
        grad = pointwise.grad_weight(grad_y, t, (*lora_B.shape, 1, 1, 1)).view(lora_B.shape)
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
        """In one op where there is one, else convolution by convolution."""
        both = wants.lora_A and wants.lora_B
        pointwise = x is None or self._is_pointwise(lora_A.shape)
        slow = pointwise and not both and _lies_as_matrix(grad_y)
        if slow or not self._is_fused(grad_y, lora_A):
            return adapted.composed_low_rank_gradient(
                self, grad_y, x, t, lora_A, lora_B, gamma, wants
            )
        g = self.geometry
        b = lora_B if gamma is None else lora_B * gamma.to(lora_B.dtype).unsqueeze(1)
        x = None if x is None else pad_input(x, g)
        grad_a, grad_b, grad_bias = library.low_rank_gradient(
            grad_y, x, t, lora_A, b, g.stride, g.padding, *wants
        )
        if gamma is not None and wants.lora_B:
            grad_b = grad_b * gamma.unsqueeze(1)
        return (
            grad_a if wants.lora_A else None,
            grad_b if wants.lora_B else None,
            grad_bias if wants.bias else None,
        )

    def low_rank_is_smaller(self, x: torch.Tensor, lora_A: torch.Tensor) -> bool:
        """Whether t (at output size; transposed: at input size) has fewer elements than x."""
        size: Sequence[int] = x.shape[2:]
        if not self.transposed:
            g = self.geometry
            size = g.output_size(g.padded_size(size), lora_A.shape[2:])
        return lora_A.shape[0] * self.groups * math.prod(size) < math.prod(x.shape[1:])

    def low_rank_is_faster(self, weight: torch.Tensor, r: int) -> bool:
        """Two products of (padded) rank and passes over grad_y against one product of O."""
        outputs = weight.shape[1] if self.transposed else weight.shape[0] // self.groups
        taps = math.prod(weight.shape[2:])
        native_runs = weight.device.type == "cpu" and weight.dtype in native_low_rank.DTYPES
        if native_runs and self._fits(weight.shape[2:], r) and dispatch.runs_native():
            return NATIVE_COST * r * taps + 2 * r + NATIVE_PASS_COST < outputs * taps
        padded = math.ceil(r / RANK_TILE) * RANK_TILE
        return 2 * padded * taps + PASS_COST * outputs < outputs * taps

    def _is_fused(self, x: torch.Tensor, lora_A: torch.Tensor) -> bool:
        """Whether the low-rank ops are asked: for what they have a kernel for, on some device."""
        return x.dtype in native_low_rank.DTYPES and self._fits(lora_A.shape[2:], lora_A.shape[0])

    def _is_narrow(self, x: torch.Tensor, size: Sequence[int]) -> bool:
        """Whether a weight of this size has so few rows that the low-rank ops are faster."""
        most = NARROW_BFLOAT16 if x.dtype == torch.bfloat16 else NARROW
        narrow = size[0] <= most and size[1] <= NARROW_INPUTS
        fused = x.dtype in native_low_rank.DTYPES and self._fits(size[2:], size[0])
        return narrow and fused and not (self._is_pointwise(size) and _lies_as_matrix(x))

    def _is_pointwise(self, size: Sequence[int]) -> bool:
        g = self.geometry
        return max(size[2:]) == max(g.stride) == 1 and max(g.padding) == 0

    def _fits(self, kernel: Sequence[int], r: int) -> bool:
        g = self.geometry
        plain = not g.transposed and g.groups == max(g.dilation) == 1
        return plain and native_low_rank.fits(kernel, g.stride, r)

    def _repeat(self, tensor: torch.Tensor) -> torch.Tensor:
        """[r, ...] -> [groups*r, ...], the same for every group."""
        return tensor if self.groups == 1 else tensor.repeat(self.groups, *[1] * (tensor.dim() - 1))

    def _split_a(self, lora_A: torch.Tensor) -> torch.Tensor:
        """Transposed A [r, C, 1, 1, 1] -> 1x1x1 weight [groups*r, C/groups, 1, 1, 1]."""
        split = lora_A.unflatten(1, (self.groups, -1)).transpose(0, 1)
        return split.flatten(0, 1).contiguous()

    def _scaled_b(self, lora_B: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        """Transposed B [r, O/groups, k] -> [groups*r, O/groups, k], times gamma."""
        b = self._repeat(lora_B)
        return b if gamma is None else scale_outputs(b, gamma.to(b.dtype), self.groups, True)


def _lies_as_matrix(x: torch.Tensor) -> bool:
    """Whether a 1x1x1 convolution of x is a product of matrices as they lie in memory.

    One such product is faster than the native kernel (measured: 1 to 2.5 times on 16 to 256
    channels), which gains by doing all of a backward's together (1.2 to 2 times up to 64).
    """
    return x.is_contiguous() and x.dtype == torch.float32
