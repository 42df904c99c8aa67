"""Configs whose decoder layers differ in size, and how to build them.

Layer-specific sizes are written to config.json as `per_layer_config`, the form that recent versions of transformers
read:

    "per_layer_config": {"3": {"intermediate_size": 1024}, "7": {"num_attention_heads": 8, "num_key_value_heads": 2}}

Keys are decimal layer numbers; values are attributes of the (text) config for that layer; nested mappings are merged.
Layers that are not listed are built from the config itself. The few architectures that define this key themselves
(Gemma 4) keep their own meaning of it, and cannot have layer-specific sizes.

A layer may also lack its attention or its MLP, which no config attribute expresses. An additional entry names the
removed modules and how many values each of them returned, 1 for a bare tensor:

    "per_layer_config": {"3": {"removed_blocks": {"self_attn": 2}}}
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from llmprune.errors import ModelError
from llmprune.models.boundary import one_line
from llmprune.models.decoder import Decoder
from llmprune.models.skeleton import build_skeleton

# Exceptions raised when a model is built from an impossible config.
UNBUILDABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip
# Path of a value in the text config -> the value.
Changes = dict[tuple[str, ...], int]

# The entry of a layer that names its removed modules.
REMOVED = "removed_blocks"

# transformers warns about reading an attribute that some layers override; here each layer is built from its own values.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: "Reading global config value" not in record.getMessage()
)

_KEY = "per_layer_config"
# Lets recent versions of transformers read an attribute globally although some layers have other values.
_ALLOWED = "allow_global_per_layer_attribute_access"


def read_per_layer(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Read `per_layer_config`: layer -> attributes that differ there; empty if the architecture owns the key."""
    written = text_part(config.to_dict(), config).get(_KEY)
    if not written or _owns_per_layer(config):
        return {}
    return {int(layer): dict(values) for layer, values in written.items()}


def with_per_layer(config: PretrainedConfig, per_layer: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of the config with this `per_layer_config`, or without the key if it is empty.

    Raises:
        ModelError: the architecture defines the key itself.
    """
    data = config.to_dict()
    text = text_part(data, config)
    if _owns_per_layer(config):
        if per_layer:
            raise ModelError(
                f"{type(config).__name__} already defines per_layer_config",
                expected="an architecture that does not use this key",
                fix="remove the same number of groups from every layer, and no blocks",
            )
        return type(config).from_dict(data)
    for key in (_KEY, _ALLOWED, REMOVED):
        text.pop(key, None)
    if per_layer:
        text |= {_KEY: dict(per_layer), _ALLOWED: True}
        for name, value in ((name, value) for values in per_layer.values() for name, value in values.items()):
            # A head size that was derived from the number of heads is now explicit; by default no module is removed.
            text.setdefault(name, {} if name == REMOVED else value)
    try:
        return type(config).from_dict(data)
    except UNBUILDABLE as error:
        raise ModelError(f"{type(config).__name__} does not accept these values: {one_line(error)}") from error


def take_per_layer(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Remove `per_layer_config` from a config, in place, and return it; empty if the architecture defines it itself."""
    per_layer = read_per_layer(config)
    if per_layer:
        config.get_text_config(decoder=True).per_layer_config = None
    return per_layer


def put_per_layer(config: PretrainedConfig, per_layer: Mapping[int, Mapping[str, Any]]) -> None:
    """The inverse of `take_per_layer`, in place."""
    if not per_layer:
        return
    text = config.get_text_config(decoder=True)
    for name, value in ((name, value) for values in per_layer.values() for name, value in values.items()):
        # transformers requires a global value in addition to the layer-specific ones, as in `with_per_layer`.
        if not hasattr(text, name):
            setattr(text, name, {} if name == REMOVED else value)
    setattr(text, _ALLOWED, True)
    text.per_layer_config = {str(key): dict(value) for key, value in per_layer.items()}


def _owns_per_layer(config: PretrainedConfig) -> bool:
    return _KEY in type(config.get_text_config(decoder=True))().to_dict()


def build_decoder(
    config: PretrainedConfig, dtype: torch.dtype | None = None, path: str | None = None, tensors: int | None = None
) -> Decoder:
    """Build the model without weights, each decoder layer with its own sizes.

    Args:
        config: may have `per_layer_config`.
        dtype: of the parameters; None: the config's own.
        path: dotted name of the decoder layers; None: they are searched for.
        tensors: how many the checkpoint has; None: it is not known yet.

    Raises:
        CheckpointError: the config describes a model with far more parameters than tensors.
        ModelError: the decoder layers cannot be identified, or `per_layer_config` names a missing layer or block.
    """
    uneven = bool(read_per_layer(config))
    decoder = Decoder.find(build_skeleton(with_per_layer(config, {}) if uneven else config, dtype, tensors), path)
    if uneven:
        apply_per_layer(decoder, config)
    return decoder


def apply_per_layer(decoder: Decoder, config: PretrainedConfig) -> None:
    """Replace the decoder layers listed in `per_layer_config` by layers of their own size, on the meta device.

    Removed blocks are replaced by modules without parameters.

    Args:
        decoder: built from the config without `per_layer_config`, before weights are loaded.
        config: with `per_layer_config`.

    Raises:
        ModelError: a layer, or one of its blocks, does not exist.
    """
    plain = with_per_layer(config, {})
    layers = decoder.layers
    built: dict[str, nn.ModuleList] = {}
    for layer, values in read_per_layer(config).items():
        if not 0 <= layer < len(layers):
            raise ModelError(f"per_layer_config names layer {layer}", expected=f"layers below {len(layers)}")
        removed = values.pop(REMOVED, {})
        if values and repr(values) not in built:
            own = build_skeleton(_merged(plain, values), decoder.model.dtype)
            built[repr(values)] = Decoder.find(own, decoder.path).layers
        if values:
            own_layer = built[repr(values)][layer]
            _share_choices(own_layer, layers[layer])
            layers[layer] = own_layer
        remove_blocks(layers[layer], layer, removed)


def _share_choices(layer: nn.Module, replaced: nn.Module) -> None:
    """Let a resized layer follow the model's config, held by the replaced layer, in how attention is computed."""
    before = dict(replaced.named_modules())
    for name, module in layer.named_modules():
        for key, own in list(vars(module).items()):
            shared = vars(before.get(name, replaced)).get(key)
            if isinstance(own, PretrainedConfig) and isinstance(shared, PretrainedConfig):
                setattr(module, key, _LayerConfig(own, shared))


class _LayerConfig:
    """The config of a resized layer; the implementations of attention and experts are read from the model's config.

    They may change at any time (`set_attn_implementation`), and masks are built for those in the model's config.
    """

    _SHARED = ("_attn_implementation", "_experts_implementation")

    def __init__(self, own: PretrainedConfig, shared: PretrainedConfig) -> None:
        self._own, self._shared = own, shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_own", "_shared"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._shared if name in self._SHARED else self._own, name)


def remove_blocks(layer: nn.Module, number: int, removed: Mapping[str, int]) -> None:
    """Replace blocks of a decoder layer, in place, by modules that add nothing to its hidden states.

    Args:
        layer: the decoder layer.
        number: its index in the model.
        removed: dotted name of a module inside the layer -> number of values that it returns.

    Raises:
        ModelError: the layer has no such module.
    """
    for name, returns in removed.items():
        try:
            layer.set_submodule(name, RemovedBlock(returns, number), strict=True)
        except (AttributeError, ValueError) as error:
            raise ModelError(
                f"{REMOVED} names {name!r} in layer {number}, a {type(layer).__name__} without such a module",
                expected=f"one of {', '.join(child for child, _ in layer.named_children())}",
            ) from error


class RemovedBlock(nn.Module):
    """Replaces removed attention or a removed MLP: returns zeros, has no parameters, and keeps the cache length right.

    Args:
        returns: number of values that the block returned; all but the first become None.
        layer: number of its decoder layer.
    """

    def __init__(self, returns: int, layer: int) -> None:
        super().__init__()
        self.returns, self.layer_idx = returns, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape of the first tensor argument, [samples, length, hidden]."""
        arguments = *args, *kwargs.values()
        hidden = next(value for value in arguments if isinstance(value, Tensor))
        for value in arguments:
            if isinstance(value, Cache):
                self._count(value, hidden)
        zeros = torch.zeros_like(hidden)
        return zeros if self.returns == 1 else (zeros, *[None] * (self.returns - 1))

    def _count(self, cache: Cache, hidden: Tensor) -> None:
        """Add zero keys of size one: the cache's length is the number of keys in its first layer."""
        heads, sizes = 1, (1, 1)
        for layer in cache.layers[self.layer_idx : self.layer_idx + 1]:
            if not isinstance(layer, CacheLayerMixin):
                return  # no cache layer: it shared the keys of another layer
            if layer.is_initialized and isinstance(layer.keys, Tensor) and layer.keys.dim() == 4:
                # A static cache may have been allocated for the original heads.
                heads, sizes = layer.keys.shape[1], (layer.keys.shape[3], layer.values.shape[3])
        samples, length = hidden.shape[:2]
        keys, values = (hidden.new_zeros(samples, heads, length, size) for size in sizes)
        cache.update(keys, values, self.layer_idx)


def changed(config: PretrainedConfig, changes: Changes) -> PretrainedConfig:
    """A copy of the config with new values at these paths of the text config."""
    return _merged(config, nested(changes))


def _merged(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    data = config.to_dict()
    _merge(text_part(data, config), values)
    return type(config).from_dict(data)


def _merge(data: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _merge(data[key], value)
        else:
            # Some configs list one number per layer.
            data[key] = [value] * len(data[key]) if isinstance(data.get(key), list) else value


def nested(changes: Changes) -> dict[str, Any]:
    """The changes as nested mappings."""
    result: dict[str, Any] = {}
    for path, value in changes.items():
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return result


def text_part(data: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The part of a config's dictionary that describes the text decoder."""
    text = config.get_text_config(decoder=True)
    for key in getattr(config, "sub_configs", {}):
        if getattr(config, key, None) is text:
            data = data[key]
            break
    return data
