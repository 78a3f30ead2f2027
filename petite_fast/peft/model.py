"""PeftModel: the verbs of Hugging Face PEFT on a network that stays itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from petite_fast.nn.twin import Twin
from petite_fast.peft import io
from petite_fast.peft.config import AnyConfig
from petite_fast.peft.inject import (
    Injection,
    carry_out,
    make_plan,
    require_bare,
    take_out,
    tensor,
)
from petite_fast.peft.lean import MEMORY, Memory
from petite_fast.peft.methods import Site
from petite_fast.peft.methods.lora import LoraSite
from petite_fast.peft.mixed import mixed_batch


@dataclass
class _State:
    """What an adapted network knows about its adapters."""

    config: AnyConfig
    injection: Injection
    active: str
    initial: dict[str, Tensor]
    """Adapter tensors as they were injected. Every method starts as the identity, so with these the
    network computes what its base does."""
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Adapters that are not active."""
    live: dict[str, nn.Parameter] | None = None
    """The trainable parameters, while the adapter is disabled."""
    merged: bool = False
    """Whether what can be folded into the weights is, for now."""


class PeftModel(Twin):
    """An adapted network: its own class with these methods in front. Made by `get_peft_model`.

    The network is changed in place and stays an instance of its class, with the same module names
    and the same names in its state dict, plus those of the adapter. `train()` leaves every norm
    with running statistics in evaluation mode: a frozen network's statistics do not move.

    One adapter is active, its values are those of the network's parameters; others are kept beside
    it. Switching writes values into the same parameters, so an optimiser stays valid (its moments
    are those of the adapter it was stepping).
    """

    _peft: _State
    twin_prefix = "Peft"

    @classmethod
    def from_pretrained(
        cls, net: nn.Module, directory: str | os.PathLike[str], name: str = "default"
    ) -> PeftModel:
        """Adapt `net` as an adapter file says and give it the file's values.

        Args:
            net: the base network that the adapter was trained on; adapted in place.
            directory: what `save_pretrained` wrote, or Hugging Face PEFT for a LoRA adapter (which
                does not say its base network: the logger "petite_fast" notes it).
            name: name of the adapter.

        Raises:
            InputError: the file is unreadable, was trained on another base, does not fit, or has an
                option of Hugging Face PEFT's that is not supported. `net` is then as it was.
            ValueError: `net` has adapters already.
        """
        require_bare(net)
        file = io.read_adapter(directory)
        io.check_base(file, type(net).__name__, io.state_sha256(net.state_dict()))
        plan = make_plan(net, file.config, file.crossing(net))
        model = _adapt(net, file.config, plan, name)
        try:
            values = io.network_values(file, model, model._tensors())
        except ValueError:
            model._leave(merge=False)
            raise
        model._write(values)
        return model

    @property
    def peft_config(self) -> dict[str, AnyConfig]:
        """{adapter name: config}; adapters of one network share their config."""
        return dict.fromkeys([self._peft.active, *self._peft.stored], self._peft.config)

    @property
    def active_adapter(self) -> str:
        """Name of the adapter whose values the network holds."""
        return self._peft.active

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters, adapters included)."""
        parameters = list(self.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return trainable, sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print both counts and the percentage, in Hugging Face PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        # The one print outside the command line: the method's name promises it.
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def add_adapter(self, name: str) -> None:
        """Add an adapter that starts as the identity, and is not active.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.peft_config:
            raise ValueError(f"name: got {name!r}, which is taken, wanted a new one")
        self._peft.stored[name] = {k: v.clone() for k, v in self._peft.initial.items()}

    def load_adapter(
        self, directory: str | os.PathLike[str], name: str = "default"
    ) -> dict[str, Any]:
        """Read an adapter into `name`: a new one, or new values for the one of that name.

        It becomes active by `set_adapter`, unless it has the active one's name.

        Returns:
            What the file says of itself: base_model_class, base_model_sha256, scanner,
            normalisation, petite_fast_version, torch_version, metadata.

        Raises:
            InputError: the file is unreadable, was trained on another base, has another rank or
                scale or other tensors. Nothing is changed then.
            ValueError: the adapter is disabled.
        """
        self._require_enabled("load_adapter")
        file = io.read_adapter(directory)
        io.check_base(file, self.original().__name__, self.base_sha256())
        io.check_settings(file, self._peft.config, self)
        values = io.network_values(file, self, self._tensors())
        if name == self._peft.active:
            self._write(values)
        else:
            self._peft.stored[name] = values
        return file.information

    def set_adapter(self, name: str) -> None:
        """Make `name` the active adapter.

        Raises:
            ValueError: there is no such adapter, or the adapter is disabled or merged.
        """
        self._require_enabled("set_adapter")
        if name == self._peft.active:
            return
        self._require_known(name)
        values = self._peft.stored.pop(name)
        self._peft.stored[self._peft.active] = {
            k: v.detach().clone() for k, v in self._tensors().items()
        }
        self._write(values)
        self._peft.active = name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the network computes exactly what its base does.

        The trainable parameters are exchanged for frozen ones that hold the identity, and come back
        untouched: a graph that was built outside can run its backward inside or after.
        """
        state = self._peft
        if state.live is not None:
            yield
            return
        self._require_enabled("disable_adapter")
        live = {}
        for name, value in self._tensors().items():
            if isinstance(value, nn.Parameter):
                live[name] = value
                initial = state.initial[name] = state.initial[name].to(value)
                self._exchange(name, nn.Parameter(initial, requires_grad=False))
        state.live = live
        try:
            yield
        finally:
            for name, parameter in live.items():
                self._exchange(name, parameter)
            state.live = None

    def merge_adapter(self) -> None:
        """Fold LoRA and SSF into the weights for now: inference at the cost of the base network.

        The base weights are kept, so `unmerge_adapter` brings them back to the last bit. Prompts
        and bottleneck adapters cannot be folded and go on as they are. Until then the adapter
        cannot be trained, switched, saved or disabled.

        Raises:
            ValueError: the adapter is disabled or merged.
        """
        self._require_enabled("merge_adapter")
        for site in self._peft.injection.sites:
            site.fold(self)
        self._peft.merged = True

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`; nothing happens when nothing is merged."""
        for site in self._peft.injection.sites:
            site.unfold(self)
        self._peft.merged = False

    def mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """Give every sample of a batch an adapter of its own: y[i] = network with names[i] of x[i].

        With LoRA alone the batch makes one pass: every convolution becomes one grouped convolution
        with a W_eff per sample. Other methods take one pass per adapter in the batch.

        Args:
            x: [N, C, D, H, W].
            adapter_names: N names, one per sample.

        Returns:
            [N, ...], without a graph: this is for inference.

        Raises:
            ValueError: a name is unknown, there are not N of them, the network is in training mode,
                or the adapter is disabled or merged.
        """
        self._require_enabled("mixed_batch")
        return mixed_batch(self, x, list(adapter_names))

    def merge_and_unload(self) -> nn.Module:
        """Fold the active adapter into the network and make it a plain one again, in place.

        LoRA and SSF go into the weights, exactly; trained biases and norms stay where they are;
        frozen layers become torch's own classes, and every parameter gets back the `requires_grad`
        it had. Prompts depend on the place in the patch or on the data, bottleneck adapters are not
        linear: neither can be folded into a weight, and both stay, as frozen modules. Other
        adapters are dropped.

        Raises:
            ValueError: the adapter is disabled or merged, or has LoRA that crosses the groups of a
                convolution (an import from Hugging Face PEFT).
        """
        self._require_enabled("merge_and_unload")
        for site in self._peft.injection.sites:
            if isinstance(site, LoraSite) and site.crossing:
                raise ValueError(
                    f"merge_and_unload: got LoRA across the groups of {site.name}, wanted updates "
                    "that a grouped weight can hold"
                )
        return self._leave(merge=True)

    def save_pretrained(
        self, directory: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write the active adapter: adapter_config.json and adapter_model.safetensors.

        Args:
            directory: made if it is not there; an interrupted write leaves the old pair.
            metadata: JSON-able. `scanner` and `normalisation` get fields of their own. Nothing
                that identifies a patient belongs here.

        Raises:
            ValueError: the adapter is disabled.
            TypeError: `metadata` is not JSON-able.
            OSError: the disk is full, or the directory cannot be written.
        """
        self._require_enabled("save_pretrained")
        io.write_adapter(
            directory,
            self._peft.config,
            self,
            self._tensors(),
            (self.original().__name__, self.base_sha256()),
            metadata,
        )

    def base_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the network before it was adapted: its names, its values."""
        state = self._peft
        owned = {id(value): name for name, value in self._tensors().items()}
        base = {}
        for name, value in self.state_dict(keep_vars=True).items():
            owner = owned.get(id(value))
            if owner is None:
                base[name] = value.detach()
            elif owner in state.injection.requires_grad:  # a trained bias
                base[name] = state.initial[owner].to(value)
        return base

    def base_sha256(self) -> str:
        """sha256 of `base_state_dict`, which an adapter file carries."""
        return io.state_sha256(self.base_state_dict())

    def train(self, mode: bool = True) -> PeftModel:
        """Set the mode; norms with running statistics stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.running_mean is not None:
                module.eval()
        return self

    def _tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors in the network."""
        return {name: tensor(self, name) for name in self._peft.injection.tensors}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, live in self._tensors().items():
                live.copy_(values[name])

    def _leave(self, merge: bool) -> nn.Module:
        injection = self._peft.injection
        del self._peft
        net = self.leave_()
        take_out(net, injection, merge)
        return net

    def _exchange(self, name: str, parameter: nn.Parameter) -> None:
        """Put another Parameter object in the place of one, wherever that is."""
        for alias in (name, *self._peft.injection.aliases.get(name, ())):
            path, _, leaf = alias.rpartition(".")
            self.get_submodule(path)._parameters[leaf] = parameter

    def _require_enabled(self, caller: str) -> None:
        if self._peft.live is not None:
            raise ValueError(f"{caller}: got a disabled adapter, wanted it outside disable_adapter")
        if self._peft.merged:
            raise ValueError(f"{caller}: got a merged adapter, wanted it after unmerge_adapter")

    def _require_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ValueError(f"name: got {name!r}, wanted one of {sorted(self.peft_config)}")


def get_peft_model(
    net: nn.Module,
    config: AnyConfig,
    adapter_name: str = "default",
    *,
    memory: Memory = "exact",
) -> PeftModel:
    """Adapt `net` in place and return it.

    Everything is frozen; the targets of `config` get adapters; every other layer becomes its lean
    twin where it has one: frozen convolutions and batch norms keep nothing for backward, a norm and
    the activation next to it one tensor, an MLP its input. The network starts as the one it was,
    with norms in evaluation mode: the same sums, which may round differently in the last bit where
    a lean layer takes a faster kernel or another memory layout than torch's.

    Args:
        net: any module; it stays an instance of its class.
        config: the config of one method (`petite_fast.peft.config`), or a MixConfig.
        adapter_name: name of the adapter.
        memory: what is kept between forward and backward. "exact" gives exact gradients; "int8"
            keeps the same tensors in 8 bits, stochastically rounded, so gradients are noisy;
            "checkpoint" computes every stage of the network again in backward
            (torch.utils.checkpoint).

    Raises:
        InputError: targets that match nothing, or that the method cannot adapt.
        ValueError: `net` has adapters already, or `memory` is something else.
        TypeError: `net` is not a module, or is compiled or wrapped: adapt it before.
    """
    require_bare(net)
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r}, wanted one of {MEMORY}")
    return _adapt(net, config, make_plan(net, config), adapter_name, memory)


def _adapt(
    net: nn.Module, config: AnyConfig, plan: list[Site], name: str, memory: Memory = "exact"
) -> PeftModel:
    injection = carry_out(net, plan, memory)
    initial = {key: tensor(net, key).detach().clone() for key in injection.tensors}
    model = cast(PeftModel, PeftModel.become_(net))
    model._peft = _State(config, injection, name, initial)
    return model.train(model.training)
