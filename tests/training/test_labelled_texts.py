"""Which labelled texts are trained on, and classifiers whose config knows no padding token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_texts import build_classifier, save_classifier
from tiny_models import VOCABULARY, save, tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from llmprune.errors import CalibrationError, TrainingError
from llmprune.progress import ignore
from llmprune.recovery.options import RecoveryOptions
from llmprune.training.subjects.classifier import ClassifierSubject


def sorted_texts(file: Path, labels: int = 2) -> Path:
    """Ten texts of each label, one label after the other; of ever more words."""
    rows = [(label, number) for label in range(labels) for number in range(10)]
    lines = (json.dumps({"text": " ".join(["w7"] * (number + 1)), "label": label}) for label, number in rows)
    file.write_text("\n".join(lines))
    return file


def read(model: Path, text: Path, samples: int | None = None, **options: Any) -> ClassifierSubject:
    chosen = RecoveryOptions(loss="cross-entropy", **options)
    subject = ClassifierSubject(model, str(text), None, None, samples, chosen, torch.device("cpu"))
    subject.read(ignore)
    return subject


def labels_of(subject: ClassifierSubject) -> list[int]:
    return [int(row["labels"]) for row in subject.rows]


def test_a_file_that_is_sorted_by_label_is_shuffled(tmp_path: Path) -> None:
    model, text = save_classifier(tmp_path / "model"), sorted_texts(tmp_path / "a.jsonl")
    every = labels_of(read(model, text, held_back=8))
    assert sorted(every) == [0] * 10 + [1] * 10
    assert len(set(every[:-8])) == len(set(every[-8:])) == 2
    assert every == labels_of(read(model, text, held_back=8))
    assert every != labels_of(read(model, text, held_back=8, seed=1))
    few = read(model, text, 8)
    assert labels_of(few) == every[:8]
    assert len(set(every[:8])) == 2


def test_texts_of_one_label_are_refused_and_missing_ones_named(tmp_path: Path) -> None:
    model, text = save_classifier(tmp_path / "model"), sorted_texts(tmp_path / "a.jsonl", labels=1)
    with pytest.raises(CalibrationError, match=r"all 10 texts to train on(.|\n)*same label(.|\n)*--num-samples"):
        read(model, text)
    three = save(build_classifier(labels=3), tmp_path / "three")
    with pytest.warns(UserWarning, match="has the label LABEL_2, which the model unlearns"):
        read(three, sorted_texts(tmp_path / "b.jsonl"))


def test_a_config_without_a_padding_token_gets_that_of_the_tokenizer(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, pad_token_id=None,
    )  # fmt: skip
    model = save(LlamaForSequenceClassification(config), tmp_path / "model")
    assert json.loads((model / "config.json").read_text()).get("pad_token_id") is None
    subject = read(model, sorted_texts(tmp_path / "a.jsonl"))
    subject.load(torch.device("cpu"), teacher=False)
    rows = subject.rows[:4]
    assert len({int(row["attention_mask"].sum()) for row in rows}) > 1
    whole = subject.early_loss(rows, 1.0)
    alone = torch.stack([subject.early_loss([row], 1.0) for row in rows]).mean()
    torch.testing.assert_close(whole, alone)
    subject.write(tmp_path, ignore)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == tokenizer().pad_token_id


def test_a_tokenizer_without_a_padding_token_is_refused_early(tmp_path: Path) -> None:
    model, text = save_classifier(tmp_path / "model"), sorted_texts(tmp_path / "a.jsonl")
    stored = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**stored, "pad_token": None}))
    with pytest.raises(TrainingError, match=r"has no padding token(.|\n)*tokenizer_config"):
        read(model, text)
