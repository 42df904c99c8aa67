"""Write the files of the offline tasks: what the bundled test model samples from itself, and how it would go on.

python -m llmprune.eval.tasks.write
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.serving.loader import load, load_tokenizer
from llmprune.storage.hub import TESTBED

_SEED = 20
_DOCUMENTS, _LENGTH = 320, 120
_WORDS, _CHOICES, _CONTINUATIONS = 24, 64, 48
_NEW_TOKENS = 8  # max_gen_toks in continue.yaml

# The model has read the headers of proposals; what it makes of names and addresses must not look like somebody's.
_PERSONAL = re.compile("@|author|sponsor|delegate|owner|reviewer|approver|contact|discussion|copyright", re.IGNORECASE)

Row = dict[str, Any]


def main() -> None:
    """Write all three files."""
    tokenizer = load_tokenizer(TESTBED)
    models = [load(TESTBED, device="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    documents = [ids for ids in _sample(models[0]) if not _PERSONAL.search(tokenizer.decode(ids))]
    at = _WORDS + _CHOICES
    _write("words.jsonl", ({"text": tokenizer.decode(ids)} for ids in documents[:_WORDS]))
    _write("choice.jsonl", _choices(documents[_WORDS:at], tokenizer))
    _write("continue.jsonl", list(_continuations(documents[at:], models, tokenizer))[:_CONTINUATIONS])


def _sample(model: PreTrainedModel) -> list[list[int]]:
    torch.manual_seed(_SEED)
    start = torch.full((_DOCUMENTS, 1), model.config.bos_token_id)
    special = [model.config.bos_token_id, model.config.eos_token_id]
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=_LENGTH,
        min_new_tokens=_LENGTH,
        bad_words_ids=[special[:1]],
    )
    return [row for row in ids[:, 1:].tolist() if not set(row) & set(special)]


def _choices(documents: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """The end of a text, hidden among the ends of three others."""
    draw = random.Random(_SEED)
    ends = [tokenizer.decode(ids[60:72]) for ids in documents]
    for index, ids in enumerate(documents):
        order = draw.sample(range(4), 4)
        choices = [ends[(index + step) % len(ends)] for step in order]
        yield {"context": tokenizer.decode(ids[20:60]), "choices": choices, "label": order.index(0)}


def _continuations(
    documents: list[list[int]], models: list[PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Row]:
    """The likeliest next words, where they do not hang on rounding."""
    for ids in documents:
        prompt = tokenizer.decode(ids[:48])
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        written = {
            tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=_NEW_TOKENS)[0, length:])
            for model in models
        }
        continuation = written.pop().split("\n")[0].lstrip()
        if not written and continuation:
            yield {"prompt": prompt, "continuation": continuation}


def _write(name: str, rows: Any) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (Path(__file__).parent / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
