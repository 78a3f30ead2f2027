"""Residual blocks of MONAI and nnU-Net whose end is one op: out = act(norm(z) + residual).

PyTorch keeps the input of the norm and of the activation. Here the block's output is kept, from
which the norm's value is got back by taking the residual away, and both are kept anyway: the one by
the next block, the other by the layers that made it.

The libraries are not imported: a block is recognised by the name of its class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from petite_fast.nn.lean import LEAN_LAYERS, RecomputedTwin, fused, is_activation, is_norm
from petite_fast.nn.lean_attention import LeanSwinBlockTwin, LeanWindowAttentionTwin
from petite_fast.nn.lora import LoRALayer
from petite_fast.nn.twin import Twin
from petite_fast.ops import concatenate, recomputed


class LeanUnetBasicBlockTwin(Twin):
    """MONAI's UnetBasicBlock: act(norm2(conv2(act(norm1(conv1(x))))))."""

    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    lrelu: nn.Module

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether the parts are those that can be fused."""
        norms = [m for n, m in block.named_children() if n.startswith("norm")]
        return all(map(is_norm, norms)) and is_activation(block.lrelu)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        return fused(self.norm2, self._inner(x), self.lrelu)

    def _inner(self, x: Tensor) -> Tensor:
        return self.conv2(fused(self.norm1, self.conv1(x), self.lrelu))


class LeanUnetResBlockTwin(LeanUnetBasicBlockTwin):
    """MONAI's UnetResBlock: the same with norm3(conv3(x)), or x itself, added in front of act."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        residual = x
        if hasattr(self, "conv3"):
            residual = _shortcut(self._beside, x, self.conv1, [self.conv3, self.norm3])
        return fused(self.norm2, self._inner(x), self.lrelu, residual=residual)

    def _beside(self, x: Tensor) -> Tensor:
        return self.norm3(self.conv3(x))


class LeanBasicBlockDTwin(Twin):
    """nnU-Net's BasicBlockD: act(norm(conv2(conv1(x))) + skip(x))."""

    conv1: nn.Module
    conv2: Any
    skip: Any
    nonlin2: nn.Module

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether nothing but a norm stands between conv2 and the sum."""
        tail = list(block.conv2.all_modules)
        return (
            len(tail) == 2
            and is_norm(tail[1])
            and is_activation(block.nonlin2)
            and not block.apply_stochastic_depth
            and not block.apply_se
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, O, D', H', W']."""
        conv, norm = self.conv2.all_modules
        residual = x
        if isinstance(self.skip, nn.Module):
            residual = _shortcut(self.skip, x, self.conv1, [self.skip])
        return fused(norm, conv(self.conv1(x)), self.nonlin2, residual=residual)


def _shortcut(function: Any, x: Tensor, first: nn.Module, modules: list[nn.Module]) -> Tensor:
    """The 1x1x1 convolution beside a block: computed again in backward where x is kept anyway.

    Args:
        function: runs `modules`.
        x: the block's input.
        first: the block's first convolution; with LoRA it keeps x.
        modules: what `function` is made of.
    """
    keeps_x = any(
        isinstance(layer, LoRALayer) and layer.lora_A.requires_grad for layer in first.modules()
    )
    draws = any(isinstance(m, _DropoutNd) and m.training for p in modules for m in p.modules())
    if not keeps_x or draws:
        return function(x)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    return recomputed(function, x, trained)


class LeanSkipConnectionTwin(Twin):
    """MONAI's SkipConnection: [x, submodule(x)]; who keeps that keeps the two, not a copy."""

    submodule: nn.Module
    dim: int

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether it concatenates."""
        return block.mode == "cat"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, C + O, D, H, W]."""
        return concatenate([x, self.submodule(x)], self.dim)


class LeanUpBlockTwin(Twin):
    """MONAI's UnetrUpBlock and UnetUpBlock: conv_block([transp_conv(x), skip])."""

    transp_conv: nn.Module
    conv_block: nn.Module

    @staticmethod
    def fits(block: Any) -> bool:
        """Always."""
        return True

    def forward(self, inp: Tensor, skip: Tensor) -> Tensor:
        """[N, C, D, H, W] and the skip [N, O, 2D, 2H, 2W] -> [N, O, 2D, 2H, 2W]."""
        return self.conv_block(concatenate([self.transp_conv(inp), skip], 1))


_DYNUNET = "monai.networks.blocks.dynunet_block"
_RESIDUAL = "dynamic_network_architectures.building_blocks.residual"
BLOCKS: dict[str, Any] = {
    f"{_DYNUNET}.UnetBasicBlock": LeanUnetBasicBlockTwin,
    f"{_DYNUNET}.UnetResBlock": LeanUnetResBlockTwin,
    f"{_DYNUNET}.UnetUpBlock": LeanUpBlockTwin,
    "monai.networks.blocks.unetr_block.UnetrUpBlock": LeanUpBlockTwin,
    "monai.networks.layers.simplelayers.SkipConnection": LeanSkipConnectionTwin,
    f"{_RESIDUAL}.BasicBlockD": LeanBasicBlockDTwin,
    "monai.networks.nets.swin_unetr.SwinTransformerBlock": LeanSwinBlockTwin,
    "monai.networks.nets.swin_unetr.WindowAttention": LeanWindowAttentionTwin,
}
MLPS = {"petite_fast.models.cvt.Mlp", "monai.networks.blocks.mlp.MLPBlock"}
# Norms whose output nobody writes to in these blocks: they may keep it.
_NORMS: dict[str, tuple[str, ...]] = {
    "petite_fast.models.cvt.Block": ("norm1", "norm2"),
    "petite_fast.models.cvt.PatchEmbed": ("norm",),
    "monai.networks.blocks.transformerblock.TransformerBlock": ("norm1", "norm2"),
    "monai.networks.nets.swin_unetr.SwinTransformerBlock": ("norm1", "norm2"),
    f"{_DYNUNET}.UnetResBlock": ("norm3",),
}


def lean_norms(module: nn.Module) -> list[str]:
    """Names of children of this block that are norms and may become lean by themselves."""
    found = _NORMS.get(_class_name(module), ())
    return [name for name in found if type(getattr(module, name, None)) in LEAN_LAYERS]


def lean_block(module: nn.Module) -> type[Twin] | None:
    """The mixin that makes this block lean; None when there is none, or its parts do not fit."""
    name = _class_name(module)
    if name in MLPS:
        return RecomputedTwin
    twin = BLOCKS.get(name)
    return twin if twin is not None and twin.fits(module) else None


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
