"""Fine-tuned tensors of the published PETITE code: put into our networks where they fit.

A published file holds the tensors that trained, under the names of that code's own networks
(`petite_fast.models.published.read_published` reads it). What is known of them:

    names                                            what it becomes here
    *.adapter_{downsample,upsample}.{weight,bias}    bottleneck adapters behind the MLPs
    *.ssf_{scale,shift}_{1,2}                        SSF in the layer whose output they scale
    *.bias; *.norm*.{weight,bias}                    BitFit; layer norms
    *.conv_proj_{q,k,v}.conv.lora_{A,B}              CVT-GAN: LoRA of rank 27, see below
    *.attn.qkv.lora_{A,B}                            UNETR: LoRA on query and key
    vit.prompt_embeddings, vit.deep_prompt_...       UNETR: token prompts without a gate

The published LoRA of a depthwise 3x3x3 kernel is one matrix product B.A (9, 3r) (3r, 3C) whose
numbers are read as the kernel (C, 1, 3, 3, 3): that is no sum of r kernels. Any such kernel is a
LoRA of rank 27, with A the 27 unit kernels and B the numbers themselves, and so it is taken over.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petite_fast.errors import InputError
from petite_fast.peft.config import (
    AdapterConfig,
    AnyConfig,
    BitFitConfig,
    LayerNormConfig,
    LoraConfig,
    MethodConfig,
    MixConfig,
    PromptConfig,
    SSFConfig,
)
from petite_fast.peft.model import PeftModel, get_peft_model
from petite_fast.peft.networks import is_monai_vit, parts

_log = logging.getLogger("petite_fast")
_ADAPTER = re.compile(r"(.*\.blocks\.\d+)\.adapter_(down|up)sample\.(weight|bias)")
_SSF = re.compile(r"(.+)\.ssf_(scale|shift)(?:_([12]))?")
_LORA = re.compile(r"(.+)\.lora_([AB])")
_PROMPT = re.compile(r"(?:.*\.)?(deep_)?prompt_embeddings[12]?")
# UNETR with LoRA has a LoRA for q and k apart as well, which its forward never uses.
_NEVER_USED = re.compile(r".*\.attn\.[qkv]\.lora_[AB]")

# {last name of the owner ("N" for a number): layers of pair 1, layers of pair 2}. In UNETR's blocks
# pair 1 is applied behind both norms, and pair 2 never.
_CVTGAN_SSF: dict[str, tuple[list[str], list[str]]] = {
    "patch_embed": (["proj"], ["norm"]),
    "N": (["norm1"], ["norm2"]),
    "attn": (["proj_q", "proj_k", "proj_v"], ["proj"]),
    "mlp": (["fc1"], ["fc2"]),
}
_UNETR_SSF: dict[str, tuple[list[str], list[str]]] = {
    "patch_embedding": (["patch_embeddings.1"], []),
    "vit": (["norm"], []),
    "N": (["norm1", "norm2"], []),
    "attn": (["qkv"], ["out_proj"]),
    "mlp": (["linear1"], ["linear2"]),
    "conv_block": (["norm1"], ["norm2"]),
}


@dataclass
class _Found:
    """What a file holds, in our terms."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """{name in the adapted network: value}."""
    modules: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """{method: modules it adapts}."""
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """{method: what its config needs beside its modules}."""
    biases: bool = False

    def add(self, method: str, module: str, values: Mapping[str, Tensor], **settings: Any) -> None:
        """Note one adapted module; all modules of a method have the same settings."""
        known = self.settings[method]
        for key, value in settings.items():
            if known.setdefault(key, value) != value:
                raise InputError(
                    f"{module} has {key} {value}, expected {known[key]} as in the modules before it"
                )
        self.modules[method].append(module)
        self.values |= {f"{module}.{leaf}": value for leaf, value in values.items()}


def published_adapter(
    net: nn.Module, state: Mapping[str, Tensor], *, lora_alpha: float = 16
) -> PeftModel:
    """Adapt `net` as a published file says and give it the file's values.

    The result computes what the published network was meant to: where that code departs from its
    own method (SSF in CVT-GAN, which skipped the MLPs; deep prompts in UNETR, which had a norm
    behind every block), the logger "petite_fast" says so.

    Args:
        net: the base network, with the published weights; adapted in place. CVT-GAN's generator or
            discriminator, or a UNETR.
        state: the file's tensors for this network.
        lora_alpha: numerator of the LoRA scale, which the files do not hold.

    Raises:
        InputError: a tensor that has no equivalent here, or does not fit `net`; channel prompts,
            whose network is another function. `net` is then as it was.
        ValueError: `net` has adapters already.
    """
    found = _read(net, state, lora_alpha)
    model = get_peft_model(net, _config(net, found))
    expected = model._tensors()
    shared = {a for names in model._peft.injection.aliases.values() for a in names}
    try:
        _check(found.values, expected, shared)
    except InputError:
        model._leave(merge=False)
        raise
    model._write(found.values)
    return model


def _read(net: nn.Module, state: Mapping[str, Tensor], lora_alpha: float) -> _Found:
    unused = parts(net).unused
    left = {
        name: value
        for name, value in state.items()
        if not _NEVER_USED.fullmatch(name) and not (unused and re.match(unused, name))
    }
    if not left or not all(isinstance(value, Tensor) for value in left.values()):
        raise InputError(
            "the published file holds no tensors of an adapter for this network, or other things"
        )
    found = _Found()
    for take in (_prompts, _adapters, _ssf):
        take(net, left, found)
    _lora(net, left, found, lora_alpha)
    _own_parameters(net, left, found)
    return found


def _prompts(net: nn.Module, left: dict[str, Tensor], found: _Found) -> None:
    names = [name for name in left if _PROMPT.fullmatch(name)]
    if not names:
        return
    shallow, deep = "vit.prompt_embeddings", "vit.deep_prompt_embeddings"
    if not is_monai_vit(getattr(net, "vit", net)) or shallow not in names:
        raise InputError(
            f"{names[0]} holds channel prompts: they widen every layer of their stage by channels "
            "with random frozen weights, which the file does not hold, so the network with them "
            "computes another function than this one"
        )
    embedding = left.pop(shallow)
    is_deep = deep in left
    rows = [embedding, left.pop(deep)] if is_deep else [embedding]
    if any(row.ndim != 3 or row.shape[1:] != embedding.shape[1:] for row in rows):
        raise InputError(f"{shallow} and {deep} are not stacks of equally many tokens")
    embedding = torch.cat(rows)
    if is_deep:
        _log.warning(
            "the published network with deep prompts had its last norm behind every block; here it "
            "is behind the last one, so outputs differ from that network's"
        )
    found.add("prompt", "vit", {"prompt.embedding": embedding}, t=embedding.shape[1], deep=is_deep)


def _adapters(net: nn.Module, left: dict[str, Tensor], found: _Found) -> None:
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in list(left):
        if match := _ADAPTER.fullmatch(name):
            blocks[match[1]][f"adapter.{match[2]}.{match[3]}"] = left.pop(name)
    shapes = set()
    for block, values in blocks.items():
        down = values.get("adapter.down.weight")
        if down is None or down.ndim != 2:
            raise InputError(f"{block} has no adapter_downsample.weight that is a matrix")
        shapes.add((down.shape[0], down.shape[1]))
    widest = max((width for _, width in shapes), default=0)
    reductions = (
        factor
        for factor in range(1, widest + 1)
        if all(max(1, width // factor) == hidden for hidden, width in shapes)
    )
    if blocks and (reduction := next(reductions, None)) is None:
        raise InputError(
            f"the adapters have {sorted(shapes)} hidden and outer channels, expected one reduction"
        )
    for block, values in blocks.items():
        found.add("adapter", f"{block}.mlp", values, reduction=reduction)


def _ssf(net: nn.Module, left: dict[str, Tensor], found: _Found) -> None:
    unetr = is_monai_vit(getattr(net, "vit", net))
    table = _UNETR_SSF if unetr else _CVTGAN_SSF
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in list(left):
        if not (match := _SSF.fullmatch(name)):
            continue
        owner, leaf, pair = match[1], match[2], int(match[3] or 1)
        last = owner.rpartition(".")[2]
        pairs = table.get("N" if last.isdigit() else last)
        if pairs is None:
            continue
        value = left.pop(name)
        for layer in pairs[pair - 1]:
            layers[f"{owner}.{layer}"][f"ssf_{leaf}"] = value
    for layer, values in layers.items():
        found.add("ssf", layer, values)
    if layers and not unetr:
        _log.warning(
            "the published CVT-GAN with SSF left its MLPs out by mistake; here they are in, so "
            "outputs differ from that network's"
        )


def _lora(net: nn.Module, left: dict[str, Tensor], found: _Found, lora_alpha: float) -> None:
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in list(left):
        if match := _LORA.fullmatch(name):
            pairs[match[1]][match[2]] = left.pop(name)
    modules = dict(net.named_modules())
    for module, pair in pairs.items():
        layer = modules.get(module)
        if set(pair) != {"A", "B"}:
            raise InputError(f"{module} has lora_{next(iter(pair))} alone, expected a pair")
        a, b = pair["A"], pair["B"]
        if isinstance(layer, nn.Conv3d):
            kernel = _published_kernel(module, layer, a, b, lora_alpha)
            taps = kernel.shape[1]
            unit = torch.eye(taps, dtype=kernel.dtype).view(taps, *layer.weight.shape[1:])
            values = {"lora_A": unit, "lora_B": kernel}
            found.add("lora", module, values, r=taps, lora_alpha=taps)
        elif isinstance(layer, nn.Linear) and module.endswith(".qkv"):
            r, rows = b.shape[-1], 2 * layer.out_features // 3
            if a.shape != (2 * r, layer.in_features) or b.shape != (rows, r):
                raise InputError(
                    f"{module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, expected "
                    f"(2 r, {layer.in_features}) and ({rows}, r) for query and key"
                )
            values = {"lora_A": a, "lora_B": b}
            found.add("lora", module, values, r=r, lora_alpha=lora_alpha, qkv_parts="qk")
        else:
            raise InputError(f"{module} has a published LoRA, but this network has no such layer")


def _published_kernel(
    module: str, conv: nn.Conv3d, a: Tensor, b: Tensor, lora_alpha: float
) -> Tensor:
    """scale * B.A as the kernel of a depthwise convolution, [C, taps]."""
    size = conv.kernel_size[0]
    r = a.shape[0] // size
    fits = (
        conv.groups == conv.in_channels == conv.out_channels
        and r > 0
        and a.shape == (r * size, conv.in_channels * size)
        and b.shape[1:] == a.shape[:1]
        and b.shape[0] * a.shape[1] == conv.weight.numel()
    )
    if not fits:
        raise InputError(
            f"{module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, whose product does "
            f"not have the {conv.weight.numel()} numbers of its kernel {tuple(conv.weight.shape)}: "
            "the released code could not run with these shapes"
        )
    product = b.double() @ a.double()
    return product.reshape(conv.out_channels, -1) * (lora_alpha / r)


def _own_parameters(net: nn.Module, left: dict[str, Tensor], found: _Found) -> None:
    """Biases and layer norms: parameters of the base that trained."""
    parameters = dict(net.named_parameters())
    own = {name: value for name, value in left.items() if name in parameters}
    if unknown := sorted(set(left) - set(own)):
        raise InputError(f"{unknown[0]} has no equivalent in this network ({len(unknown)} such)")
    if not own:
        return
    norms = {
        f"{path}.{leaf}"
        for path, module in net.named_modules()
        if isinstance(module, nn.LayerNorm)
        for leaf in ("weight", "bias")
    }
    other = sorted(name for name in own if not name.endswith(".bias") and name not in norms)
    if other:
        raise InputError(f"{other[0]} is a weight of the base network, which no method trains")
    if all(name.endswith(".bias") for name in own):
        found.biases = True
    else:
        found.modules["norms"] = sorted({name.rpartition(".")[0] for name in own})
    found.values |= own


def _config(net: nn.Module, found: _Found) -> AnyConfig:
    """The config of what was found: of one method, or a mix."""
    methods = dict(found.modules)
    if not methods:
        return BitFitConfig()
    if len(methods) == 1 and not found.biases:
        ((method, modules),) = methods.items()
        return _method(method, modules, found)
    sides: dict[str, MethodConfig] = {}
    for method, modules in methods.items():
        for side in ("encoder", "decoder"):
            pattern = getattr(parts(net), side)
            inside = [name for name in modules if pattern and re.match(pattern, name)]
            if inside and side in sides:
                raise InputError(f"the file has two methods in the {side}, expected one: {method}")
            if inside:
                sides[side] = _method(method, inside, found)
    return MixConfig(sides.get("encoder"), sides.get("decoder"), bitfit=found.biases)


def _method(method: str, modules: list[str], found: _Found) -> MethodConfig:
    settings = found.settings[method]
    if method == "prompt":
        return PromptConfig({"vit": settings["t"]}, deep=settings["deep"], gated=False)
    if method == "adapter":
        return AdapterConfig(settings["reduction"], "gelu", modules)
    if method == "ssf":
        return SSFConfig(modules)
    if method == "norms":
        return LayerNormConfig(modules)
    return LoraConfig(target_modules=modules, **settings)


def _check(values: Mapping[str, Tensor], expected: Mapping[str, Tensor], shared: set[str]) -> None:
    missing = sorted(set(expected) - set(values))
    extra = sorted(set(values) - set(expected) - shared)
    if missing or extra:
        raise InputError(
            f"the published file does not fit this network: {len(missing)} tensors missing"
            f"{_first(missing)}, {len(extra)} unexpected{_first(extra)}"
        )
    for name, tensor in expected.items():
        if values[name].shape != tensor.shape:
            raise InputError(
                f"the published file has {tuple(values[name].shape)} for {name}, expected "
                f"{tuple(tensor.shape)}"
            )


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
