"""From config.json to a model without weights."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmprune.errors import ModelError
from llmprune.models.boundary import auto_class_for, bounded, build_stock_model, read_stock_config
from llmprune.storage.packed_config import without_record


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json and check that it describes a causal LM.

    Raises:
        ModelError: it is unreadable, of an unknown type, or not of a causal LM.
        CheckpointError: it is not a JSON object.
    """
    config = read_stock_config(folder)
    without_record(config)  # a packed checkpoint is read as the equivalent dense one
    refuse_quantised(config, str(folder))
    names = [str(name) for name in config.architectures or ()]
    if auto_class_for(config) is None or (names and not any(map(_generates, names))):
        raise ModelError(
            f"{folder} holds {', '.join(names) or config.model_type}, which is not a causal LM",
            expected="an architecture that AutoModelForCausalLM loads",
            fix="use a decoder-only language model; encoders, embedding models and classifiers are not supported",
        )
    return config


def _generates(name: str) -> bool:
    """Whether a class of transformers generates text; of one that it lacks, the names of the tensors decide."""
    stock = getattr(transformers, name, None)
    return stock is None or bool(getattr(stock, "can_generate", bool)())


def refuse_quantised(config: PretrainedConfig, name: str) -> None:
    """Raise `ModelError` if the model's weights are already quantised; `name` is used in the message."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} is quantised",
            expected="weights in float32, bfloat16 or float16",
            fix="load it dequantised with transformers, save it, and prune that copy",
        )


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype | None = None, tensors: int | None = None
) -> PreTrainedModel:
    """Build the model with parameters on the meta device and real buffers.

    Args:
        config: describes a causal LM.
        dtype: of the parameters; None: the config's own.
        tensors: how many the checkpoint has; None: it is not known yet.

    Raises:
        CheckpointError: the config describes a model with far more parameters than tensors.
    """
    dtype = dtype or config.dtype or torch.float32
    with contextlib.ExitStack() as stack:
        stack.enter_context(init_empty_weights(include_buffers=False))
        stack.enter_context(quiet_transformers())
        stack.enter_context(_nothing_drawn())
        if tensors is not None:
            stack.enter_context(bounded(tensors))
        model = build_stock_model(copy.deepcopy(config), dtype=dtype, experts_implementation="eager")
    model.tie_weights()  # moving to the meta device untied them
    model.eval()
    model.requires_grad_(False)
    return model


@contextlib.contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Keep transformers from drawing numbers for the meta device, which holds none: half of the time of building."""
    initialize = PreTrainedModel.initialize_weights

    def initialize_the_rest(model: PreTrainedModel) -> None:
        empty: list[Any] = [parameter for parameter in model.parameters() if parameter.is_meta]
        for parameter in empty:
            parameter._is_hf_initialized = True  # as transformers marks what it has loaded
        initialize(model)
        for parameter in empty:
            del parameter._is_hf_initialized

    PreTrainedModel.initialize_weights = initialize_the_rest
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = initialize


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars: one per layer would drown out ours."""
    was_active = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active:
            transformers_logging.enable_progress_bar()
