"""BatchNorm of a frozen network: the running statistics are constants."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from petite_fast.nn.frozen import freeze, require_type
from petite_fast.ops import frozen_batch_norm


class FixedBatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that always uses, and never updates, its running statistics.

        y = weight (x - running_mean) / sqrt(running_var + eps) + bias

    `train()` leaves it in evaluation mode.

    Raises:
        ValueError: ``track_running_stats=False``: there are no statistics to use.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_statistics(self)
        self.training = False

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode, whatever `mode`."""
        return super().train(False)

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias for the norm of x."""
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, C, D, H, W]."""
        self._check_input_dim(x)
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        weight, bias = self._affine(x)
        return frozen_batch_norm(x, mean, var, weight, bias, self.eps)


class FrozenBatchNorm3d(FixedBatchNorm3d):
    """`torch.nn.BatchNorm3d` of a frozen network: statistics, weight and bias are constants.

    Same parameters, buffers and state-dict names. Weight and bias start with ``requires_grad =
    False``; the bias may train (BitFit).

    Raises:
        ValueError: ``track_running_stats=False``: there are no statistics to freeze.
    """

    torch_class: ClassVar[type[nn.Module]] = nn.BatchNorm3d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        freeze(self)

    @classmethod
    def from_bn(cls, bn: nn.BatchNorm3d) -> FrozenBatchNorm3d:
        """A frozen layer that shares the parameters, which freeze with it, and the buffers of `bn`.

        Raises:
            ValueError: `bn` has no running statistics.
        """
        require_statistics(bn)
        new = cls(bn.num_features, bn.eps, bn.momentum, bn.affine, device="meta")
        new.weight, new.bias = bn.weight, bn.bias
        new.running_mean, new.running_var = bn.running_mean, bn.running_var
        new.num_batches_tracked = bn.num_batches_tracked
        return freeze(new)

    @classmethod
    def convert_(cls, bn: nn.BatchNorm3d) -> FrozenBatchNorm3d:
        """Turn `bn` itself into this class: its name, hooks and every reference to it stay.

        Raises:
            TypeError: `bn` is not exactly a torch.nn.BatchNorm3d.
            ValueError: `bn` has no running statistics.
        """
        require_type(bn, nn.BatchNorm3d, f"{cls.__name__}.convert_")
        require_statistics(bn)
        bn.__class__ = cls
        bn.training = False
        return cast(FrozenBatchNorm3d, freeze(bn))


def require_statistics(bn: nn.BatchNorm3d) -> None:
    """Refuse a BatchNorm that has no running statistics.

    Raises:
        ValueError: it was made with ``track_running_stats=False``.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            f"{type(bn).__name__}: got track_running_stats=False, wanted running statistics to use"
        )
