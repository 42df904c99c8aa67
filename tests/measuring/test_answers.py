"""Prompts that both models answer: greedily, the same whether streamed or in memory, and left out where too large."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import llmprune.measuring.answers as answers_module
from llmprune import dry_run, load_recipe, prune
from llmprune.cli.tables.pruning import report_table
from llmprune.errors import RecipeError
from llmprune.measuring.answers import TOKENS, answer, attempt
from llmprune.pages import write_report
from llmprune.progress import Progress

PROMPTS = ["w5 w6 w7", "w8"]
SETTINGS: dict[str, Any] = {"samples": 1, "prompts": PROMPTS}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.build("llama"), tmp_path / "dense")


def greedy(folder: Path, prompt: str) -> str:
    """Token by token, without a cache and without `generate`."""
    model, words = AutoModelForCausalLM.from_pretrained(folder), tiny_models.tokenizer()
    ids = words(prompt)["input_ids"]
    length = len(ids)
    with torch.no_grad():
        while len(ids) < length + TOKENS and ids[-1] != model.config.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(words.decode(ids[length:], skip_special_tokens=True)).strip()


def test_both_models_answer_greedily(dense: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    out = tmp_path / "out"
    report = prune(dense, tiny_models.recipe(pattern="0.9", evaluation=SETTINGS), out, watch=told.append)
    found = report.header["answers"]
    assert found["prompts"] == PROMPTS
    assert found["dense"] == [greedy(dense, prompt) for prompt in PROMPTS]
    assert found["pruned"] == [greedy(out, prompt) for prompt in PROMPTS]
    assert found["dense"] != found["pruned"]
    assert [step.step for step in told if step.stage == "answers"] == [
        "dense model, 2 prompts",
        "pruned model, 2 prompts",
    ]
    page = write_report(out).read_text()
    assert "Answers of both models" in page
    shown = StringIO()
    Console(width=400, file=shown).print(report_table(report, out))
    assert found["pruned"][0] in shown.getvalue()
    in_memory = prune(
        tiny_models.build("llama"),
        tiny_models.recipe(pattern="0.9", evaluation=SETTINGS),
        tokenizer=tiny_models.tokenizer(),
    )
    assert in_memory.header["answers"] == found


def test_nothing_is_asked_where_the_recipe_says_so(dense: Path, tmp_path: Path) -> None:
    off = tiny_models.recipe(evaluation={"samples": 1, "prompts": []})
    assert "answers" not in prune(dense, off, tmp_path / "a").header
    assert "answers" not in prune(dense, tiny_models.recipe(), tmp_path / "b").header
    assert not [note for note in dry_run(dense, off).notes if "prompts" in note]
    with pytest.raises(RecipeError, match="a prompt is empty"):
        load_recipe(tiny_models.recipe(evaluation={"prompts": [""]}))
    with pytest.raises(RecipeError, match="prompts"):
        load_recipe(tiny_models.recipe(calibration={"samples": 1, "prompts": PROMPTS}))


def test_models_that_are_too_large_are_not_asked(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_models.recipe(evaluation=SETTINGS)
    asked = "2 prompts (evaluation.prompts) are "
    (note,) = (note for note in dry_run(dense, settings).notes if note.startswith(asked))
    assert note == f"{asked}answered by both models, each loaded completely for it."
    monkeypatch.setattr(answers_module, "free_bytes", lambda device: 1000)
    (note,) = (note for note in dry_run(dense, settings).notes if note.startswith(asked))
    assert note.startswith(f"{asked}left out: 0.0 GB of weights do not fit")
    monkeypatch.setattr(answers_module, "stored_model", lambda *_: pytest.fail("loaded"))
    report = prune(dense, settings, tmp_path / "out")
    assert "do not fit into half of the free memory" in report.header["answers"]["skipped"]
    assert "Left out: 0.0 GB" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(answers_module, "_LARGEST_ON_CPU", 10.0)
    assert "too slow on a CPU" in prune(dense, settings, tmp_path / "two").header["answers"]["skipped"]


def test_a_model_that_cannot_be_asked_does_not_end_the_run() -> None:
    def fail() -> tuple[str, ...]:
        raise RuntimeError("no\ncache")

    found = attempt(("a",), lambda: ("b",), fail)
    assert (found.dense, found.pruned, found.skipped) == ((), (), "the models could not be asked: no cache")


def test_a_chat_template_is_used() -> None:
    model, words = tiny_models.build("llama").eval(), tiny_models.tokenizer()
    plain = answer(model, words, ["w5 w6"])
    words.chat_template = "w9 {% for m in messages %}{{ m['content'] }}{% endfor %} w10"
    assert answer(model, words, ["w5 w6"]) == answer(model, tiny_models.tokenizer(), ["w9 w5 w6 w10"])
    words.chat_template = "always this"
    assert answer(model, words, ["w5 w6"]) == plain
