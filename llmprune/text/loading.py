"""The tokens of a run: calibration and evaluation text, read or sampled from the dense model."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.devices import free_bytes
from llmprune.errors import CalibrationError, MissingTokenizerError
from llmprune.models.boundary import load_stock_model, load_tokenizer, read_stock_config
from llmprune.models.skeleton import quiet_transformers
from llmprune.models.source import Source, widened
from llmprune.precision import computed_in
from llmprune.progress import Progress, Watcher, ignore
from llmprune.text.continuations import continuations, require_documents
from llmprune.text.documents import require_source
from llmprune.text.generated import generate_text
from llmprune.text.mix import Text, joined
from llmprune.text.openings import Tokenizer
from llmprune.text.scripts import scripts_of, template_problem
from llmprune.text.tokens import TextSpec, Tokens, load_tokens

_SAMPLING = "sampling text"

# The names under which configs give the number of positions.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def load_texts(
    specs: Mapping[str, Text],
    source: Source,
    tokenizer: Tokenizer,
    device: torch.device,
    watch: Watcher = ignore,
) -> dict[str, Tokens]:
    """Load every text of a run; the dense model is loaded completely, once, only if a text is sampled from it.

    Args:
        specs: name -> text, or a mix of several.
        source: the dense model.
        tokenizer: the model's.
        device: where text is sampled.
        watch: called while text is sampled.

    Raises:
        CalibrationError: a text cannot be read, is too short, has sequences longer than the model's positions, or
            tokens outside the model's vocabulary.
    """
    check_texts(specs, source)
    parts = {(name, number): part for name, spec in specs.items() for number, part in enumerate(spec.parts)}
    loaded = _load_parts(parts, source, tokenizer, device, watch)
    texts = {
        name: joined(spec, [loaded[name, number] for number in range(len(spec.parts))]) for name, spec in specs.items()
    }
    if (problem := template_problem(tokenizer)) and any(map(_made_up, parts.values())):
        watch(Progress(f"note: {problem}"))
        texts = {
            name: replace(tokens, description=tokens.description | {"note": problem})
            if any(map(_made_up, specs[name].parts))
            else tokens
            for name, tokens in texts.items()
        }
    return texts


def _made_up(spec: TextSpec) -> bool:
    """Whether nothing of it is read: the model makes up even how its sequences begin."""
    return spec.source == "self" and spec.continues is None


def _load_parts(
    specs: Mapping[tuple[str, int], TextSpec],
    source: Source,
    tokenizer: Tokenizer,
    device: torch.device,
    watch: Watcher,
) -> dict[tuple[str, int], Tokens]:
    """Load single texts, and check that the model knows their tokens."""
    folder = source.folder
    dense = source.model if folder is None else None
    # One stage for all of them, because it is one kind of work.
    waiting = [spec.sequences * spec.tokens for spec in specs.values() if spec.source == "self"]
    total = sum(waiting)

    def generate(spec: TextSpec) -> Tensor:
        nonlocal dense
        if dense is None:
            assert folder is not None
            watch(Progress(_SAMPLING, 0, total, "loading the dense model", unit="token"))
            dense = _load_dense(source, folder, device)
        before = total - sum(waiting)
        scripts = scripts_of(tokenizer) if spec.continues is None else continuations(spec, tokenizer)
        with widened(dense, computed_in(dense.dtype, dense.device)):
            ids = generate_text(dense, spec, scripts, watch=_teller(before, total, watch))
        waiting.pop(0)
        return ids

    # What is read comes first: a text that is too short must not be found after minutes of sampling.
    order = sorted(specs, key=lambda name: specs[name].source == "self")
    texts = {name: load_tokens(specs[name], tokenizer, generate) for name in order}
    for name, tokens in texts.items():
        _check_vocabulary(tokens, source.model, specs[name].source)
    return texts


def model_positions(config: PretrainedConfig) -> int | None:
    """The model's maximum sequence length; None if its config sets no limit."""
    text = config.get_text_config()
    return next((size for name in _POSITIONS if (size := getattr(text, name, None))), None)


def check_texts(specs: Mapping[str, Text], source: Source) -> None:
    """Check what can be checked before any text is read.

    Raises:
        CalibrationError: a local text does not exist, or its sequences are longer than the model's positions.
    """
    positions = model_positions(source.model.config)
    for name, spec in specs.items():
        if positions is not None and spec.tokens > positions:
            raise CalibrationError(
                f"{name}: sequences of {spec.tokens} tokens for a model with {positions} positions",
                expected=f"a length of at most {positions}",
                fix=f"set length to {positions} or less",
            )
        for part in spec.parts:
            if part.source != "self":
                require_source(part.source)
            elif part.continues is not None:
                require_documents(part.continues)


def _check_vocabulary(tokens: Tokens, model: PreTrainedModel, text: str) -> None:
    known, largest = model.get_input_embeddings().weight.shape[0], int(tokens.ids.max())
    if largest >= known:
        raise CalibrationError(
            f"{text}: the tokenizer produces token {largest}, but the model has only {known} embeddings",
            expected=f"token ids below {known}",
            fix="use the tokenizer that the model was trained with, or resize_token_embeddings and save the model",
        )


def tokenizer_for(specs: Iterable[Text], folder: Path | str, config: PretrainedConfig) -> Tokenizer:
    """Read a model's tokenizer; a model without one needs none if all its texts are self-generated.

    Args:
        specs: the texts of a run.
        folder: of the model.
        config: of the model; gives the BOS token if there is no tokenizer.

    Raises:
        MissingTokenizerError: there is none although a text has to be tokenised.
        ModelError: it cannot be read.
    """
    try:
        return load_tokenizer(folder)
    except MissingTokenizerError:
        if not all(_made_up(part) for spec in specs for part in spec.parts):
            raise
        return _NoTokenizer(config.get_text_config().bos_token_id)


@dataclass
class _NoTokenizer:
    """Stands in for the tokenizer of a model that has none."""

    bos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool = True, **options: Any) -> Mapping[str, Any]:
        """Encode nothing but what would be put in front of a text."""
        opening = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": [opening for _ in text]}


def _teller(before: int, total: int, watch: Watcher) -> Callable[[int], None]:
    return lambda tokens: watch(Progress(_SAMPLING, before + tokens, total, unit="token"))


def _load_dense(source: Source, folder: Path, device: torch.device) -> PreTrainedModel:
    """The whole model; if it does not fit on the device, accelerate offloads part of it to CPU and disk.

    It is in its own dtype, which rounds what transformers computes from the config (such as the scale of Gemma's
    embeddings); `widened` then makes of it what it makes of a model in memory. Packed weights are unpacked for it, as
    bytes are nothing to widen. What is offloaded cannot be widened later.
    """
    config = read_stock_config(folder)
    whole = fits(whole_size(source), device)
    placed: Any = {"": device} if whole else "auto"
    own = config.dtype or torch.float32
    dtype = own if whole else computed_in(own, device)
    with quiet_transformers():
        model = load_stock_model(folder, config, dtype=dtype, device_map=placed, experts_implementation="eager")
    if whole and hasattr(model, "hf_quantizer"):
        model.dequantize()
    return model


def whole_size(source: Source) -> int:
    """Bytes of the whole model in the dtype in which the run computes."""
    return sum(math.prod(parameter.shape) for parameter in source.model.parameters()) * source.dtype.itemsize


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether a whole model of this size is loaded to generate text, and nothing of it offloaded."""
    return nbytes < 0.8 * free_bytes(device)
