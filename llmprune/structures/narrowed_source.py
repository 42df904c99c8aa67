"""A checkpoint with fewer hidden channels: a source whose layers are narrowed as they are read."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llmprune.errors import CheckpointError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import Smaller, drop_parameters, modules_outside
from llmprune.models.uneven import build_decoder
from llmprune.structures.remove.width import Width, shrink_width


class WidthSource:
    """A `StoredSource` of the model with fewer hidden channels; holds a layer and at most its full-size original.

    Args:
        inner: the full checkpoint.
        width: which of its dimensions are hidden width.
        channels: hidden channels that are kept, ascending.
        factors: norm -> the factor applied to its gain.

    Attributes:
        model: the smaller model, its parameters on the meta device until they are loaded.
        layers_path: dotted name of its decoder layers.
        layers: its decoder layers.
        config: its config.
        folder: of the full checkpoint.

    Raises:
        PatternError: the channels do not fit the plan.
        NumericsError: a factor is missing, not positive or not finite.
    """

    def __init__(
        self, inner: CheckpointSource, width: Width, channels: Sequence[int], factors: Mapping[str, float]
    ) -> None:
        self._inner, self._width, self._channels, self._factors = inner, width, list(channels), dict(factors)
        self._shrink({})  # rejects arguments that do not fit before anything is read
        self.config: PretrainedConfig = width.config
        self.folder: Path = inner.folder
        self.dtype = inner.dtype
        self.decoder = build_decoder(width.config, inner.model.dtype, inner.layers_path)
        self.model, self.layers_path, self.layers = self.decoder.model, self.decoder.path, self.decoder.layers

    def load_layer(self, index: int, device: torch.device) -> None:
        """Read a full layer onto the device, keep its part of the smaller model, and drop the rest."""
        try:
            self._inner.load_layer(index, device)
            layer, prefix = self._inner.layers[index], self.layer_name(index)
            self._take((f"{prefix}.{name}".rstrip("."), module) for name, module in layer.named_modules())
        finally:
            self._inner.free_layer(index)

    def free_layer(self, index: int) -> None:
        """Drop one decoder layer's parameters."""
        drop_parameters(self.layers[index].modules())

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The dtype of the parameter in the full checkpoint."""
        return self._inner.stored_dtype(index, parameter)

    def load_ends(self, device: torch.device) -> None:
        """Read everything outside the decoder layers onto the device and narrow it; tied weights remain tied."""
        try:
            self._inner.load_ends(device)
            outside = set(modules_outside(self._inner.model, self._inner.layers))
            named = self._inner.model.named_modules()
            self._take((name, module) for name, module in named if module in outside)
        finally:
            self._inner.free_ends()

    def free_ends(self) -> None:
        """Drop the parameters outside the decoder layers."""
        drop_parameters(modules_outside(self.model, self.layers))
        self.model.tie_weights()

    def layer_name(self, index: int) -> str:
        """Dotted name of a decoder layer."""
        return self.decoder.layer_name(index)

    def checkpoint_tensors(
        self, index: int, changed: Collection[str] = (), smaller: Smaller | None = None
    ) -> dict[str, Tensor]:
        """The resident smaller layer under the checkpoint's own keys and dtypes.

        Args:
            index: number of the layer.
            changed: its parameters with new values, in addition to the gains of norms.
            smaller: the layer to store instead, with the same hidden width.

        Raises:
            CheckpointError: the conversion does not reproduce the checkpoint's keys.
        """
        prefix = f"{self.layer_name(index)}."
        channels = torch.tensor(self._channels)
        inside = {
            name.removeprefix(prefix): dims for name, dims in self._width.places.items() if name.startswith(prefix)
        }
        kept = {(name, dim): channels for name, dims in inside.items() for dim in dims}
        gains = {norm.gain.removeprefix(prefix) for norm in self._width.norms.values()}
        stored = smaller or Smaller(self.model, self.layers[index], {})
        narrower = Smaller(stored.model, stored.layer, {**kept, **stored.kept})
        return self._inner.checkpoint_tensors(index, {*changed, *gains}, narrower)

    def end_tensors(self) -> dict[str, Tensor]:
        """The model's tensors outside the decoder layers, under the checkpoint's own keys and in its dtypes.

        Raises:
            CheckpointError: a tensor with hidden channels is not stored in the model's layout.
        """
        ignored = set(self._inner.ignored_keys())
        return {key: self._end_tensor(key) for key in self._inner.end_keys() if key not in ignored}

    def _end_tensor(self, key: str) -> Tensor:
        tensor, (target, *others) = self._inner.stored[key][...], self._inner.targets[key]
        if not any(name in self._width.places for name in (target, *others)):
            return tensor
        if others or tensor.shape != self._inner.model.get_parameter(target).shape:
            raise CheckpointError(
                f"{self.folder}: {key!r} {list(tensor.shape)} is stored in a different layout from {target}",
                expected="embeddings, norms and LM head in the model's own layout",
                fix="load the model with transformers, save it with save_pretrained, and prune that copy",
            )
        return self._shrink({target: tensor})[target]

    def _take(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Give the smaller model the kept part of the full modules' parameters, and their buffers."""
        taken: dict[int, nn.Parameter] = {}  # a tied parameter belongs to several modules
        for name, full in modules:
            small = self.model.get_submodule(name)
            for key, parameter in full.named_parameters(recurse=False):
                if id(parameter) not in taken:
                    values = self._rounded(f"{name}.{key}".lstrip("."), parameter.detach())
                    taken[id(parameter)] = nn.Parameter(values, requires_grad=False)
                setattr(small, key, taken[id(parameter)])
            for key, buffer in full.named_buffers(recurse=False):
                setattr(small, key, buffer.clone())

    def _rounded(self, name: str, parameter: Tensor) -> Tensor:
        """The kept part of a parameter; a gain, whose values change, is rounded as it will be stored."""
        values = self._shrink({name: parameter})[name]
        if not any(name == norm.gain for norm in self._width.norms.values()):
            return values.clone() if values is parameter else values
        stored = next(self._inner.stored[key].dtype for key, names in self._inner.targets.items() if name in names)
        return values.to(stored).to(values.dtype)

    def _shrink(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return shrink_width(tensors, self._width, self._channels, self._factors)
