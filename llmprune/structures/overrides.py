"""Configs whose decoder layers differ in size, and how to build them.

Widths that differ between layers are written as overrides, the same form that newer transformers reads:

    "per_layer_config": {"3": {"intermediate_size": 1024}, "7": {"num_attention_heads": 8, "num_key_value_heads": 2}}

Keys are layer numbers in decimal, values are attributes of the (text) config for that layer; nested mappings are
merged. Layers that are not named are built from the config itself. The few architectures that use this key themselves
(Gemma 4) keep their own, and cannot have widths that differ.
"""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.decoder import find_decoder_layers
from llmprune.errors import ModelError
from llmprune.skeleton import build_skeleton

# What building a model from an impossible config raises.
UNBUILDABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip
# Where a value lies in the text config -> the value.
Changes = dict[tuple[str, ...], int]

_KEY = "per_layer_config"
# Lets a class of newer transformers read its own attributes although some layers have other values.
_ALLOWED = "allow_global_per_layer_attribute_access"


def layer_overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says: layer -> attributes that differ there; nothing where the architecture owns it."""
    written = None if _owns_overrides(config) else text_part(config.to_dict(), config).get(_KEY)
    return {int(layer): dict(values) for layer, values in (written or {}).items()}


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
                fix="remove as many groups from each layer",
            )
        return type(config).from_dict(data)
    for key in (_KEY, _ALLOWED):
        text.pop(key, None)
    if overrides:
        text |= {_KEY: dict(overrides), _ALLOWED: True}
        for name, value in ((name, value) for values in overrides.values() for name, value in values.items()):
            text.setdefault(name, value)  # a head size that followed from the number of heads, which is now explicit
    try:
        return type(config).from_dict(data)
    except UNBUILDABLE as error:
        raise ModelError(f"{type(config).__name__} does not take these values: {one_line(error)}") from error


def _owns_overrides(config: PretrainedConfig) -> bool:
    return _KEY in type(config.get_text_config(decoder=True))().to_dict()


def build_uneven_skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model without weights, each decoder layer from its own config.

    Args:
        config: may have `per_layer_config`.
        dtype: of the parameters; None: as the config says.
    """
    model = build_skeleton(with_overrides(config, {}), dtype)
    apply_overrides(model, config)
    return model


def apply_overrides(model: PreTrainedModel, config: PretrainedConfig, decoder_layers: str | None = None) -> None:
    """Replace the decoder layers that `per_layer_config` names by layers of their own size, on the meta device.

    Args:
        model: built from the config without its overrides, before weights are loaded.
        config: with overrides.
        decoder_layers: dotted name of the decoder layers, where they are not found.

    Raises:
        ModelError: a layer does not exist.
    """
    plain = with_overrides(config, {})
    _, layers = find_decoder_layers(model, decoder_layers)
    built: dict[str, nn.ModuleList] = {}
    for layer, values in layer_overrides(config).items():
        if not 0 <= layer < len(layers):
            raise ModelError(f"per_layer_config names layer {layer}", expected=f"layers below {len(layers)}")
        if repr(values) not in built:
            own = build_skeleton(_merged(plain, values), model.dtype)
            built[repr(values)] = find_decoder_layers(own, decoder_layers)[1]
        layers[layer] = built[repr(values)][layer]
    model.set_attn_implementation(model.config._attn_implementation)


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
