"""Sources of decoder layers: the protocols, and an in-memory model."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.errors import ModelError
from llmprune.models.decoder import Decoder
from llmprune.models.in_memory import require_plain
from llmprune.models.skeleton import refuse_quantised


@runtime_checkable  # so that annotations that name it can be executed in the tests
class Source(Protocol):
    """A source of decoder layers.

    Attributes:
        model: the whole model; its parameters may be on the meta device.
        layers_path: dotted name of the list of decoder layers.
        layers: that list.
        dtype: in which layers and ends (embeddings, final norm and LM head) are computed.
    """

    model: PreTrainedModel
    layers_path: str
    layers: nn.ModuleList
    dtype: torch.dtype

    @property
    def folder(self) -> Path | None:
        """The checkpoint from which the layers are read; None for an in-memory model."""

    def load_layer(self, index: int, device: torch.device) -> None:
        """Put the parameters of one decoder layer on the device."""

    def free_layer(self, index: int) -> None:
        """Release the parameters of one decoder layer."""

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The dtype in which a layer's parameter will be stored, regardless of the compute dtype."""

    def load_ends(self, device: torch.device) -> None:
        """Put everything outside the decoder layers on the device: embeddings, final norm and LM head."""

    def free_ends(self) -> None:
        """Release everything outside the decoder layers."""


@dataclass(frozen=True, slots=True)
class Smaller:
    """A decoder layer with fewer heads, channels or experts, to be stored instead of the one in the checkpoint.

    Attributes:
        model: the whole smaller model.
        layer: the layer, its parameters resident.
        kept: (name inside the layer, dimension) -> indices of the original that are kept, int64.
    """

    model: PreTrainedModel
    layer: nn.Module
    kept: Mapping[tuple[str, int], Tensor]

    def part(self, name: str, original: Tensor) -> Tensor:
        """The part of a tensor that is kept."""
        for (own, dim), index in self.kept.items():
            if own == name:
                original = original.index_select(dim, index.to(original.device))
        return original


@runtime_checkable
class StoredSource(Source, Protocol):
    """A source backed by a checkpoint folder, with what is needed to rewrite and to audit it.

    Attributes:
        decoder: the model and its layers.
        config: of the model.
    """

    decoder: Decoder
    config: PretrainedConfig

    @property
    def folder(self) -> Path:
        """The checkpoint folder; for a source that exposes only a part of it, that of the whole."""

    def layer_name(self, index: int) -> str:
        """Dotted name of a decoder layer."""

    def checkpoint_tensors(
        self, index: int, changed: Collection[str] = (), smaller: Smaller | None = None
    ) -> dict[str, Tensor]:
        """The resident layer under the checkpoint's own keys and dtypes.

        Args:
            index: number of the layer.
            changed: its parameters with new values.
            smaller: the layer to store instead.

        Raises:
            CheckpointError: the conversion does not reproduce the checkpoint's keys.
        """

    def end_tensors(self) -> dict[str, Tensor]:
        """The model's tensors outside the decoder layers, under the checkpoint's own keys and in its dtypes."""


class ModelSource:
    """An in-memory model, pruned in place; each layer is moved to the device and back to its original place.

    Args:
        model: a causal LM, all of it in memory and not quantised.
        decoder_layers: dotted name of the decoder layers; None: they are searched for.
        compute_dtype: dtype on the device, at least as wide as the model's own; None: the model's own.

    Raises:
        ModelError: parts of the model are offloaded, quantised, adapted or masked, or its decoder layers cannot be
            identified.
    """

    folder: Path | None = None

    def __init__(
        self, model: PreTrainedModel, decoder_layers: str | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        refuse_quantised(model.config, type(model).__name__)
        require_plain(model)
        if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise ModelError(
                f"{absent[0]} and {len(absent) - 1} other parameters are not in memory",
                expected="a model without offloaded parameters",
                fix="pass the checkpoint's folder instead; it is read layer by layer",
            )
        self.model = model
        self.decoder = Decoder.find(model, decoder_layers)
        self.layers_path, self.layers = self.decoder.path, self.decoder.layers
        self.dtype: torch.dtype = compute_dtype or model.dtype
        self._origins: dict[nn.Module, _Origin] = {}

    def load_layer(self, index: int, device: torch.device) -> None:
        """Move one layer to the device."""
        self._visit(self.layers[index].modules(), device)

    def free_layer(self, index: int) -> None:
        """Move the layer back."""
        self._return(self.layers[index].modules())

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The dtype of the parameter in its original place."""
        path, _, name = parameter.rpartition(".")
        owner = self.layers[index].get_submodule(path)
        known = self._origins[owner].dtypes if owner in self._origins else {}
        return known.get(name, owner.get_parameter(name).dtype)

    def load_ends(self, device: torch.device) -> None:
        """Move everything outside the layers to the device."""
        self._visit(modules_outside(self.model, self.layers), device)

    def free_ends(self) -> None:
        """Move it back."""
        self._return(modules_outside(self.model, self.layers))

    def _visit(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        # All original places are recorded before anything moves: tied weights belong to two modules.
        own = self.model.dtype
        origins = {
            module: _Origin(device, {name: tensor.dtype for name, tensor in module.named_parameters(recurse=False)})
            for module in modules
            for device in [tensor.device for tensor in _own_tensors(module)][:1]
        }
        self._origins.update(origins)
        for module in origins:
            move(module, device)
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == own:
                    parameter.data = parameter.data.to(self.dtype)

    def _return(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if module in self._origins:
                origin = self._origins.pop(module)
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.data = parameter.data.to(origin.dtypes[name])
                move(module, origin.device)


@dataclass(frozen=True, slots=True)
class _Origin:
    """The original device of a module's own tensors, and the dtypes of its parameters."""

    device: torch.device
    dtypes: dict[str, torch.dtype]


@contextmanager
def widened(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Let an in-memory model compute in a dtype at least as wide as its own."""
    own = model.dtype
    parameters = [parameter for parameter in model.parameters() if parameter.dtype == own]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = parameter.data.to(own)


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Compute the experts of an MoE layer by ordinary matmuls, which can be observed."""
    before = model.get_experts_implementation()
    if set(before.values()) == {"eager"}:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def modules_outside(model: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """Every module that is neither a decoder layer nor inside one."""
    inside = set(layers.modules())
    return (module for module in model.modules() if module not in inside)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module's own parameters and buffers, not those of its children."""
    module._apply(lambda tensor: tensor.to(device), recurse=False)


def drop_parameters(modules: Iterable[nn.Module]) -> None:
    """Drop the parameters of these modules; their buffers move to the CPU."""
    for owner in modules:
        for name, parameter in owner.named_parameters(recurse=False):
            empty: Any = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            setattr(owner, name, empty)
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to("cpu"))
