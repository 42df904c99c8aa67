"""A small classifier, and labelled texts in files: one word of each, somewhere in it, says the label."""

import json
import random
from pathlib import Path

import torch
from tiny_models import VOCABULARY, save
from transformers import BertConfig, BertForSequenceClassification


def build_classifier(labels: int = 2) -> BertForSequenceClassification:
    """A tiny random BERT that chooses one of some labels."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=labels, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def save_classifier(folder: Path) -> Path:
    return save(build_classifier(), folder)


def write_texts(file: Path, count: int, seed: int = 0) -> Path:
    """Texts of nine words, one of which is w5 (label 0) or w6 (label 1)."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        words, label = [draw.randrange(10, 40) for _ in range(9)], draw.randrange(2)
        words[draw.randrange(9)] = 5 + label
        lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words), "label": label}))
    file.write_text("\n".join(lines) + "\n")
    return file
