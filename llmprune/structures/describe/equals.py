"""An equivalent architecture for configs whose own class refuses sizes that their layers could have.

LlamaConfig requires the hidden size to be a multiple of the number of heads, although no layer needs that: a quarter of
the heads of most Llamas could not be removed. MistralForCausalLM has the same layers without that rule (and without
biases), is supported by the same engines, and keeps the tokenizer.
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
    """An architecture that can replace another.

    Attributes:
        model_type: its name in config.json.
        lacks: attributes of the other that it does not have -> the values at which they have no effect.
        sets: its own attributes -> the values that make it equivalent.
    """

    model_type: str
    lacks: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)


# Class of the model, which several config types may share -> its equivalent.
_EQUALS = {
    "LlamaForCausalLM": _Equal(
        "mistral", {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}, {"sliding_window": None}
    )
}


def equal_config(config: PretrainedConfig, path: str | None = None) -> PretrainedConfig | None:
    """The config of an equivalent architecture; None if none is known.

    Both models are built without weights and compared: names and shapes of parameters, modules, their numbers, buffers.

    Args:
        config: of a causal LM.
        path: dotted name of its decoder layers; None: they are searched for.

    Raises:
        ModelError: one is known, but is not equivalent for these values; the message says which.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    equal = _EQUALS.get(name)
    if equal is None:
        return None
    other = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[equal.model_type]
    data = config.to_dict()
    for key, value in equal.lacks.items():
        if data.pop(key, value) not in (value, None):
            raise ModelError(f"{other} accepts such sizes and is otherwise equivalent, but has no {key}")
    del data["model_type"]
    result = CONFIG_MAPPING[equal.model_type].from_dict({**data, **equal.sets, "architectures": [other]})
    for difference in _model_differences(
        build_decoder(config, path=path).model, build_decoder(result, path=path).model
    ):
        raise ModelError(f"{other} accepts such sizes, but is not equivalent: {difference}")
    return result


def _model_differences(one: PreTrainedModel, other: PreTrainedModel) -> Iterator[str]:
    """How two models differ, apart from the names of their classes and integers in modules."""
    families = [type(model).__name__.removesuffix("ForCausalLM") for model in (one, other)]

    def kind(module: nn.Module) -> str:
        return type(module).__name__.removeprefix(families[0]).removeprefix(families[1])

    def same(key: str, before: object, after: object) -> bool:
        return float not in (type(before), type(after)) or before == after

    return differences(one, other, Expected(kind=kind, value=same))
