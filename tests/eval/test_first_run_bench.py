"""The bench of the first run: what it runs, and that its figures are those of the checkpoints."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import run
from documents import write_jsonl
from tiny_models import build, save

import llmprune
from llmprune.eval.bench import first_run
from llmprune.text.tokens import TextSpec

SETTINGS = ("calibration.samples=4", "calibration.length=24", "held_back=1", "evaluation=null")


def in_this_process(command: Sequence[str], **_: Any) -> "subprocess.CompletedProcess[str]":
    """Runs `llmprune` without the seconds that a new process takes to start."""
    done = run(*command[len(first_run._LLMPRUNE) :])
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("first")
    model = save(build("llama", torch.float32), folder / "model")
    texts = [
        write_jsonl(folder / f"{name}.jsonl", [" ".join(f"w{number * factor % 90 + 4}" for number in range(200))])
        for name, factor in (("calibration", 7), ("heldout", 11))
    ]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    shown = folder / "first.json"
    text = ["--dataset", str(texts[0]), "--heldout", str(texts[1]), "--heldout-samples", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_run, "subprocess", SimpleNamespace(run=in_this_process))
        first_run.main([str(model), *text, *settings, "--json", str(shown)])
    spec = TextSpec(str(texts[1]), samples=3, length=24, order="text")
    return json.loads(shown.read_text("utf-8")) | {"expected": llmprune.perplexity(model, spec).perplexity}


def test_all_three_models_are_measured_by_one_protocol(result: dict[str, Any]) -> None:
    dense, first, second = result["rows"]
    assert [row["calibration"] for row in result["rows"]] == ["dense", "self-generated", "calibration.jsonl"]
    assert dense["perplexity"] == result["expected"]
    assert first["perplexity"] != second["perplexity"]
    assert dense["tokens"] == first["tokens"] == second["tokens"]
    assert result["ratio"] == first["perplexity"] / second["perplexity"]
    assert first["sparsity"] == second["sparsity"] == 0.5
    # A command takes longer than the run inside it.
    assert all(row["seconds"] > row["stages"]["total"] > 0 for row in (first, second))


def test_the_result_says_how_it_was_made(result: dict[str, Any]) -> None:
    assert result["command"].startswith("llmprune prune model --output DIR --set calibration.samples=4")
    assert result["calibration"] == {"samples": 4, "length": 24, "dataset": "calibration.jsonl"}
    assert result["versions"]["llmprune"] == llmprune.__version__
    assert result["cores"] >= 1


@pytest.mark.slow
def test_a_run_that_fails_stops_the_bench(tmp_path: Path) -> None:
    text = ["--dataset", str(tmp_path / "none.jsonl"), "--heldout", str(tmp_path / "none.jsonl")]
    with pytest.raises(SystemExit, match="llmprune prune failed"):
        first_run.main([str(tmp_path / "no-model"), *text])
