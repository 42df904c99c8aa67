"""How self-generated sequences begin that continue documents: with the first tokens of each.

What the model then adds is its own: text like the user's, which nobody had to collect in any amount. Where a sequence
reaches an end-of-sequence token, the next document begins.
"""

from pathlib import Path

import torch

from llmprune.errors import CalibrationError
from llmprune.text.chats import rendered
from llmprune.text.documents import has_columns, read_documents, require_source
from llmprune.text.openings import Tokenizer, encoded, opening_of
from llmprune.text.scripts import Script
from llmprune.text.tokens import TextSpec

# A sequence begins with at most this part of its length; so it has room for this many beginnings.
_PARTS = 4


def continuations(spec: TextSpec, tokenizer: Tokenizer) -> tuple[Script, ...]:
    """Scripts that begin with documents, one for each sequence.

    Documents are shuffled by the seed; with fewer documents than sequences, several sequences begin alike, and go on
    differently.

    Args:
        spec: its `continues` names the documents, with `config`, `split` and `column`; length and seed are used.
        tokenizer: the model's; conversations are rendered by its chat template.

    Raises:
        CalibrationError: the documents cannot be read, or there are none.
    """
    assert spec.continues is not None
    require_documents(spec.continues)
    texts = rendered(read_documents(spec.continues, spec.config, spec.split, spec.column), tokenizer)
    known = [text for text in texts if text.strip()]
    if not known:
        raise CalibrationError(
            f"{spec.continues} has no text to continue", expected="documents that are not blank", fix="name another one"
        )
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(spec.seed)).tolist()
    chosen = [known[number] for number in order[: _PARTS * spec.sequences]]
    beginnings = _beginnings(chosen, tokenizer, max(spec.tokens // _PARTS, 1))
    count = len(beginnings)
    return tuple(
        Script(tuple(beginnings[(row + part * spec.sequences) % count] for part in range(_PARTS)))
        for row in range(spec.sequences)
    )


def require_documents(source: str) -> None:
    """Refuse what is known not to be a text of many documents.

    Raises:
        CalibrationError: a local text does not exist, has an unknown suffix, or is one document.
    """
    require_source(source)
    if not has_columns(source):
        raise CalibrationError(
            f"{source} is one document, so every sequence that continues it would begin alike",
            expected="many documents: a .jsonl or .parquet file, a folder of them, or a dataset id",
            fix=f'write one document a line, {{"text": "..."}}, into {Path(source).stem}.jsonl',
        )


def _beginnings(texts: list[str], tokenizer: Tokenizer, most: int) -> list[tuple[int, ...]]:
    """The first tokens of each text, after what the tokenizer puts in front of it."""
    opening = opening_of(tokenizer)
    plain = encoded(tokenizer, texts)
    opened = (tuple(ids) if tuple(ids[: len(opening)]) == opening else (*opening, *ids) for ids in plain)
    return [ids[:most] for ids in opened]
