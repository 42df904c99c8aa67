"""Configs whose decoder layers differ in size, and how to build them.

Widths that differ between layers are written as overrides, the same form that newer transformers reads:

    "per_layer_config": {"3": {"intermediate_size": 1024}, "7": {"num_attention_heads": 8, "num_key_value_heads": 2}}

Keys are layer numbers in decimal, values are attributes of the (text) config for that layer; nested mappings are
merged. Layers that are not named are built from the config itself. The few architectures that use this key themselves
(Gemma 4) keep their own, and cannot have widths that differ.

A layer may also lack its attention or its MLP, which no config can say. One more entry names the modules that have
gone, and how many values each of them returned, 1 for a bare tensor:

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
from llmprune.models.decoder import Decoder
from llmprune.models.skeleton import build_skeleton

# What building a model from an impossible config raises.
UNBUILDABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip
# Where a value lies in the text config -> the value.
Changes = dict[tuple[str, ...], int]

# The entry of a layer that names the modules that it lacks.
REMOVED = "removed_blocks"

# transformers warns of reading an attribute that some layers override; here each layer is built from its own values.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: "Reading global config value" not in record.getMessage()
)

_KEY = "per_layer_config"
# Lets a class of newer transformers read its own attributes although some layers have other values.
_ALLOWED = "allow_global_per_layer_attribute_access"


def layer_overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says: layer -> attributes that differ there; nothing where the architecture owns it."""
    written = text_part(config.to_dict(), config).get(_KEY)
    if not written or _owns_overrides(config):
        return {}
    return {int(layer): dict(values) for layer, values in written.items()}


def with_overrides(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of the config with this `per_layer_config`; without any if empty.

    Raises:
        ModelError: the architecture uses the key itself.
    """
    data = config.to_dict()
    text = text_part(data, config)
    if _owns_overrides(config):
        if overrides:
            raise ModelError(
                f"{type(config).__name__} has a per_layer_config of its own",
                expected="an architecture that leaves it free",
                fix="remove as many groups from each layer, and no blocks",
            )
        return type(config).from_dict(data)
    for key in (_KEY, _ALLOWED, REMOVED):
        text.pop(key, None)
    if overrides:
        text |= {_KEY: dict(overrides), _ALLOWED: True}
        for name, value in ((name, value) for values in overrides.values() for name, value in values.items()):
            # A head size that followed from the number of heads is now explicit; no module is missing everywhere.
            text.setdefault(name, {} if name == REMOVED else value)
    try:
        return type(config).from_dict(data)
    except UNBUILDABLE as error:
        raise ModelError(f"{type(config).__name__} does not take these values: {one_line(error)}") from error


def take_overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Remove `per_layer_config` from a config, in place, and return it; nothing where the architecture owns it."""
    overrides = layer_overrides(config)
    if overrides:
        config.get_text_config(decoder=True).per_layer_config = None
    return overrides


def put_overrides(config: PretrainedConfig, overrides: Mapping[int, Mapping[str, Any]]) -> None:
    """The inverse of `take_overrides`, in place."""
    if not overrides:
        return
    text = config.get_text_config(decoder=True)
    for name, value in ((name, value) for values in overrides.values() for name, value in values.items()):
        # transformers wants a value for all layers beside those of some, as in `with_overrides`.
        if not hasattr(text, name):
            setattr(text, name, {} if name == REMOVED else value)
    setattr(text, _ALLOWED, True)
    text.per_layer_config = {str(key): dict(value) for key, value in overrides.items()}


def _owns_overrides(config: PretrainedConfig) -> bool:
    return _KEY in type(config.get_text_config(decoder=True))().to_dict()


def build_decoder(config: PretrainedConfig, dtype: torch.dtype | None = None, path: str | None = None) -> Decoder:
    """Build the model without weights, each decoder layer from its own config.

    Args:
        config: may have `per_layer_config`.
        dtype: of the parameters; None: as the config says.
        path: dotted name of the decoder layers, where it is known; None: they are searched for.

    Raises:
        ModelError: the decoder layers cannot be told, or a layer or block that `per_layer_config` names does not exist.
    """
    uneven = bool(layer_overrides(config))
    decoder = Decoder.find(build_skeleton(with_overrides(config, {}) if uneven else config, dtype), path)
    if uneven:
        apply_overrides(decoder, config)
    return decoder


def apply_overrides(decoder: Decoder, config: PretrainedConfig) -> None:
    """Replace the decoder layers that `per_layer_config` names by layers of their own size, on the meta device.

    Blocks that have gone are replaced by modules without parameters.

    Args:
        decoder: built from the config without its overrides, before weights are loaded.
        config: with overrides.

    Raises:
        ModelError: a layer, or a block of it, does not exist.
    """
    plain = with_overrides(config, {})
    layers = decoder.layers
    built: dict[str, nn.ModuleList] = {}
    for layer, values in layer_overrides(config).items():
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
    """Have a layer of its own size attend as the model's config says, which the replaced layer has."""
    before = dict(replaced.named_modules())
    for name, module in layer.named_modules():
        for key, own in list(vars(module).items()):
            shared = vars(before.get(name, replaced)).get(key)
            if isinstance(own, PretrainedConfig) and isinstance(shared, PretrainedConfig):
                setattr(module, key, _LayerConfig(own, shared))


class _LayerConfig:
    """The config of a layer of its own size; how attention and experts are computed, the model's config says.

    It may change at any time (`set_attn_implementation`), and masks are made for what the model's config says.
    """

    _SHARED = ("_attn_implementation", "_experts_implementation")

    def __init__(self, own: PretrainedConfig, shared: PretrainedConfig) -> None:
        self._own, self._shared = own, shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_own", "_shared"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._shared if name in self._SHARED else self._own, name)


def remove_blocks(layer: nn.Module, number: int, removed: Mapping[str, int]) -> None:
    """Replace blocks of a decoder layer, in place, by modules that add nothing to its hidden states.

    Args:
        layer: the decoder layer.
        number: its place in the model.
        removed: dotted name of a module inside the layer -> how many values it returns.

    Raises:
        ModelError: the layer has no such module.
    """
    for name, returns in removed.items():
        try:
            layer.set_submodule(name, RemovedBlock(returns, number), strict=True)
        except (AttributeError, ValueError) as error:
            raise ModelError(
                f"{REMOVED} names {name!r} in layer {number}, a {type(layer).__name__} that has no such module",
                expected=f"among {', '.join(child for child, _ in layer.named_children())}",
            ) from error


class RemovedBlock(nn.Module):
    """Stands where attention or an MLP was: returns zeros, has no parameters, and counts the tokens in the cache.

    Args:
        returns: how many values the block returned; all but the first become None.
        layer: the number of its decoder layer.
    """

    def __init__(self, returns: int, layer: int) -> None:
        super().__init__()
        self.returns, self.layer_idx = returns, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of the first tensor among the arguments, [samples, length, hidden]."""
        arguments = *args, *kwargs.values()
        hidden = next(value for value in arguments if isinstance(value, Tensor))
        for value in arguments:
            if isinstance(value, Cache):
                self._count(value, hidden)
        zeros = torch.zeros_like(hidden)
        return zeros if self.returns == 1 else (zeros, *[None] * (self.returns - 1))

    def _count(self, cache: Cache, hidden: Tensor) -> None:
        """Keep the cache's length right, which is the number of keys in its first layer: add keys of one zero."""
        heads, sizes = 1, (1, 1)
        for layer in cache.layers[self.layer_idx : self.layer_idx + 1]:
            if not isinstance(layer, CacheLayerMixin):
                return  # none of its own: it shared the keys of another layer
            if layer.is_initialized and isinstance(layer.keys, Tensor) and layer.keys.dim() == 4:
                # A static cache may have been given memory for the heads that were there.
                heads, sizes = layer.keys.shape[1], (layer.keys.shape[3], layer.values.shape[3])
        samples, length = hidden.shape[:2]
        keys, values = (hidden.new_zeros(samples, heads, length, size) for size in sizes)
        cache.update(keys, values, self.layer_idx)


def changed(config: PretrainedConfig, changes: Changes) -> PretrainedConfig:
    """A copy of the config with other values at these paths of the text config."""
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
            # Some configs have one number a layer.
            data[key] = [value] * len(data[key]) if isinstance(data.get(key), list) else value


def nested(changes: Changes) -> dict[str, Any]:
    """The changes as mappings in mappings."""
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


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length; its class if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
