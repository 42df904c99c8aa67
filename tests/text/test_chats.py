"""Conversations as calibration text."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from documents import BOS, TESTBED
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmprune.errors import CalibrationError
from llmprune.text.tokens import TextSpec, load_tokens

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
]
SHARED = [
    {"from": "system", "value": "Be short."},
    {"from": "human", "value": "Name a colour."},
    {"from": "gpt", "value": "Blue."},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
TEXT = "[system] Be short.\n[user] Name a colour.\n[assistant] Blue.\n"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(TESTBED)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def spec(path: Path, column: str, length: int) -> TextSpec:
    return TextSpec(str(path), column=column, samples=1, length=length, order="text", layout="truncate")


def written(path: Path, column: str, turns: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [0], column: [turns]}), path)
    else:
        path.write_text(json.dumps({"id": 0, column: turns}) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("column", "turns"), [("messages", MESSAGES), ("conversations", SHARED)])
def test_conversations_go_through_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str, column: str, turns: Any
) -> None:
    expected = [BOS, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    path = written(tmp_path / f"chats{suffix}", column, turns)
    # The template writes BOS itself: there is one of it.
    assert load_tokens(spec(path, column, len(expected)), tokenizer).ids.tolist() == [expected]


def test_a_folder_of_conversations_is_read_by_datasets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "train.jsonl", "messages", MESSAGES)
    expected = [BOS, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    found = load_tokens(spec(tmp_path / "data", "messages", len(expected)), tokenizer)
    assert found.ids.tolist() == [expected]


def test_contents_in_parts_are_joined(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = written(tmp_path / "chats.jsonl", "messages", PARTS)
    expected = [BOS, *tokenizer("[user] Name a colour.\n", add_special_tokens=False)["input_ids"]]
    assert load_tokens(spec(path, "messages", len(expected)), tokenizer).ids.tolist() == [expected]


def test_the_error_names_the_column(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for column, turns in (("messages", MESSAGES), ("conversations", SHARED)):
        path = written(tmp_path / "chats.jsonl", column, turns)
        with pytest.raises(CalibrationError, match="no column 'text'") as caught:
            load_tokens(TextSpec(str(path), samples=1, length=4), tokenizer)
        assert caught.value.fix.startswith(f"set column: {column}")


@pytest.mark.parametrize(
    "turns",
    [["hello"], [{"role": "user"}], [{"role": 3, "content": "x"}], [{"content": "x"}], [{"role": "user", "content": 5}],
     [{"role": "user", "content": [{"type": "image", "url": "x"}]}], [{"role": "user", "content": []}],
     *([{"role": "user", "content": [part]}] for part in (
         {"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": {}}, {"type": []}, "x", 5, None)),
     [{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}]],
)  # fmt: skip
def test_what_is_no_message_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, turns: Any) -> None:
    path = written(tmp_path / "chats.jsonl", "messages", turns)
    with pytest.raises(CalibrationError, match="line 1, column 'messages' has a turn that is not a message"):
        load_tokens(spec(path, "messages", 4), tokenizer)


def test_a_model_without_a_template_or_with_one_that_fails(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = written(tmp_path / "chats.jsonl", "messages", MESSAGES)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match="chat template fails: roles must alternate"):
        load_tokens(spec(path, "messages", 4), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template") as caught:
        load_tokens(spec(path, "messages", 4), tokenizer)
    assert "set column" in caught.value.fix


def test_a_cell_of_another_form_is_null_in_a_table(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # A table that holds turns of both forms has a column for each key, null where a turn lacks it.
    turns = [{"role": None, "content": None, **turn} for turn in SHARED]
    expected = [BOS, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    path = written(tmp_path / "chats.parquet", "conversations", turns)
    assert load_tokens(spec(path, "conversations", len(expected)), tokenizer).ids.tolist() == [expected]
