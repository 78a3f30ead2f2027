"""Frozen convolutions: torch's own layers that keep no activation for the backward pass."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from petite_fast.ops.adapted_conv import adapted_conv

_Conv = TypeVar("_Conv", bound=nn.Conv3d | nn.ConvTranspose3d)
_Module = TypeVar("_Module", bound=nn.Module)


def conv_arguments(conv: nn.Conv3d | nn.ConvTranspose3d) -> dict[str, Any]:
    """The geometry of `conv` as keywords of `ops.adapted_conv`, output padding aside."""
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }


def output_padding(
    conv: nn.ConvTranspose3d, x: Tensor, output_size: list[int] | None
) -> list[int] | tuple[int, ...]:
    """Output padding that gives `output_size` (None: the layer's own)."""
    return conv._output_padding(
        x,
        output_size,
        list(conv.stride),
        list(conv.padding),  # type: ignore[arg-type]  # a string only in plain convolutions
        list(conv.kernel_size),
        3,
        list(conv.dilation),
    )


def conv_like(conv: nn.Conv3d | nn.ConvTranspose3d, cls: type[_Conv]) -> _Conv:
    """A new `cls` with the geometry of `conv` that shares its weight and bias."""
    arguments = conv_arguments(conv) | {"bias": conv.bias is not None, "device": "meta"}
    if isinstance(conv, nn.ConvTranspose3d):
        arguments["output_padding"] = conv.output_padding
    new = cls(conv.in_channels, conv.out_channels, conv.kernel_size, **arguments)  # type: ignore[arg-type]
    new.weight, new.bias = conv.weight, conv.bias
    return cast(_Conv, new.train(conv.training))


def freeze(module: _Module) -> _Module:
    """Every parameter of `module` gets ``requires_grad = False``."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def require_type(module: nn.Module, torch_class: type[nn.Module], caller: str) -> None:
    """Refuse to change the class of anything but the very torch layer that `caller` replaces.

    Raises:
        TypeError: `module` is of another class; a subclass has a forward of its own.
    """
    if type(module) is not torch_class:
        raise TypeError(
            f"{caller}: got {type(module).__name__}, wanted a plain torch.nn.{torch_class.__name__}"
        )


class FrozenConv3d(nn.Conv3d):
    """`torch.nn.Conv3d` whose weight does not train, y = conv(x, W, b).

    Same constructor, parameters and state-dict names. It keeps nothing of x for the backward pass;
    grad_x is made from grad_y and W. Weight and bias start with ``requires_grad = False``; with
    ``bias.requires_grad = True`` it is BitFit, and still keeps nothing.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.Conv3d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        freeze(self)

    @classmethod
    def from_conv(cls, conv: nn.Conv3d) -> FrozenConv3d:
        """A frozen layer that shares the weight and bias of `conv`, which are frozen with it."""
        return freeze(conv_like(conv, cls))

    @classmethod
    def convert_(cls, conv: nn.Conv3d) -> FrozenConv3d:
        """Turn `conv` itself into this class: its name, hooks and every reference to it stay.

        Raises:
            TypeError: `conv` is not exactly a torch.nn.Conv3d.
        """
        require_type(conv, nn.Conv3d, f"{cls.__name__}.convert_")
        conv.__class__ = cls
        return freeze(cast(Any, conv))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        return adapted_conv(x, self.weight, self.bias, **conv_arguments(self))


class FrozenConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` whose weight does not train; the transposed FrozenConv3d."""

    torch_class: ClassVar[type[nn.Module]] = nn.ConvTranspose3d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        freeze(self)

    @classmethod
    def from_conv(cls, conv: nn.ConvTranspose3d) -> FrozenConvTranspose3d:
        """A frozen layer that shares the weight and bias of `conv`, which are frozen with it."""
        return freeze(conv_like(conv, cls))

    @classmethod
    def convert_(cls, conv: nn.ConvTranspose3d) -> FrozenConvTranspose3d:
        """Turn `conv` itself into this class: its name, hooks and every reference to it stay.

        Raises:
            TypeError: `conv` is not exactly a torch.nn.ConvTranspose3d.
        """
        require_type(conv, nn.ConvTranspose3d, f"{cls.__name__}.convert_")
        conv.__class__ = cls
        return freeze(cast(Any, conv))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']; `output_size` as in torch.nn.ConvTranspose3d."""
        return adapted_conv(
            x,
            self.weight,
            self.bias,
            transposed=True,
            output_padding=output_padding(self, x, output_size),
            **conv_arguments(self),
        )
