"""A few prompts answered by both models: figures say how much worse a model is, these show in what way.

Greedy decoding needs the whole model in memory, so it is left out where that is too large or would take long.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from llmprune.devices import free_bytes
from llmprune.models.boundary import load_stock_model, one_line, read_stock_config
from llmprune.models.skeleton import quiet_transformers
from llmprune.models.source import Source
from llmprune.precision import computed_in
from llmprune.text.openings import Tokenizer, encoded
from llmprune.text.scripts import template_problem

# New tokens of an answer, at most.
TOKENS = 24

# Weights beyond this take too long on a CPU, which reads them all for every token; and the part of the free memory
# that they may take.
_LARGEST_ON_CPU, _MOST_OF_FREE = 8e9, 0.5


@dataclass(frozen=True, slots=True)
class Answers:
    """What both models answer.

    Attributes:
        prompts: as given.
        dense: the dense model's answers, without special tokens; empty if there are none.
        pruned: the pruned model's.
        skipped: why there are no answers; empty if there are.
    """

    prompts: tuple[str, ...]
    dense: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def too_large(source: Source, device: torch.device) -> str:
    """Why a model is not loaded completely for its answers; empty if it is."""
    nbytes = sum(math.prod(p.shape) for p in source.model.parameters()) * source.dtype.itemsize
    if source.folder is None:
        return ""  # it is in memory
    if device.type == "cpu" and nbytes > _LARGEST_ON_CPU:
        return f"{nbytes / 1e9:.1f} GB of weights are too slow on a CPU"
    if nbytes > _MOST_OF_FREE * free_bytes(device):
        return f"{nbytes / 1e9:.1f} GB of weights do not fit into half of the free memory"
    return ""


def stored_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """A checkpoint, packed or not, loaded completely to answer prompts."""
    config = read_stock_config(folder)
    dtype = computed_in(config.dtype or torch.float32, device)
    with quiet_transformers():
        return load_stock_model(folder, config, dtype=dtype, device_map={"": device}).eval()


def answer(model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[str, ...]:
    """Answer prompts greedily: by the chat template where there is one, otherwise by continuing the text.

    Args:
        model: in evaluation mode.
        tokenizer: the model's; must decode.
        prompts: one answer is made for each, with at most 24 tokens.
    """
    return tuple(_answer(model, tokenizer, prompt) for prompt in prompts)


def attempt(prompts: tuple[str, ...], *sides: Callable[[], tuple[str, ...]]) -> Answers:
    """Collect the answers of the dense and the pruned model; what fails is said, because the run itself is done."""
    try:
        dense, pruned = (side() for side in sides)
    except Exception as error:  # noqa: BLE001 - whatever a model's own `generate` raises must not end a finished run
        return Answers(prompts, skipped=f"the models could not be asked: {one_line(error)}")
    return Answers(prompts, dense, pruned)


def _answer(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:
    chats = getattr(tokenizer, "chat_template", None) and template_problem(tokenizer) is None
    if chats:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = encoded(tokenizer, [prompt], special=not chats)[0]
    inputs = torch.tensor([ids], device=model.device)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    settings = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=ends, pad_token_id=_pad(ends))
    with torch.no_grad(), quiet_transformers():
        written: Any = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    return str(tokenizer.decode(written[0, len(ids) :].tolist(), skip_special_tokens=True)).strip()


def _pad(ends: Any) -> int:
    """Any token: nothing is padded in a batch of one, but generate insists."""
    first = ends[0] if isinstance(ends, list) and ends else ends
    return first if isinstance(first, int) else 0
