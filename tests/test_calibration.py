import hashlib
import json
import logging
import struct
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmprune.calibration import TextSpec, load_tokens
from llmprune.errors import CalibrationError, NumericsError
from llmprune.generation import generate_text

TESTBED = Path(__file__).parents[1] / "eval" / "testbed"
SHARED_TEXT = Path(__file__).parents[2] / "shared" / "testbed" / "calibration.jsonl"
BOS = 0

# 40 documents of 3 to 120 words: shorter and longer than the samples of the tests.
DOCUMENTS = [" ".join(f"word{(7 * i + j * j) % 97} of {i}" for j in range(1 + i % 40)) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TESTBED)


@pytest.fixture(scope="module")
def testbed():
    return AutoModelForCausalLM.from_pretrained(TESTBED, dtype=torch.float32)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
    return path


def one_by_one(tokenizer, texts):
    """Encode without batches: the BOS and the bare ids of each document that is not blank."""
    return [[BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts if text.strip()]


def windows_of(tokenizer, texts, length):
    flat = [token for document in one_by_one(tokenizer, texts) for token in document]
    return [flat[start : start + length] for start in range(0, len(flat) - length + 1, length)]


def tiny_model(vocabulary=32, *, positions=64, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=positions, **sizes, num_key_value_heads=1, **settings
    )
    model = LlamaForCausalLM(config).eval()
    # A fresh model is nearly uniform; sharper logits make a mistake visible.
    model.lm_head.weight.data *= 20
    return model


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
    with pytest.raises(CalibrationError, match="0 of 1 samples"):
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
    assert recorder.sizes == [len(DOCUMENTS)]


def test_documents_beyond_one_batch_are_not_lost(jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr("llmprune.calibration._BATCH_BYTES", 500)
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
    assert tokens.description["bos_token_id"] == BOS


def test_no_bos_where_the_tokenizer_has_none(jsonl):
    tokenizer = AutoTokenizer.from_pretrained(TESTBED, bos_token=None)
    assert tokenizer.bos_token_id is None
    tokens = load_tokens(TextSpec(str(jsonl), samples=4, length=16, order="text"), tokenizer)
    assert BOS not in tokens.ids
    bare = [token for text in DOCUMENTS[:9] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert tokens.ids.flatten().tolist() == bare[:64]
    assert tokens.description["bos_token_id"] is None


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
            return {"input_ids": [[] if len(ids) < 30 else ids for ids in heard]}

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
    text = load_tokens(TextSpec(str(path), samples=2, length=4, order="text"), tokenizer)
    assert text.digest == "36f7b3a7fd82a23c3cec55808f5a717735cb3693c9ee760477f0ad52440a5c88"
    shuffled = load_tokens(TextSpec(str(path), samples=2, length=4, seed=7), tokenizer)
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
    spec = TextSpec(samples=2, length=3, seed=9, temperature=0.7)
    asked = []
    tokens = load_tokens(spec, tokenizer, lambda s: asked.append(s) or torch.ones(2, 3, dtype=torch.int32))
    assert asked == [spec]
    assert tokens.ids.dtype == torch.int64
    assert tokens.description == {"source": "self", "samples": 2, "length": 3, "seed": 9, "temperature": 0.7}


def test_self_without_a_generator(tokenizer):
    with pytest.raises(CalibrationError, match="without a model"):
        load_tokens(TextSpec(), tokenizer)


def test_generated_text_follows_the_seed_and_not_the_global_state(testbed):
    spec = TextSpec(samples=3, length=24, seed=3)
    torch.manual_seed(1)
    first = generate_text(testbed, spec, BOS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = generate_text(testbed, spec, BOS)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, generate_text(testbed, TextSpec(samples=3, length=24, seed=4), BOS))
    assert first.shape == (3, 24)
    assert first.dtype == torch.int64
    assert (first[:, 0] == BOS).all()
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_generated_text_is_likely_text(testbed):
    """The mean log-likelihood of the samples agrees with the entropy of the distributions that they came from."""
    ids = generate_text(testbed, TextSpec(samples=8, length=64), BOS)
    with torch.no_grad():
        logs = testbed(ids).logits[:, :-1].log_softmax(-1)
    likelihood = logs.gather(-1, ids[:, 1:, None]).mean()
    entropy = (logs.exp() * -logs).sum(-1).mean()
    assert abs(float(likelihood + entropy)) < 0.25


@pytest.mark.parametrize("bos", [3, None])
def test_cached_sampling_equals_sampling_without_cache(bos):
    model, length, temperature = tiny_model(eos_token_id=None), 20, 0.8
    ids = generate_text(model, TextSpec(samples=3, length=length, seed=11, temperature=temperature), bos)
    draws = torch.rand(3, length, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for row, draw in zip(ids.tolist(), draws, strict=True):
        assert row[0] == (int(draw[0] * 32) if bos is None else bos)
        for position in range(1, length):
            with torch.no_grad():
                logits = model(torch.tensor([row[:position]]), use_cache=False).logits[0, -1]
            cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
            assert row[position] == int((cumulative <= draw[position]).sum())


def test_sampling_does_not_depend_on_the_batch():
    model, spec = tiny_model(), TextSpec(samples=5, length=16)
    assert torch.equal(generate_text(model, spec, 1, batch=2), generate_text(model, spec, 1, batch=5))


def test_models_without_a_cache_are_sampled_too(monkeypatch):
    model, spec = tiny_model(), TextSpec(samples=2, length=12)
    cached = generate_text(model, spec, 1)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **_: forward(input_ids, use_cache=False))
    assert torch.equal(generate_text(model, spec, 1), cached)


def test_sampling_frequencies_follow_the_distribution():
    model = tiny_model(4, eos_token_id=None)
    model.lm_head.weight.data.zero_()
    counts = Counter(generate_text(model, TextSpec(samples=100, length=41), 0, batch=100)[:, 1:].flatten().tolist())
    # 4000 draws of four equal tokens: 1000 each, with a standard deviation of 27.
    assert all(abs(counts[token] - 1000) < 110 for token in range(4))


def test_low_temperature_is_greedy():
    model = tiny_model(eos_token_id=None)
    ids = generate_text(model, TextSpec(samples=1, length=16, temperature=1e-4), 1)
    with torch.no_grad():
        assert ids[0, 1:].tolist() == model(ids).logits[0, :-1].argmax(-1).tolist()


@pytest.mark.parametrize("ends", [5, [5, 6]])
def test_a_bos_follows_every_eos(ends):
    model = tiny_model(8, eos_token_id=ends)
    model.lm_head.weight.data.zero_()
    ids = generate_text(model, TextSpec(samples=8, length=64), 2)
    ended = torch.isin(ids[:, :-1], torch.tensor(ends))
    assert ended.sum() > 40
    assert (ids[:, 1:][ended] == 2).all()
    # Tokens after a BOS are sampled again, not all the same.
    assert len(set(ids[:, 1:][ids[:, :-1] == 2].tolist())) == 8


def test_one_token_for_bos_and_eos_is_not_repeated_for_ever():
    model = tiny_model(8, eos_token_id=5)
    model.lm_head.weight.data.zero_()
    ids = generate_text(model, TextSpec(samples=8, length=64), 5)
    assert len(set(ids[:, 1:][ids[:, :-1] == 5].tolist())) == 8


def test_no_bos_starts_from_seeded_tokens_and_runs_through_eos():
    model = tiny_model(8, eos_token_id=5)
    model.lm_head.weight.data.zero_()
    ids = generate_text(model, TextSpec(samples=64, length=8), None, batch=64)
    assert set(ids[:, 0].tolist()) == set(range(8))
    assert len(set(ids[:, 1:][ids[:, :-1] == 5].tolist())) == 8


def test_dropout_is_off_while_sampling_and_on_again_after():
    model = tiny_model(attention_dropout=0.9)
    spec = TextSpec(samples=2, length=16)
    expected = generate_text(model, spec, 1)
    assert torch.equal(generate_text(model.train(), spec, 1), expected)
    assert model.training


def test_length_beyond_the_positions():
    model = tiny_model(positions=16)
    assert generate_text(model, TextSpec(samples=1, length=16), 1).shape == (1, 16)
    with pytest.raises(CalibrationError, match="17 tokens from a model with 16 positions"):
        generate_text(model, TextSpec(samples=1, length=17), 1)


def test_models_without_a_limit_of_positions():
    config = BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ids = generate_text(BloomForCausalLM(config), TextSpec(samples=1, length=12), 1)
    assert ids.shape == (1, 12)


def test_a_token_without_probability_is_never_drawn(monkeypatch):
    model = tiny_model(8, eos_token_id=None)
    forward = model.forward

    def refuse_token_0(**inputs):
        output = forward(**inputs)
        output.logits[..., 0] = -torch.inf
        return output

    monkeypatch.setattr(model, "forward", refuse_token_0)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    assert generate_text(model, TextSpec(samples=1, length=8), 3).tolist() == [[3, 1, 1, 1, 1, 1, 1, 1]]


def test_logits_that_are_not_finite():
    model = tiny_model()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NumericsError, match="2 of 2 samples"):
        generate_text(model, TextSpec(samples=2, length=8), 1)


# Errors


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
    [("pack", "22 tokens in 3 documents .1 of them empty. give 1 of 2 samples of 20"), ("truncate", "give 0 of 2")],
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
    with pytest.raises(CalibrationError, match=r"0 tokens .* give 0 of 128 samples"):
        load_tokens(TextSpec(str(path)), tokenizer)


@pytest.mark.parametrize("source", ["missing.txt", "a/b.jsonl", "./corpus", "~/corpus", "/no/corpus", "data/my/corpus"])
def test_no_such_path(tmp_path, tokenizer, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match="no such file or folder"):
        load_tokens(TextSpec(source), tokenizer)


def test_unknown_kind_of_file(tmp_path, tokenizer):
    (tmp_path / "text.csv").write_text("text\nhello\n")
    with pytest.raises(CalibrationError, match=r"unknown kind[\s\S]*\.txt, \.jsonl, \.parquet"):
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
def test_options_without_effect_are_refused(tmp_path, tokenizer, monkeypatch, source, changed):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(DOCUMENTS[9])
    write_jsonl(Path("text.jsonl"), DOCUMENTS)
    (name,) = changed
    with pytest.raises(CalibrationError, match=f"^{name} .*\nexpected: no {name}"):
        load_tokens(TextSpec(source, **changed), tokenizer, lambda spec: torch.zeros(128, 2048))
