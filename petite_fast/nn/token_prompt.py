"""Token prompts: learned tokens that the patch tokens of MONAI's vision transformer attend to.

MONAI is not imported: its transformer is recognised by what it is made of, and changed by changing
its class, so names, hooks and references to modules survive.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petite_fast.nn.twin import Twin


class TokenPrompt(nn.Module):
    """t learned tokens P in front of the patch tokens X of a transformer (VPT).

    Gated, the default. In every block, with h = norm1(X), p = norm1(P) and the block's own q, k, v,

        X <- X + out_proj( softmax(q_h k_h^T s) v_h + tanh(gate) softmax(q_h k_p^T s) v_p )
        P <- P + out_proj( softmax(q_p [k_p, k_h]^T s) [v_p, v_h] )                    (shallow)

    and then both go through the block's MLP. `gate` has a number per block and head and starts at
    zero, so the network starts as its base, bit for bit. The gate learns in the first step, the
    embedding from the second on. Deep prompts have an embedding for each block, which replaces P
    there, so their own way through the block need not be computed.

    Not gated is the published form: every block runs on [P, X], and P is cut off from all that the
    transformer returns. It changes the pretrained function from the start: every softmax is shared
    with the prompts. Deep prompts replace P in front of each block but the first, which has the
    first row.

    Prompts of the two forms have the same names and shapes but for `gate`: shallow `embedding`
    (1, t, C), deep (depth, t, C); `gate` (depth, heads). For 50 prompts in the published UNETR that
    is 38,400 or 460,800 numbers, and 144.

    Args:
        num_prompts: t.
        width: C, width of the tokens.
        depth: number of blocks.
        heads: attention heads of each block.
        deep: prompts of their own for every block.
        gated: False is the published form.
        bound: the embedding starts uniform in [-bound, bound].

    Raises:
        ValueError: `num_prompts` is less than 1.

    Source: Jia et al., ECCV 2022; the gate is that of LLaMA-Adapter (Zhang et al., ICLR 2024).
    """

    gate: nn.Parameter | None

    def __init__(
        self,
        num_prompts: int,
        width: int,
        depth: int,
        heads: int,
        *,
        deep: bool = False,
        gated: bool = True,
        bound: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        self.num_prompts, self.deep, self.gated = num_prompts, deep, gated
        rows = depth if deep else 1
        embedding = torch.empty(rows, num_prompts, width, device=device, dtype=dtype)
        self.embedding = nn.Parameter(embedding.uniform_(-bound, bound))
        gate = torch.zeros(depth, heads, device=device, dtype=dtype) if gated else None
        self.register_parameter("gate", None if gate is None else nn.Parameter(gate))

    def forward(self, tokens: Tensor, blocks: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens [B, N, C] through `blocks`: the last output and the output of each."""
        return self._gated(tokens, blocks) if self.gated else self._joined(tokens, blocks)

    def _at(self, row: int, batch: int) -> Tensor:
        return self.embedding[row].expand(batch, -1, -1)

    def _joined(self, tokens: Tensor, blocks: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
        hidden, t = [], self.num_prompts
        prompt = self._at(0, tokens.shape[0])
        for i, block in enumerate(blocks):
            if self.deep:
                prompt = self._at(i, tokens.shape[0])
            # Autocast may have left the two in different types.
            both = block(torch.cat([prompt.to(tokens.dtype), tokens], 1))
            prompt, tokens = both[:, :t], both[:, t:]
            hidden.append(tokens)
        return tokens, hidden

    def _gated(self, tokens: Tensor, blocks: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
        assert self.gate is not None
        hidden = []
        prompt = self._at(0, tokens.shape[0])
        for i, each in enumerate(blocks):
            if self.deep:
                prompt = self._at(i, tokens.shape[0])
            goes_on = not self.deep and i + 1 < len(blocks)
            block: Any = each
            attn = block.attn
            qp, kp, vp = _heads(attn, block.norm1(prompt))
            q, k, v = _heads(attn, block.norm1(tokens))
            own = _attend(attn, q, k, v)
            gate = self.gate[i].tanh().to(own.dtype)[:, None, None]
            tokens = _rest(block, tokens, own + gate * _attend(attn, q, kp, vp))
            if goes_on:
                y = _attend(attn, qp, torch.cat([kp, k], 2), torch.cat([vp, v], 2))
                prompt = _rest(block, prompt, y)
            hidden.append(tokens)
        return tokens, hidden

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return (
            f"{self.num_prompts} prompts, width={self.embedding.shape[2]}, "
            f"deep={self.deep}, gated={self.gated}"
        )


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, heads, N, C / heads] of tokens [B, N, C]."""
    q, k, v = attn.input_rearrange(attn.qkv(x)).unbind(0)
    return q, k, v


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T scale) v by the sums that `attn` itself would use."""
    if attn.use_flash_attention:
        dropout = attn.drop_weights.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)
    weights = torch.einsum("blxd,blyd->blxy", q, k) * attn.scale
    return torch.einsum("bhxy,bhyd->bhxd", attn.drop_weights(weights.softmax(-1)), v)


def _rest(block: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a block does after its attention y [B, heads, N, C / heads], with its input x."""
    attn = block.attn
    x = x + attn.drop_output(attn.out_proj(attn.out_rearrange(y)))
    return x + block.mlp(block.norm2(x))


class _PromptedTwin(Twin):
    """In front of the class of a ViT: its forward, with prompts."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, C0, X, Y, Z] -> (tokens [B, N, C], hidden states), patch tokens only."""
        vit = cast(Any, self)
        tokens, hidden = vit.prompt(vit.patch_embedding(x), vit.blocks)
        return vit.norm(tokens), hidden


def make_prompt_for(
    vit: nn.Module, num_prompts: int, *, deep: bool = False, gated: bool = True
) -> TokenPrompt:
    """Prompts that fit MONAI's `vit`, on its device, in its dtype.

    They start uniform in +-sqrt(6 / (3 n + C)), n the numbers in one patch, as published. MONAI's
    `save_attn` saves nothing while gated prompts are in.

    Args:
        vit: a `monai.networks.nets.ViT` without class token.
        num_prompts: t.
        deep: prompts of their own for every block.
        gated: False is the published form.

    Raises:
        ValueError: `num_prompts` is less than 1, or `vit` has a class token.
    """
    net = cast(Any, vit)
    if hasattr(net, "cls_token"):
        raise ValueError(
            "token prompts go into a ViT whose tokens are all patches, got one with a class token "
            "(classification=True)"
        )
    like = net.patch_embedding.position_embeddings
    width = like.shape[2]
    return TokenPrompt(
        num_prompts,
        width,
        len(net.blocks),
        net.blocks[0].attn.num_heads,
        deep=deep,
        gated=gated,
        bound=(6 / (3 * net.patch_embedding.patch_dim + width)) ** 0.5,
        device=like.device,
        dtype=like.dtype,
    )


def convert_(vit: nn.Module, prompt: TokenPrompt) -> None:
    """Put `prompt` into `vit`, in place: it becomes `vit.prompt`, and the ViT reads it.

    Raises:
        ValueError: `vit` has prompts already.
    """
    if isinstance(vit, _PromptedTwin):
        raise ValueError("vit has token prompts already: release_ takes them out")
    _PromptedTwin.become_(vit)
    vit.prompt = prompt


def release_(vit: nn.Module) -> TokenPrompt:
    """Undo `convert_`: `vit` has its own class again, and the prompt is returned.

    Raises:
        ValueError: `vit` has no token prompts.
    """
    net = cast(Any, vit)
    if not isinstance(vit, _PromptedTwin):
        raise ValueError(f"vit has no token prompts, got a {type(vit).__name__}")
    prompt: TokenPrompt = net.prompt
    del net.prompt
    vit.leave_()
    return prompt
