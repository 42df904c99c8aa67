"""Documents for calibration: written to files, and encoded one by one."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import processors

TESTBED = Path(__file__).parents[1] / "eval" / "testbed"


BOS = 0


# 40 documents of 3 to 120 words: shorter and longer than the samples of the tests.
DOCUMENTS = [" ".join(f"word{(7 * i + j * j) % 97} of {i}" for j in range(1 + i % 40)) for i in range(40)]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
    return path


def one_by_one(tokenizer, texts):
    """Encode without batches: the BOS and the bare ids of each document that is not blank."""
    return [[BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts if text.strip()]


def without_opening(tokenizer):
    """The tokenizer as it is, except that it puts nothing in front of a text."""
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert tokenizer("")["input_ids"] == []
    return tokenizer
