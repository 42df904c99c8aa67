"""Another architecture that computes the same, for configs whose own class refuses sizes that their layers can have.

LlamaConfig wants a hidden size that is a multiple of its heads, although no layer needs that: a quarter of the heads of
most Llamas could not go. MistralForCausalLM has the same layers without that rule (nor biases), loads as well in every
engine, and leaves the tokenizer as it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune.errors import ModelError
from llmprune.models.uneven import build_decoder


@dataclass(frozen=True, slots=True)
class _Equal:
    """An architecture that can stand in for another.

    Attributes:
        model_type: as config.json calls it.
        lacks: attributes of the other that it does not have -> the values with which nothing depends on them.
        sets: its own attributes -> the values that make it the same.
    """

    model_type: str
    lacks: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)


# Class of the model, which several types of config may share -> the one that equals it.
_EQUALS = {
    "LlamaForCausalLM": _Equal(
        "mistral", {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}, {"sliding_window": None}
    )
}


def equal_config(config: PretrainedConfig, path: str | None = None) -> PretrainedConfig | None:
    """The same model as the config of another class; None if no architecture is known that equals it.

    Both models are built without weights and compared: names and shapes of parameters, modules, their numbers, buffers.

    Args:
        config: of a causal LM.
        path: dotted name of its decoder layers; None: they are searched for.

    Raises:
        ModelError: one equals it, but not with these values; says which.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    equal = _EQUALS.get(name)
    if equal is None:
        return None
    other = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[equal.model_type]
    data = config.to_dict()
    for key, value in equal.lacks.items():
        if data.pop(key, value) not in (value, None):
            raise ModelError(f"{other}, which accepts such sizes and is the same otherwise, has no {key}")
    del data["model_type"]
    result = CONFIG_MAPPING[equal.model_type].from_dict({**data, **equal.sets, "architectures": [other]})
    for difference in _differences(build_decoder(config, path=path).model, build_decoder(result, path=path).model):
        raise ModelError(f"{other} accepts such sizes, but is not the same: {difference}")
    return result


def _differences(one: PreTrainedModel, other: PreTrainedModel) -> Iterator[str]:
    """What sets two models apart, but for the names of their classes."""
    for before, after in zip(_parts(one), _parts(other), strict=False):
        if before[:2] != after[:2]:
            yield f"{before[0]} is {before[1]}, {after[0]} is {after[1]}"
    if len(list(_parts(one))) != len(list(_parts(other))):
        yield "it has another number of modules or parameters"
    buffers = dict(other.named_buffers())
    for name, buffer in one.named_buffers():
        if name not in buffers or not torch.equal(buffer, buffers.pop(name)):
            yield f"the buffer {name} has other values"
    yield from (f"the buffer {name} is new" for name in buffers)


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, object]]:
    """Every module with its class and numbers, and every parameter with its shape."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    for name, module in model.named_modules():
        yield name, type(module).__name__.removeprefix(family)
        yield from ((f"{name}.{key}", value) for key, value in sorted(vars(module).items()) if type(value) is float)
    yield from ((name, tuple(parameter.shape)) for name, parameter in model.named_parameters(remove_duplicate=False))
