"""The tokens of a run: calibration and evaluation text, read or sampled from the dense model."""

import math
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmprune.calibration import TextSpec, Tokenizer, Tokens, load_tokens
from llmprune.checkpoint import read_index
from llmprune.errors import ModelError
from llmprune.generation import generate_text
from llmprune.precision import computed_in
from llmprune.skeleton import quiet_transformers, read_config
from llmprune.source import widened


def load_texts(
    specs: Mapping[str, TextSpec], model: PreTrainedModel | Path, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Tokens]:
    """Load every text of a run; the dense model is loaded whole, once, only if a text is sampled from it.

    Args:
        specs: name -> text.
        model: the dense model, in memory or as a checkpoint folder.
        tokenizer: the model's.
        device: where text is sampled.

    Raises:
        CalibrationError: a text cannot be read or is too short.
    """
    dense: PreTrainedModel | None = model if isinstance(model, PreTrainedModel) else None

    def generate(spec: TextSpec) -> Tensor:
        nonlocal dense
        if dense is None:
            assert isinstance(model, Path)
            dense = _load_dense(model, device)
        with widened(dense, computed_in(dense.dtype, dense.device)):
            return generate_text(dense, spec, tokenizer.bos_token_id)

    return {name: load_tokens(spec, tokenizer, generate) for name, spec in specs.items()}


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read a model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no tokenizer in {folder}: {str(error).strip().splitlines()[0]}",
            expected="the tokenizer's files beside the weights",
            fix="save the model's tokenizer into the folder, or pass one from Python",
        ) from error


def _load_dense(folder: Path, device: torch.device) -> PreTrainedModel:
    """The whole model; what does not fit the device is left to accelerate, which offloads to CPU and disk."""
    dtype = computed_in(read_config(folder).dtype or torch.float32, device)
    nbytes = sum(math.prod(stored.shape) for stored in read_index(folder).values()) * dtype.itemsize
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    fits = nbytes < 0.8 * room
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device} if fits else "auto", experts_implementation="eager"
        )
