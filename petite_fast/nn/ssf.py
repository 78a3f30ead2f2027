"""Scale and shift of features (SSF, Lian et al., NeurIPS 2022), alone or folded into a layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn.adapted import AdaptedLayer
from petite_fast.nn.frozen import conv_arguments, freeze, output_padding, require_type
from petite_fast.nn.norm import FixedBatchNorm3d, require_statistics
from petite_fast.ops import adapted_conv, adapted_linear, effective_weight
from petite_fast.ops.library import autocast_on
from petite_fast.ops.scale_shift import scale_shift


class ScaleShift(nn.Module):
    """y = gamma * x + beta, one pair per channel; gamma = 1 and beta = 0 make it the identity.

    Args:
        channels: C, number of channels.
        channel_dim: 1 for volumes [N, C, ...], -1 for tokens [..., C].

    Raises:
        ValueError: `channel_dim` is neither 1 nor -1, or `channels` is less than 1.
    """

    def __init__(
        self,
        channels: int,
        channel_dim: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim: got {channel_dim!r}, wanted 1 or -1")
        if channels < 1:
            raise ValueError(f"channels: got {channels!r}, wanted a positive int")
        self.channel_dim = channel_dim
        self.gamma = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return scale_shift(x, self.gamma, self.beta, self.channel_dim)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"{self.gamma.numel()}, channel_dim={self.channel_dim}"


class SSFLayer(AdaptedLayer):
    """A torch layer with a scale and a shift per output channel: a mixin in front of it.

        y = ssf_scale * layer(x) + ssf_shift

    computed as the layer itself with another weight and bias, so it costs no pass of its own.
    Weight and bias of the layer are frozen (the bias may train: BitFit); the scale starts at one
    and the shift at zero, so the layer starts as the one it replaces.

    Attributes:
        ssf_scale, ssf_shift: (output channels,), at least float32.
    """

    adapter_parameters: ClassVar[tuple[str, ...]] = ("ssf_scale", "ssf_shift")
    channels_attribute: ClassVar[str]
    """Name of the torch layer's attribute that holds its number of output channels."""

    ssf_scale: nn.Parameter
    ssf_shift: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        freeze(self)
        self._add_ssf(self._channels(self))

    @classmethod
    def convert_(
        cls,
        module: nn.Module,
        scale: nn.Parameter | None = None,
        shift: nn.Parameter | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Turn `module` itself into this class: its name, hooks and every reference to it stay.

        Args:
            module: the torch layer that this class replaces.
            scale, shift: parameters to share with another layer; None makes new ones.
            device, dtype: of new ones; by default those of the layer, at least float32, and torch's
                defaults for a norm that has no tensors.

        Raises:
            TypeError: `module` is not exactly of that class.
            ValueError: it has no single channel axis, or no running statistics, or `scale` or
                `shift` does not have its number of channels.
        """
        require_type(module, cls.torch_class, f"{cls.__name__}.convert_")
        channels = cls._channels(module)
        for name, given in (("scale", scale), ("shift", shift)):
            if given is not None and tuple(given.shape) != (channels,):
                raise ValueError(f"{name}: got shape {tuple(given.shape)}, wanted ({channels},)")
        module.__class__ = cls
        freeze(module)
        module._add_ssf(channels, scale, shift, device, dtype)  # type: ignore[operator]
        return module

    @classmethod
    def _channels(cls, module: Any) -> int:
        return int(getattr(module, cls.channels_attribute))

    def _add_ssf(
        self,
        channels: int,
        scale: nn.Parameter | None = None,
        shift: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        like = next((t for t in (self.weight, *self.buffers()) if t is not None), torch.empty(0))
        options: dict[str, Any] = {
            "device": like.device if device is None else device,
            "dtype": torch.promote_types(like.dtype, torch.float32) if dtype is None else dtype,
        }
        self.ssf_scale = nn.Parameter(torch.ones(channels, **options)) if scale is None else scale
        self.ssf_shift = nn.Parameter(torch.zeros(channels, **options)) if shift is None else shift

    def _shifted(self) -> Tensor:
        """scale * bias + shift."""
        return self.ssf_shift if self.bias is None else self.ssf_scale * self.bias + self.ssf_shift


class _SSFMap(SSFLayer):
    """Convolutions and linear layers: the pair is gamma and beta of the op."""

    def _ssf(self) -> dict[str, Any]:
        """Keywords of the op."""
        return {} if self.is_folded else {"gamma": self.ssf_scale, "beta": self.ssf_shift}

    def _folded_values(self) -> dict[str, Tensor]:
        weight = effective_weight(
            self.weight,
            gamma=self.ssf_scale,
            groups=getattr(self, "groups", 1),
            transposed=isinstance(self, nn.ConvTranspose3d),
        )
        return {"weight": weight, "bias": self._shifted().to(weight.dtype, copy=True)}


class SSFConv3d(_SSFMap, nn.Conv3d):
    """`torch.nn.Conv3d` with SSF: y = conv(x, scale * W, scale * b + shift).

    Keeps y for the backward pass, which the next layer keeps anyway, or x where a scale is near 0.
    Args: those of torch.nn.Conv3d.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Conv3d
    channels_attribute: ClassVar[str] = "out_channels"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        return adapted_conv(x, self.weight, self.bias, **self._ssf(), **conv_arguments(self))


class SSFConvTranspose3d(_SSFMap, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with SSF; the transposed SSFConv3d."""

    torch_class: ClassVar[type[nn.Module]] = nn.ConvTranspose3d
    channels_attribute: ClassVar[str] = "out_channels"

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']; `output_size` as in torch.nn.ConvTranspose3d."""
        return adapted_conv(
            x,
            self.weight,
            self.bias,
            **self._ssf(),
            transposed=True,
            output_padding=output_padding(self, x, output_size),
            **conv_arguments(self),
        )


class SSFLinear(_SSFMap, nn.Linear):
    """`torch.nn.Linear` with SSF: y = x (scale * W)^T + scale * b + shift.

    Keeps y or x as SSFConv3d does. Args: those of torch.nn.Linear.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Linear
    channels_attribute: ClassVar[str] = "out_features"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return adapted_linear(x, self.weight, self.bias, **self._ssf())


class _SSFNorm(SSFLayer):
    """Norms: their own weight and bias take the pair up, or the pair is their weight and bias."""

    affine_attribute: ClassVar[str] = "affine"

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """scale * weight and scale * bias + shift, rounded once to the dtype the norm computes in.

        That is the own weight's, as in torch's layer. Without one it is the dtype of x, unless
        autocast made x narrow.
        """
        own = self.weight if self._base is None else self._base["weight"]
        weight, bias = (self.weight, self.bias) if self.is_folded else self._values()
        if own is not None:
            return weight.to(own.dtype), bias.to(own.dtype)
        dtype, kind = x.dtype, x.device.type
        if autocast_on(kind):
            dtype = torch.promote_types(dtype, torch.float32)
        return weight.to(dtype), bias.to(dtype)

    def _values(self) -> tuple[Tensor, Tensor]:
        scale = self.ssf_scale
        return scale if self.weight is None else scale * self.weight, self._shifted()

    def _folded_values(self) -> dict[str, Tensor]:
        weight, bias = self._values()
        dtype = weight.dtype if self.weight is None else self.weight.dtype
        return {"weight": weight.to(dtype, copy=True), "bias": bias.to(dtype, copy=True)}

    def fold_(self) -> None:
        """As in AdaptedLayer; a norm without weight and bias gets them."""
        super().fold_()
        setattr(self, self.affine_attribute, self.weight is not None)

    def unfold_(self) -> None:
        """As in AdaptedLayer."""
        super().unfold_()
        setattr(self, self.affine_attribute, self.weight is not None)


class SSFLayerNorm(_SSFNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis with SSF. Args: those of torch.nn.LayerNorm.

    Raises:
        ValueError: `normalized_shape` has more than one axis.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.LayerNorm
    affine_attribute: ClassVar[str] = "elementwise_affine"

    @classmethod
    def _channels(cls, module: Any) -> int:
        shape = tuple(module.normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"normalized_shape: got {shape}, wanted one axis, the channels")
        return int(shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.layer_norm(x, self.normalized_shape, *self._affine(x), self.eps)


class SSFInstanceNorm3d(_SSFNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with SSF. Args: those of torch.nn.InstanceNorm3d."""

    torch_class: ClassVar[type[nn.Module]] = nn.InstanceNorm3d
    channels_attribute: ClassVar[str] = "num_features"

    def _apply_instance_norm(self, x: Tensor) -> Tensor:
        # What torch's forward calls, on [N, C, D, H, W].
        return F.instance_norm(
            x,
            self.running_mean,
            self.running_var,
            *self._affine(x),
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class SSFBatchNorm3d(_SSFNorm, FixedBatchNorm3d):
    """`torch.nn.BatchNorm3d` with SSF that always uses its running statistics.

    Keeps x for the backward pass. Args: those of torch.nn.BatchNorm3d.

    Raises:
        ValueError: ``track_running_stats=False``: there are no statistics to use.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.BatchNorm3d
    channels_attribute: ClassVar[str] = "num_features"

    @classmethod
    def _channels(cls, module: Any) -> int:
        require_statistics(module)
        return super()._channels(module)

    def _add_ssf(self, *args: Any) -> None:
        super()._add_ssf(*args)
        self.training = False


class SSFGroupNorm(_SSFNorm, nn.GroupNorm):
    """`torch.nn.GroupNorm` with SSF. Args: those of torch.nn.GroupNorm."""

    torch_class: ClassVar[type[nn.Module]] = nn.GroupNorm
    channels_attribute: ClassVar[str] = "num_channels"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        return F.group_norm(x, self.num_groups, *self._affine(x), self.eps)
