"""The model card of a recovered checkpoint: what was done, the perplexities that were measured, and the options."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llmprune.recovery.card import write_card
from llmprune.recovery.options import RecoveryOptions
from llmprune.storage.report import Report

TEXT = {"source": "texts/*train*.jsonl"}
MEASURED = {"predicted_tokens": 99, "length": 16, "text": {"source": "held.txt"}}
PERPLEXITY = {"dense": 20.0, "pruned": 30.0, "recovered": 24.0}


def card(folder: Path, teacher: str | None = "org/dense", measured: bool = True, **options: Any) -> ModelCard:
    recovery = {
        "teacher": teacher, "options": asdict(RecoveryOptions(**options)),
        "sequences": 30, "length": 16, "steps": 9, "best_step": 9, "scores": [],
        **({"perplexity": PERPLEXITY, "gap_closed": 0.6} if measured else {}),
    }  # fmt: skip
    header = {
        "model": "runs/small*one*", "version": {"llmprune": "0.1.0"}, "texts": {"training": TEXT},
        "recovery": recovery, "evaluation": {"dense": MEASURED} if measured else None,
    }  # fmt: skip
    write_card(folder, Report((), header))
    return ModelCard.load(folder / "README.md")


def test_what_was_won(tmp_path: Path) -> None:
    found = card(tmp_path, learning_rate=3e-4)
    assert found.data.base_model == "org/dense"
    assert found.data.tags == ["llmprune", "pruned", "recovered", "sparse"]
    assert "| | dense | pruned | recovered |" in found.text
    assert "| perplexity | 20.000 | 30.000 | 24.000 |" in found.text
    assert "On 99 tokens of text from `held.txt`, in sequences of 16." in found.text
    assert "60% of the gap is closed" in found.text
    assert "# small\\*one\\*, recovered" in found.text
    assert "30 sequences of 16 tokens of text from `texts/*train*.jsonl`" in found.text
    assert "llmprune.RecoveryOptions(learning_rate=0.0003)" in found.text
    assert "import llmprune" not in found.text


@pytest.mark.parametrize("adapter", ["lora", "low-rank"])
def test_adapters_are_tagged_and_a_correction_is_named(tmp_path: Path, adapter: str) -> None:
    found = card(tmp_path, None, measured=False, loss="cross-entropy", adapter=adapter)
    assert found.data.base_model is None
    assert found.data.tags[-1] == adapter
    how = 'model = PeftModel.from_pretrained(model, "FOLDER", subfolder="adapter")'
    assert (how in found.text) == (adapter == "low-rank")
    assert ("That alone is the model before its recovery" in found.text) == (adapter == "low-rank")
    assert "llmprune recover 'runs/small*one*' --recipe recipe.yaml --text" in found.text
    assert "perplexity |" not in found.text
