"""Calibration text that cannot be read, is too short, or was asked for in a way that means nothing."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from documents import DOCUMENTS, TESTBED, one_by_one, write_jsonl, write_parquet
from transformers import (
    AutoTokenizer,
)

from llmprune.errors import CalibrationError, ModelError
from llmprune.text.tokens import TextSpec, load_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TESTBED)


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "values",
    [
        {"source": ""},
        {"samples": 0},
        {"length": 1},
        {"seed": -1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
    ],
    ids=str,
)
def test_values_out_of_range(values):
    (name,) = values
    with pytest.raises(CalibrationError, match=name):
        TextSpec(**values)


@pytest.mark.parametrize(("name", "expected"), [("layout", "pack or truncate"), ("order", "text or shuffled")])
def test_words_that_are_not_on_the_list(name, expected):
    spec = TextSpec()
    # Not through the constructor: where annotations are executed, it refuses the type first.
    object.__setattr__(spec, name, "random")
    with pytest.raises(CalibrationError, match=f"{name} 'random'\nexpected: {expected}"):
        spec.__post_init__()


@pytest.mark.parametrize(
    ("layout", "message"),
    [("pack", "22 tokens in 3 documents .1 of them empty. give 1 of 2 sequences of 20"), ("truncate", "give 0 of 2")],
)
def test_too_little_text(tmp_path, tokenizer, layout, message):
    texts = [DOCUMENTS[2], "", DOCUMENTS[1]]
    assert sum(map(len, one_by_one(tokenizer, texts))) == 22
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    for order in ("text", "shuffled"):
        spec = TextSpec(str(path), samples=2, length=20, layout=layout, order=order)
        with pytest.raises(CalibrationError, match=message) as caught:
            load_tokens(spec, tokenizer)
        assert ("at least 40 tokens" if layout == "pack" else "at least 2 documents of 20") in caught.value.expected


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
def test_files_without_text(tmp_path, tokenizer, name):
    path = tmp_path / name
    write_parquet(path, pyarrow.array([], pyarrow.string())) if name.endswith("parquet") else path.touch()
    with pytest.raises(CalibrationError, match=r"0 tokens .* give 0 of 128 sequences"):
        load_tokens(TextSpec(str(path)), tokenizer)


@pytest.mark.parametrize("source", ["missing.txt", "a/b.jsonl", "./corpus", "~/corpus", "/no/corpus", "data/my/corpus"])
def test_no_such_path(tmp_path, tokenizer, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match="no such file or folder"):
        load_tokens(TextSpec(source), tokenizer)


def test_unknown_kind_of_file(tmp_path, tokenizer):
    (tmp_path / "text.csv").write_text("text\nhello\n")
    with pytest.raises(CalibrationError, match=r"unknown text format[\s\S]*\.txt, \.jsonl, \.parquet"):
        load_tokens(TextSpec(str(tmp_path / "text.csv")), tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "x", "id": 2}', r"line 2: no column 'text'\nexpected: one of content, id"),
        (b"{", "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
        (b'["x"]', "line 2 is a list"),
        (b'{"text": 5}', "line 2: column 'text' holds int"),
        (rb'{"text": "a \ud800"}', "document 2 .* is not text"),
    ],
)
def test_broken_jsonl(tmp_path, tokenizer, line, message):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=message):
        load_tokens(TextSpec(str(path), samples=1, length=2), tokenizer)


def test_parquet_errors(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "text.parquet", DOCUMENTS, column="content")
    with pytest.raises(CalibrationError, match=r"no column 'text'\nexpected: one of id, content"):
        load_tokens(TextSpec(str(path)), tokenizer)
    with pytest.raises(CalibrationError, match="row 1: column 'id' holds int"):
        load_tokens(TextSpec(str(path), column="id"), tokenizer)
    path.write_bytes(b"not parquet")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_tokens(TextSpec(str(path)), tokenizer)


def test_txt_that_is_not_utf8(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"cannot be read.*utf-8"):
        load_tokens(TextSpec(str(tmp_path / "text.txt")), tokenizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "validation"}, r"validation[\s\S]*train"),
        ({"config": "english"}, "english"),
        ({"column": "content"}, r"no column 'content'\nexpected: one of text, id"),
        ({"column": "id"}, "row 1: column 'id' holds int"),
    ],
    ids=str,
)
def test_dataset_errors(tmp_path, tokenizer, dataset_cache, changed, message):
    folder = tmp_path / "repository"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", DOCUMENTS)
    with pytest.raises(CalibrationError, match=message):
        load_tokens(TextSpec(str(folder), **changed), tokenizer)


def test_folder_without_data(tmp_path, tokenizer, dataset_cache):
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_tokens(TextSpec(str(tmp_path)), tokenizer)


def test_hub_while_offline(tokenizer, dataset_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"Couldn't reach 'nobody/corpus-2\.1'[\s\S]*connect to the hub"):
        load_tokens(TextSpec("nobody/corpus-2.1"), tokenizer)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "check the name"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "login"),
        (datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"), ""),
        (ValueError("Config name is missing. Please pick one among: ['en', 'fr']"), "config"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), ""),
    ],
)
def test_hub_refusals_keep_their_reason(tokenizer, monkeypatch, error, fix):
    def refuse(path, name, *, split, streaming):
        assert (path, name, split, streaming) == ("a/b", "en", "test", False)
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match="dataset a/b") as caught:
        load_tokens(TextSpec("a/b", config="en", split="test"), tokenizer)
    assert str(error) in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("self", {"config": "en"}),
        ("self", {"split": "test"}),
        ("self", {"column": "content"}),
        ("self", {"layout": "truncate"}),
        ("self", {"order": "text"}),
        ("text.txt", {"temperature": 0.5}),
        ("text.txt", {"column": "content"}),
        ("text.txt", {"split": "test"}),
        ("text.jsonl", {"config": "en"}),
        ("text.jsonl", {"split": "test"}),
        ("some/dataset", {"temperature": 0.5}),
    ],
)
def test_options_without_effect_are_refused(source, changed):
    (name,) = changed
    with pytest.raises(CalibrationError, match=f"^{name} .*\nexpected: no {name}"):
        TextSpec(source, **changed)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": "a", "other": ' + "[" * 100_000], ids=["all", "inside"])
def test_a_line_nested_without_end_is_named(tmp_path, tokenizer, line):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(CalibrationError, match="line 2 is not JSON"):
        load_tokens(TextSpec(str(tmp_path / "text.jsonl"), samples=1, length=4), tokenizer)


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    ids = []
    for name, encoding in (("plain.txt", "utf-8"), ("marked.txt", "utf-8-sig")):
        (tmp_path / name).write_text("A sentence with some words in it.", encoding=encoding)
        ids.append(load_tokens(TextSpec(str(tmp_path / name), samples=1, length=4, order="text"), tokenizer).ids)
    assert ids[0].equal(ids[1])


def test_a_damaged_table_is_not_said_to_be_badly_encoded(tmp_path, tokenizer):
    write_parquet(tmp_path / "text.parquet", DOCUMENTS)
    content = (tmp_path / "text.parquet").read_bytes()
    (tmp_path / "text.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(CalibrationError, match="cannot be read") as caught:
        load_tokens(TextSpec(str(tmp_path / "text.parquet"), samples=1, length=4), tokenizer)
    assert "download it again" in caught.value.fix


def test_a_folder_s_error_names_the_cause(tmp_path, tokenizer, dataset_cache):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.jsonl").write_text("{nope")
    with pytest.raises(CalibrationError, match=r"cannot be loaded: .*: .*JSON parse error") as caught:
        load_tokens(TextSpec(str(tmp_path / "data"), samples=1, length=4), tokenizer)
    assert "a folder with such files alone" in caught.value.fix
    saved = datasets.Dataset.from_dict({"text": ["a"]})
    saved.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(CalibrationError, match="save_to_disk") as caught:
        load_tokens(TextSpec(str(tmp_path / "saved"), samples=1, length=4), tokenizer)
    assert "to_parquet" in caught.value.fix


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x"), NotImplementedError("x"), TypeError("x")])
def test_whatever_the_library_raises_is_a_typed_error(tokenizer, monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match="dataset a/b"):
        load_tokens(TextSpec("a/b"), tokenizer)


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_a_damaged_tokenizer_is_a_typed_error(tmp_path, layout):
    path = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    damaged = AutoTokenizer.from_pretrained(TESTBED)
    damaged.model_max_length = "many"  # as tokenizer_config.json may say
    with pytest.raises(ModelError, match="cannot encode a text: '>' not supported"):
        load_tokens(TextSpec(str(path), samples=1, length=4, layout=layout), damaged)
