"""The texts that a pruned model is trained and measured on: what there is, unless a number of sequences is given."""

from dataclasses import replace
from pathlib import Path

import torch

from llmprune.errors import RecoveryError
from llmprune.models.boundary import load_tokenizer
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.progress import Progress, Watcher
from llmprune.text.loading import check_texts, load_texts, model_positions
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import TextSpec, Tokens

# The most sequences where no number is given; a text of the hub may have millions.
_MOST = 8192

# The share of tokens that are the same in both tokenizers; a chat model may name a few of its base's anew.
_SAME = 0.9


def training_spec(text: TextSpec, source: CheckpointSource, device: torch.device) -> TextSpec:
    """The text with its length filled in, and its number of sequences where it is generated."""
    fitted = text.fitted(model_positions(source.config), device.type)
    return fitted if text.source == "self" else replace(fitted, samples=text.samples)


def read_training(
    text: TextSpec, source: CheckpointSource, tokenizer: Tokenizer, device: torch.device, watch: Watcher
) -> Tokens:
    """Read or sample what is trained on.

    Args:
        text: as `training_spec` returns it.
        source: the model that text is sampled from.
        tokenizer: its tokenizer.
        device: where text is sampled.
        watch: told about every step.

    Raises:
        CalibrationError: the text cannot be read or is too short.
    """
    watch(Progress("training text", step=text.summary if text.samples else f"all of {text.source}"))
    check_texts({"training": text}, source)
    if text.samples is None:
        text = replace(text, samples=_available(text, source, tokenizer, device))
    return load_texts({"training": text}, source, tokenizer, device, watch)["training"]


def read_evaluation(
    text: TextSpec, source: CheckpointSource, tokenizer: Tokenizer, device: torch.device, watch: Watcher
) -> Tokens:
    """Read what perplexity is measured on: as many sequences as a run usually takes, or all that the text has.

    Args:
        text: its length and number of sequences may be open.
        source: the model, for the positions that it has.
        tokenizer: its tokenizer.
        device: where it is measured.
        watch: told about every step.

    Raises:
        CalibrationError: the text cannot be read, or has fewer sequences than are asked for.
    """
    fitted = text.fitted(model_positions(source.config), device.type)
    check_texts({"evaluation": fitted}, source)
    if text.samples is None and text.source != "self":
        fitted = replace(fitted, samples=min(fitted.sequences, _available(fitted, source, tokenizer, device)))
    return load_texts({"evaluation": fitted}, source, tokenizer, device, watch)["evaluation"]


def _available(text: TextSpec, source: CheckpointSource, tokenizer: Tokenizer, device: torch.device) -> int:
    """How many sequences a text has, at least 1 and at most `_MOST`."""
    first = load_texts(
        {"training": replace(text, samples=1, order="shuffled", layout="pack")}, source, tokenizer, device
    )
    tokens = first["training"].description["tokens_available"]
    assert isinstance(tokens, int)
    return min(max(1, tokens // text.tokens), _MOST)


def tokenizer_folder(pruned: Path, dense: Path | None) -> Path:
    """Where the tokenizer is read: with the pruned model, or with the dense one if only that has it."""
    return pruned if dense is None or _has_tokenizer(pruned) else dense


def require_same_tokens(pruned: Path, dense: Path | None) -> None:
    """Refuse a dense model whose tokenizer has other numbers for the tokens: it would be asked about another text.

    Raises:
        RecoveryError: says how many numbers are the same.
    """
    if dense is None or not (_has_tokenizer(pruned) and _has_tokenizer(dense)):
        return
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (pruned, dense))
    same = sum(theirs.get(token) == number for token, number in ours.items())
    if same < _SAME * min(len(ours), len(theirs)):
        raise RecoveryError(
            f"the dense model has another tokenizer than the pruned one: {same:,} of {len(ours):,} tokens are the same",
            expected="two models that read the same tokens",
            fix="pass the model that this one was pruned from",
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
