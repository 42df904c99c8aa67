"""Another architecture that computes the same, for configs whose own class refuses sizes that their layers can have.

LlamaConfig wants a hidden size that is a multiple of its heads, although no layer needs that: a quarter of the heads of
most Llamas could not go. MistralForCausalLM has the same layers without that rule (nor biases), loads as well in every
engine, and leaves the tokenizer as it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune.errors import ModelError
from llmprune.models.differences import Expected, differences
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
    for difference in _unlike(build_decoder(config, path=path).model, build_decoder(result, path=path).model):
        raise ModelError(f"{other} accepts such sizes, but is not the same: {difference}")
    return result


def _unlike(one: PreTrainedModel, other: PreTrainedModel) -> Iterator[str]:
    """What sets two models apart, but for the names of their classes and what is said in whole numbers."""
    families = [type(model).__name__.removesuffix("ForCausalLM") for model in (one, other)]

    def kind(module: nn.Module) -> str:
        return type(module).__name__.removeprefix(families[0]).removeprefix(families[1])

    def same(key: str, before: object, after: object) -> bool:
        return float not in (type(before), type(after)) or before == after

    return differences(one, other, Expected(kind=kind, value=same))
