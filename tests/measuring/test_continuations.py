"""Greedy continuations of the dense and the pruned model: what agrees, and where the report shows it."""

from io import StringIO
from pathlib import Path

import pytest
import tiny_models
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import llmprune.pruning.reporting as reporting
from llmprune import prune
from llmprune.cli.tables.pruning import report_table
from llmprune.measuring.answers import stored_model
from llmprune.measuring.continuations import compare_continuations, continue_greedily, openings_of
from llmprune.pages import write_report

CPU = torch.device("cpu")
DEPTH = {"depth": {"remove": 1}}


def greedy(model: PreTrainedModel, openings: Tensor, tokens: int) -> Tensor:
    """Token by token, without a cache and without `generate`; never the end of the text."""
    ids = openings
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(ids, use_cache=False).logits[:, -1]
            if (end := model.config.eos_token_id) is not None:
                logits[:, end] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, openings.shape[1] :]


def test_continuations_are_greedy() -> None:
    model = tiny_models.build("llama").eval()
    openings, tokens = openings_of(tiny_models.random_ids(3, 20))
    assert openings.shape == (3, 10)
    assert tokens == 10
    assert torch.equal(continue_greedily(model, openings, tokens), greedy(model, openings, tokens))


def test_tokens_after_the_first_difference_do_not_count() -> None:
    dense = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    pruned = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]])
    found = compare_continuations(torch.zeros(3, 7, dtype=torch.long), 4, lambda: dense, lambda: pruned).to_dict()
    assert found == {
        "skipped": "", "prompts": 3, "opening": 7, "tokens": 4, "matched": [4, 1, 0], "agreement": 5 / 12,
        "identical": 1,
    }  # fmt: skip


def test_what_cannot_be_compared_is_said() -> None:
    def fail() -> Tensor:
        raise RuntimeError("no\ncache")

    openings, tokens = openings_of(torch.ones(2, 1, dtype=torch.long))
    assert "too short" in compare_continuations(openings, tokens, fail, fail).to_dict()["skipped"]
    assert compare_continuations(torch.ones(1, 2), 2, fail, fail).to_dict()["skipped"].endswith("write: no cache")


def test_depth_pruning_reports_continuations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_models.save(tiny_models.build("llama"), tmp_path / "dense")
    evaluation = {"samples": 2, "prompts": []}
    smaller = tiny_models.recipe(pattern=None, method=None, structures=DEPTH, evaluation=evaluation)
    out = tmp_path / "out"
    report = prune(dense, smaller, out)
    found = report.header["generation"]
    assert found["prompts"] == 2
    assert len(found["matched"]) == 2
    assert 0 <= found["agreement"] <= 1
    assert stored_model(out, CPU).config.num_hidden_layers == stored_model(dense, CPU).config.num_hidden_layers - 1
    shown = StringIO()
    Console(width=400, file=shown).print(report_table(report, out))
    assert f"{found['agreement']:.1%} of {found['tokens']} greedy tokens agree" in shown.getvalue()
    assert "continued greedily" in write_report(out).read_text()
    assert "generation" not in prune(dense, tiny_models.recipe(evaluation=evaluation), tmp_path / "zeros").header
    monkeypatch.setattr(reporting, "too_large", lambda *_: "too much")
    skipped = prune(dense, smaller, tmp_path / "two").header["generation"]
    assert skipped == {"skipped": "too much"}
