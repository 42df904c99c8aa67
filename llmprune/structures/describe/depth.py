"""Describe a model with fewer decoder layers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from llmprune.errors import ModelError
from llmprune.models.boundary import one_line
from llmprune.models.differences import Expected, differences
from llmprune.models.uneven import (
    REMOVED,
    UNBUILDABLE,
    build_decoder,
    read_per_layer,
    text_part,
    with_per_layer,
)
from llmprune.structures.describe.audit import run_failures
from llmprune.structures.find.tracing import OWN_NUMBER

# Integers that count the first, or the last, layers that are special.
_FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "num_hash_layers")
_LAST = ("num_kv_shared_layers",)
# Lists of layer numbers, as opposed to lists with one entry per layer.
_NUMBERS = ("attn_layer_indices", "mlp_only_layers", "moe_layers", "full_attn_idxs")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Lists unrelated to layers, whatever their length.
_OTHER_LISTS = ("architectures", "time_step_limit", "mlp_multipliers", "eos_token_id", "pad_token_id")


def drop_layers(
    config: PretrainedConfig, kept: Sequence[int], path: str | None = None
) -> tuple[PretrainedConfig, dict[int, int]]:
    """The config of the model with only some of its decoder layers.

    Args:
        config: of the whole model.
        kept: the layers to keep, ascending and distinct.
        path: dotted name of the decoder layers; None: they are searched for.

    Returns:
        The config, and the new number of each kept layer (for the checkpoint's keys).

    Raises:
        ModelError: the layers do not exist, or the architecture derives a layer's form from its number in a way that
            the kept layers cannot preserve.
    """
    before = build_decoder(config, path=path)
    path, layers = before.path, before.layers
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(layers):
        raise ModelError(f"layers {list(kept)} of {len(layers)} are to be kept", expected="ascending layer numbers")
    data = config.to_dict()
    text = text_part(data, config)
    if text.get("scale_attn_by_inverse_layer_idx"):
        raise _changed(path, kept[-1], "its attention is scaled by its layer number")
    text.update(_renumbered(text, kept, len(layers)))
    try:
        smaller = type(config).from_dict(data)
        after = build_decoder(smaller, path=path)
    except UNBUILDABLE as error:
        raise _changed(path, kept[-1], f"the model cannot be built: {one_line(error)}") from error
    if len(after.layers) != len(kept):
        raise _changed(path, kept[-1], f"the model would have {len(after.layers)} layers, not {len(kept)}")
    numbers = {old: new for new, old in enumerate(kept)}
    for old, new in numbers.items():
        for difference in _differences_at(layers[old], after.layers[new], numbers):
            raise _changed(path, old, difference)
    for problem in run_failures(after):
        raise _changed(path, kept[0], problem)
    return smaller, numbers


def _renumbered(text: Mapping[str, Any], kept: Sequence[int], count: int) -> Iterator[tuple[str, Any]]:
    """The entries of a text config that change, with their new values."""
    for key, value in text.items():
        if key in _COUNTS and value == count:
            yield key, len(kept)
        elif key in _NUMBERS and isinstance(value, list):
            yield key, [new for new, old in enumerate(kept) if old in value]
        elif isinstance(value, list | tuple) and len(value) == count and key not in _OTHER_LISTS:
            yield key, [value[layer] for layer in kept]
        elif key in _FIRST and type(value) is int:
            yield key, sum(layer < value for layer in kept)
        elif key in _LAST and type(value) is int:
            yield key, sum(layer >= count - value for layer in kept)
        elif key == "per_layer_config" and value:
            widths = {int(layer): values for layer, values in value.items()}
            yield key, {str(new): widths[old] for new, old in enumerate(kept) if old in widths}


def _differences_at(before: nn.Module, after: nn.Module, numbers: Mapping[int, int]) -> Iterator[str]:
    """How a layer would differ at its new position."""

    def same(key: str, value: Any, new: Any) -> bool:
        if key in OWN_NUMBER or key == "training":
            return True
        # A reference to another layer follows that layer's new number.
        moves = key.endswith(("layer_index", "layer_idx")) and type(value) is int
        return bool(new == (numbers.get(value) if moves else value))

    return differences(before, after, Expected(value=same))


def _changed(path: str, layer: int, why: str) -> ModelError:
    return ModelError(
        f"{path}.{layer} would not be the same at its new position: {why}",
        expected="identical layers, or a config that lists the type of each layer",
        fix="keep other layers, so that the architecture's pattern of layers is preserved",
    )


def without_blocks(
    config: PretrainedConfig, removed: Mapping[int, Mapping[str, int]], path: str | None = None
) -> PretrainedConfig:
    """The config of the model without some sub-blocks; existing entries of `per_layer_config` are kept.

    Args:
        config: of the model, with or without layer-specific sizes.
        removed: layer -> the modules of the sub-blocks removed there, as in `SubBlock.modules`.
        path: dotted name of the decoder layers; None: they are searched for.

    Raises:
        ModelError: the architecture defines `per_layer_config` itself, a layer or a module does not exist, or the model
            does not run without it.

    Example:
        >>> without_blocks(config, {3: {"self_attn": 2}})  # doctest: +SKIP
    """
    per_layer = {str(layer): values for layer, values in read_per_layer(config).items()}
    for layer, modules in removed.items():
        if modules:
            values = per_layer.setdefault(str(layer), {})
            values[REMOVED] = {**values.get(REMOVED, {}), **modules}
    smaller = with_per_layer(config, per_layer)
    for problem in run_failures(build_decoder(smaller, path=path)):
        shown = ", ".join(f"{name} of layer {layer}" for layer, modules in removed.items() for name in modules)
        raise ModelError(
            f"without {shown}, {problem}",
            expected="blocks whose outputs nothing else reads",
            fix="keep these blocks, or remove whole layers",
        )
    return smaller
