"""From documents to tokens: layouts, orders, sources, digests."""

import hashlib
import json
import logging
import struct
from pathlib import Path

import datasets
import pytest
import torch
from documents import BOS, DOCUMENTS, TESTBED, one_by_one, without_opening, write_jsonl, write_parquet
from transformers import (
    AutoTokenizer,
)

from llmprune.errors import CalibrationError
from llmprune.text.tokens import TextSpec, load_tokens

SHARED_TEXT = Path(__file__).parents[3] / "shared" / "testbed" / "calibration.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TESTBED)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def windows_of(tokenizer, texts, length, *, opened=True):
    flat = [token for document in one_by_one(tokenizer, texts) for token in document]
    windows = [flat[start : start + length] for start in range(0, len(flat) - length + 1, length)]
    return [[BOS, *window[1:]] if opened else window for window in windows]


class Recorder:
    """A tokenizer that remembers how often and with how many documents it was called."""

    def __init__(self, tokenizer):
        self.tokenizer, self.bos_token_id, self.sizes = tokenizer, tokenizer.bos_token_id, []

    def __call__(self, text, **options):
        self.sizes.append(len(text))
        return self.tokenizer(text, **options)


# Layouts and orders


@pytest.mark.parametrize("length", [2, 7, 64])
def test_pack_in_text_order_equals_the_slow_reference(jsonl, tokenizer, length):
    tokens = load_tokens(TextSpec(str(jsonl), samples=9, length=length, order="text"), tokenizer)
    assert tokens.ids.dtype == torch.int64
    assert tokens.ids.tolist() == windows_of(tokenizer, DOCUMENTS, length)[:9]


@pytest.mark.parametrize("length", [2, 7, 64])
def test_pack_bare_begins_wherever_windows_begin(jsonl, tokenizer, length):
    spec = TextSpec(str(jsonl), samples=9, length=length, order="text", layout="pack-bare")
    tokens = load_tokens(spec, tokenizer)
    assert tokens.ids.tolist() == windows_of(tokenizer, DOCUMENTS, length, opened=False)[:9]
    # It is scored as it was: everything but the first token of each sequence.
    assert tokens.opening == ()
    assert tokens.predicted == 9 * (length - 1)


def test_what_opens_a_text_is_read_and_never_scored(jsonl, tokenizer):
    tokens = load_tokens(TextSpec(str(jsonl), samples=9, length=16, order="text"), tokenizer)
    assert tokens.description["opening"] == ["<s>"]
    assert (tokens.ids[:, 0] == BOS).all()
    inside = int((tokens.ids[:, 1:] == BOS).sum())
    assert inside > 0
    assert tokens.predicted == 9 * 15 - inside
    assert torch.equal(tokens.scored(tokens.ids), tokens.ids[:, 1:] != BOS)


def test_pack_shuffled_draws_windows_without_replacement(jsonl, tokenizer):
    windows = windows_of(tokenizer, DOCUMENTS, 16)
    drawn = load_tokens(TextSpec(str(jsonl), samples=len(windows), length=16), tokenizer).ids.tolist()
    assert drawn != windows
    assert sorted(drawn) == sorted(windows)
    fewer = load_tokens(TextSpec(str(jsonl), samples=5, length=16), tokenizer).ids.tolist()
    assert fewer == drawn[:5]


def test_truncate_skips_short_documents_and_counts_them(jsonl, tokenizer):
    encoded = one_by_one(tokenizer, DOCUMENTS)
    long = [ids[:50] for ids in encoded if len(ids) >= 50]
    assert 10 < len(long) < len(encoded)
    spec = TextSpec(str(jsonl), samples=len(long), length=50, layout="truncate", order="text")
    tokens = load_tokens(spec, tokenizer)
    assert tokens.ids.tolist() == long
    assert tokens.description["documents_read"] == max(i for i, ids in enumerate(encoded) if len(ids) >= 50) + 1
    assert tokens.description["documents_short"] == tokens.description["documents_read"] - len(long)


def test_truncate_takes_a_document_of_exactly_the_length(tmp_path, tokenizer):
    length = len(one_by_one(tokenizer, DOCUMENTS[:5])[4])
    path = write_jsonl(tmp_path / "one.jsonl", [DOCUMENTS[4]])
    spec = TextSpec(str(path), samples=1, length=length, layout="truncate")
    assert load_tokens(spec, tokenizer).ids.tolist() == one_by_one(tokenizer, [DOCUMENTS[4]])
    with pytest.raises(CalibrationError, match="0 of 1 sequences"):
        load_tokens(TextSpec(str(path), samples=1, length=length + 1, layout="truncate"), tokenizer)


def test_truncate_shuffled_draws_documents(jsonl, tokenizer):
    long = [ids[:50] for ids in one_by_one(tokenizer, DOCUMENTS) if len(ids) >= 50]
    spec = TextSpec(str(jsonl), samples=len(long), length=50, layout="truncate")
    drawn = load_tokens(spec, tokenizer).ids.tolist()
    assert drawn != long
    assert sorted(drawn) == sorted(long)


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_text_order_reads_no_document_too_many(jsonl, tokenizer, layout):
    # What follows the last document needed is broken, so that reading on would raise.
    encoded = one_by_one(tokenizer, DOCUMENTS)
    total = sum(map(len, encoded[:12]))
    spec = {"pack": {"samples": 1, "length": total}, "truncate": {"samples": 12, "length": 2}}[layout]
    lines = jsonl.read_text().splitlines(keepends=True)
    jsonl.write_text("".join(lines[:12]) + "broken\n")
    tokens = load_tokens(TextSpec(str(jsonl), layout=layout, order="text", **spec), tokenizer)
    assert tokens.description["documents_read"] == 12
    assert tokens.description["tokens_available"] == total
    with pytest.raises(CalibrationError, match="line 13"):
        load_tokens(TextSpec(str(jsonl), layout=layout, **spec), tokenizer)


def test_documents_are_encoded_in_batches(jsonl, tokenizer):
    recorder = Recorder(tokenizer)
    load_tokens(TextSpec(str(jsonl), samples=4, length=16), recorder)
    # Two short texts ask what the tokenizer puts in front.
    assert recorder.sizes == [1, 1, len(DOCUMENTS)]


def test_documents_beyond_one_batch_are_not_lost(jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr("llmprune.text.tokens._BATCH_BYTES", 500)
    recorder = Recorder(tokenizer)
    windows = windows_of(tokenizer, DOCUMENTS, 16)
    drawn = load_tokens(TextSpec(str(jsonl), samples=len(windows), length=16), recorder).ids
    assert len(recorder.sizes) > 5
    assert sorted(drawn.tolist()) == sorted(windows)


# BOS, blank documents, long documents


def test_bos_opens_each_document_once(tmp_path, tokenizer):
    texts = ["one", "<s>two", "three"]
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one", "two", "three")]
    expected = [token for ids in bare for token in (BOS, *ids)]
    tokens = load_tokens(TextSpec(str(path), samples=1, length=len(expected), order="text"), tokenizer)
    assert tokens.ids.tolist() == [expected]
    assert tokens.description["opening"] == ["<s>"]


def test_nothing_opens_a_text_where_the_tokenizer_puts_nothing(jsonl):
    """Such as SmolLM2's, which has a BOS token all the same."""
    tokenizer = without_opening(AutoTokenizer.from_pretrained(TESTBED))
    assert tokenizer.bos_token_id == BOS
    tokens = load_tokens(TextSpec(str(jsonl), samples=4, length=16, order="text"), tokenizer)
    assert BOS not in tokens.ids
    bare = [token for text in DOCUMENTS[:9] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert tokens.ids.flatten().tolist() == bare[:64]
    assert tokens.description["opening"] == []
    assert tokens.predicted == 4 * 15


def test_blank_and_null_documents_are_skipped_and_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "text.jsonl", ["", *DOCUMENTS[:9], " \n\t", None, DOCUMENTS[9]])
    tokens = load_tokens(TextSpec(str(path), samples=4, length=16), tokenizer)
    assert tokens.description["documents_read"] == 13
    assert tokens.description["documents_empty"] == 3
    same = load_tokens(TextSpec(str(write_jsonl(path, DOCUMENTS[:10])), samples=4, length=16), tokenizer)
    assert torch.equal(tokens.ids, same.ids)


def test_documents_without_a_token_are_skipped_and_counted(jsonl, tokenizer):
    class Deaf(Recorder):
        def __call__(self, text, **options):
            heard = super().__call__(text, **options)["input_ids"]
            asked = len(text) == 1 and len(text[0]) < 2  # what stands in front of a text
            return {"input_ids": [[] if len(ids) < 30 and not asked else ids for ids in heard]}

    documents = [ids for ids in one_by_one(tokenizer, DOCUMENTS) if len(ids) > 30]
    tokens = load_tokens(TextSpec(str(jsonl), samples=4, length=16), Deaf(tokenizer))
    assert tokens.description["documents_empty"] == len(DOCUMENTS) - len(documents)
    assert tokens.description["tokens_available"] == sum(map(len, documents))
    first = load_tokens(TextSpec(str(jsonl), samples=1, length=2, order="text"), Deaf(tokenizer))
    assert first.ids.tolist() == [documents[0][:2]]


def test_documents_longer_than_the_context_raise_no_warning(tmp_path, tokenizer, caplog, monkeypatch):
    # transformers stops its own records from reaching the root logger, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = tmp_path / "long.txt"
    path.write_text("a long document of many words " * 1000)
    load_tokens(TextSpec(str(path), samples=2, length=1500), tokenizer)
    assert caplog.records == []
    tokenizer(path.read_text())
    assert "longer than" in caplog.text


# Sources


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_every_source_gives_the_same_tokens(tmp_path, tokenizer, dataset_cache, layout):
    folder = tmp_path / "repository"
    folder.mkdir()
    sources = [
        write_jsonl(tmp_path / "text.jsonl", DOCUMENTS),
        write_parquet(tmp_path / "text.parquet", DOCUMENTS),
        write_parquet(folder / "train.parquet", DOCUMENTS).parent,
    ]
    results = [load_tokens(TextSpec(str(s), samples=8, length=20, layout=layout), tokenizer) for s in sources]
    assert len({result.digest for result in results}) == 1
    counts = [
        {k: v for k, v in result.description.items() if k.startswith(("documents", "tokens"))} for result in results
    ]
    assert counts[0] == counts[1] == counts[2]


def test_a_txt_file_is_one_document(tmp_path, tokenizer):
    path = tmp_path / "text.TXT"
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    tokens = load_tokens(TextSpec(str(path), samples=3, length=32, order="text"), tokenizer)
    assert tokens.ids.tolist() == windows_of(tokenizer, ["\n\n".join(DOCUMENTS)], 32)[:3]
    assert tokens.description["documents_read"] == 1


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_column_names_the_text(tmp_path, tokenizer, write):
    path = write(tmp_path / f"text.{write.__name__.removeprefix('write_')}", DOCUMENTS, column="content")
    tokens = load_tokens(TextSpec(str(path), column="content", samples=3, length=32, order="text"), tokenizer)
    assert tokens.ids.tolist() == windows_of(tokenizer, DOCUMENTS, 32)[:3]


def test_blank_lines_of_jsonl_are_no_documents(jsonl, tokenizer):
    expected = load_tokens(TextSpec(str(jsonl), samples=3, length=32), tokenizer)
    jsonl.write_text("\n" + jsonl.read_text().replace("\n", "\n\n"))
    assert load_tokens(TextSpec(str(jsonl), samples=3, length=32), tokenizer).description == expected.description


def test_dataset_splits_and_slices(tmp_path, tokenizer, dataset_cache):
    folder = tmp_path / "repository"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", DOCUMENTS[:5])
    write_jsonl(folder / "test.jsonl", DOCUMENTS[5:])
    spec = TextSpec(str(folder), split="test[:10]", samples=3, length=32, order="text")
    assert load_tokens(spec, tokenizer).ids.tolist() == windows_of(tokenizer, DOCUMENTS[5:15], 32)[:3]


@pytest.mark.skipif(not SHARED_TEXT.exists(), reason="the testbed's text is not beside this checkout")
def test_testbed_text_fills_its_protocol(tokenizer):
    tokens = load_tokens(TextSpec(str(SHARED_TEXT), samples=128, length=256, order="text"), tokenizer)
    assert tokens.ids.shape == (128, 256)
    assert tokens.ids[0, 0] == BOS
    assert tokens.description["documents_read"] < 62


# Seeds and digests


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_seed_decides_the_draw(jsonl, tokenizer, layout):
    def load(seed):
        return load_tokens(TextSpec(str(jsonl), samples=5, length=16, layout=layout, seed=seed), tokenizer)

    torch.manual_seed(1)
    first = load(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load(3)
    assert torch.equal(state, torch.get_rng_state())
    assert first.digest == again.digest != load(4).digest
    assert first.description == again.description


def test_digest_of_small_cases(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(100))))
    text = load_tokens(TextSpec(str(path), samples=2, length=4, order="text", layout="pack-bare"), tokenizer)
    assert text.digest == "36f7b3a7fd82a23c3cec55808f5a717735cb3693c9ee760477f0ad52440a5c88"
    shuffled = load_tokens(TextSpec(str(path), samples=2, length=4, seed=7, layout="pack-bare"), tokenizer)
    assert shuffled.digest == "e7da243d57cafa5711285e1f7dae5f749a0736a6232add36473f0d6f430df42a"


def test_digest_is_over_shape_and_little_endian_ids(tokenizer):
    ids = torch.arange(6).view(2, 3) * 300
    spec = TextSpec(samples=2, length=3)
    tokens = load_tokens(spec, tokenizer, lambda _: ids.int())
    assert tokens.digest == hashlib.sha256(struct.pack("<8q", 2, 3, 0, 300, 600, 900, 1200, 1500)).hexdigest()
    turned = load_tokens(TextSpec(samples=3, length=2), tokenizer, lambda _: ids.view(3, 2))
    assert turned.digest != tokens.digest


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_description_is_json(jsonl, tokenizer, layout):
    spec = TextSpec(str(jsonl), samples=4, length=16, layout=layout, seed=5)
    description = load_tokens(spec, tokenizer).description
    assert json.loads(json.dumps(description)) == description
    expected = {"source": str(jsonl), "layout": layout, "order": "shuffled", "seed": 5, "samples": 4, "length": 16}
    assert expected.items() <= description.items()
    assert "temperature" not in description


# Text from the model itself


def test_self_asks_the_generator(tokenizer):
    spec = TextSpec(samples=2, length=3, seed=9, temperature=0.7, top_p=0.9)
    asked = []
    tokens = load_tokens(spec, tokenizer, lambda s: asked.append(s) or torch.ones(2, 3, dtype=torch.int32))
    assert asked == [spec]
    assert tokens.ids.dtype == torch.int64
    said = {"source": "self", "samples": 2, "length": 3, "seed": 9, "temperature": 0.7, "top_p": 0.9}
    assert tokens.description == {**said, "opening": ["<s>"], "excerpts": ["</s></s></s>"] * 2}


def test_self_without_a_generator(tokenizer):
    with pytest.raises(CalibrationError, match="without a model"):
        load_tokens(TextSpec(), tokenizer)
