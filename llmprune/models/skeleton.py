"""From config.json to a model without weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from llmprune.errors import ModelError
from llmprune.storage.packed_config import without_record


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json and check that it describes a causal LM.

    Raises:
        ModelError: it is unreadable, of an unknown type, or not of a causal LM.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}/config.json cannot be read: {' '.join(str(error).split())[:300]}",
            expected="the configuration of a model that the installed transformers knows",
            fix="upgrade transformers if the model is new",
        ) from error
    without_record(config)  # a packed checkpoint is read as the equivalent dense one
    refuse_quantised(config, str(folder))
    architectures = config.architectures or []
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not causal & set(architectures)
    ):
        raise ModelError(
            f"{folder} holds {', '.join(architectures) or config.model_type}, which is not a causal LM",
            expected="an architecture that AutoModelForCausalLM loads",
            fix="use a decoder-only language model; encoders, embedding models and classifiers are not supported",
        )
    return config


def refuse_quantised(config: PretrainedConfig, name: str) -> None:
    """Raise `ModelError` if the model's weights are already quantised; `name` is used in the message."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} is quantised",
            expected="weights in float32, bfloat16 or float16",
            fix="load it dequantised with transformers, save it, and prune that copy",
        )


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model with parameters on the meta device and real buffers.

    Args:
        config: describes a causal LM.
        dtype: of the parameters; None: the config's own.
    """
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, experts_implementation="eager")
    model.tie_weights()  # moving to the meta device untied them
    model.eval()
    model.requires_grad_(False)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars: one per layer would drown out ours."""
    was_active = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active:
            transformers_logging.enable_progress_bar()
