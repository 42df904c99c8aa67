"""Self-generated calibration text stays with the result, and is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llmprune import prune
from llmprune.text.loading import load_tokenizer

TESTBED = Path(__file__).parents[2] / "eval" / "testbed"
SETTINGS: dict[str, Any] = {
    "pattern": 0.5,
    "method": "magnitude",
    "calibration": {"source": "self", "samples": 4, "length": 32},
    "held_back": 1,
    "evaluation": None,
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    prune("testbed", SETTINGS, folder)
    return folder


def test_the_samples_are_kept_and_can_be_read_as_calibration_text(output: Path, tmp_path: Path) -> None:
    lines = [json.loads(line)["text"] for line in (output / "calibration.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line.startswith("<s>") and len(line) > 30 for line in lines)
    text = {"source": str(output / "calibration.jsonl"), "samples": 3, "length": 16}
    assert prune("testbed", {**SETTINGS, "calibration": text}, tmp_path / "again").sparsity == 0.5
    # What is read from a file is the user's own: nothing of it is copied.
    assert not (tmp_path / "again" / "calibration.jsonl").exists()


def test_three_of_them_are_shown(output: Path) -> None:
    lines = [json.loads(line)["text"] for line in (output / "calibration.jsonl").read_text().splitlines()]
    excerpts = json.loads((output / "report.json").read_text())["texts"]["calibration"]["excerpts"]
    assert excerpts == [line[:600] for line in lines[:3]]
    page = (output / "report.html").read_text()
    assert "Calibration text" in page
    assert all(f"Sequence {place}" in page for place in (1, 2, 3))
    assert "Sequence 4" not in page
    assert "&lt;s&gt;" in page


def test_a_model_in_memory_keeps_them_too(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TESTBED, dtype="float32")
    prune(model, SETTINGS, tmp_path / "out", tokenizer=load_tokenizer(TESTBED))
    assert len((tmp_path / "out" / "calibration.jsonl").read_text().splitlines()) == 5


def test_they_are_ours_to_replace(output: Path) -> None:
    before = (output / "calibration.jsonl").read_text()
    prune("testbed", {**SETTINGS, "calibration": {**SETTINGS["calibration"], "seed": 7}}, output, overwrite=True)
    assert (output / "calibration.jsonl").read_text() != before
