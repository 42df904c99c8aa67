"""The tokens that a tokenizer itself puts in front of a text, which models may depend on.

Many models were trained with a BOS token in front of every text, and some break without it: they use it as an attention
sink (Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453). Others have a BOS
token that they never saw there. The tokenizer knows, so it is asked, and not its `bos_token`: what comes before
a text when it adds its special tokens. lm-eval (`add_special_tokens`) and llama.cpp (`add_bos`) go by the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from llmprune.models.boundary import explained

# Any text will do whose tokens are found again when special tokens are added around them.
_PROBE = "a"


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    bos_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Encode a batch of documents; `input_ids` has a list of ids for each."""


def encoded(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The ids of each text.

    Args:
        tokenizer: any callable like a transformers tokenizer.
        texts: any.
        special: whether the tokenizer adds its special tokens.

    Raises:
        ModelError: the tokenizer fails. A damaged one does so only now, with whatever its library raises.
    """
    with explained(
        f"the tokenizer {getattr(tokenizer, 'name_or_path', '')} cannot encode a text",
        expected="a tokenizer that encodes any text",
        fix="download the tokenizer's files again, or correct the value in tokenizer_config.json",
    ):
        # verbose=False: texts longer than the model's context are expected here; they are cut later.
        ids = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [list(row) for row in ids["input_ids"]]


def opening_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that a tokenizer puts in front of a text, such as BOS; empty if it puts nothing there.

    Args:
        tokenizer: any callable like a transformers tokenizer.
    """
    plain, whole = (encoded(tokenizer, [_PROBE], special=special)[0] for special in (False, True))
    if not plain:
        # The vocabulary lacks the probe: whatever is added to an empty text comes before it.
        return tuple(encoded(tokenizer, [""], special=True)[0])
    places = (start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain)
    return tuple(whole[: next(places, 0)])


def named(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens of these ids as the vocabulary spells them, or the ids if the tokenizer cannot say."""
    spell = getattr(tokenizer, "convert_ids_to_tokens", None)
    return [str(token) for token in (spell(list(ids)) if spell else ids)]


def spelled_out(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of these ids, special tokens included; the ids themselves if the tokenizer cannot decode."""
    decode = getattr(tokenizer, "decode", None)
    return str(decode(list(ids))) if decode else " ".join(map(str, ids))
