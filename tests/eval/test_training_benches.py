"""The benches of training with masks: what they write, and that rows of other runs stay."""

import json
from pathlib import Path

import pytest
from tiny_models import build

from llmprune.eval.bench import lottery, masks, movement, training


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.jsonl"
    words = [f"The {name} of version {number} is described here." for number in range(9) for name in ("form", "use")]
    file.write_text("".join(json.dumps({"text": " ".join([word] * 9)}) + "\n" for word in words))
    return str(file)


@pytest.mark.slow
def test_the_lottery_trains_the_ticket_and_its_controls(tmp_path: Path, text: str) -> None:
    file = tmp_path / "out.json"
    file.write_text(json.dumps([{"seed": 5, "sparsity": 0.5, "ticket": "dense", "perplexity": 2.0}]))
    lottery.main(
        ["--text", text, "--heldout", text, "--seeds", "0", "--sparsities", "0.8", "--steps", "4", "--rewind", "1",
         "--batch-size", "2", "--length", "16", "--json", str(file)]
    )  # fmt: skip
    other, dense, *tickets = json.loads(file.read_text())
    assert other["seed"] == 5
    assert (dense["ticket"], dense["sparsity"]) == ("dense", 0.0)
    assert [row["ticket"] for row in tickets] == ["winning ticket", "random-ticket", "random-init"]
    assert len({row["perplexity"] for row in tickets}) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "text.jsonl"]


@pytest.mark.slow
def test_the_classifier_is_made_fine_tuned_and_measured(tmp_path: Path, text: str) -> None:
    file = tmp_path / "out.json"
    movement.main(
        ["--text", text, "--heldout", text, "--folder", str(tmp_path / "out"), "--rules", "movement", "--seeds", "0",
         "--sparsities", "0.85", "--stages", "2", "--every", "1", "--dense", "1", "--batch-size", "2",
         "--length", "12", "--examples", "72", "--tested", "4", "--json", str(file)]
    )  # fmt: skip
    (row,) = json.loads(file.read_text())
    assert row["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert row["curve"][-1]["sparsity"] == pytest.approx(0.85, abs=1e-4)
    first, second = (json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()[:2])
    assert (first["label"], second["label"]) == (0, 1)
    assert len(first["text"].split()) == movement.WORDS


@pytest.mark.slow
def test_a_bundled_recipe_is_trained_and_its_figures_are_written(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes" / "training"
    recipes.mkdir(parents=True)
    (recipes / "snip-80.yaml").write_text("description: as it is\n# A remark.\nrule: snip\n")
    for name, value in (("STEPS", 2), ("LENGTH", 16), ("BATCH", 2), ("RECIPES", tmp_path / "recipes")):
        monkeypatch.setattr(training, name, value)
    words = ["--text", text, "--heldout", text, "--folder", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]
    training.main([*words, "--recipes", "snip-80", "--write"])
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert (row["steps"], row["from_scratch"], row["sparsity"]) == (2, True, pytest.approx(0.8, abs=1e-4))
    written = (recipes / "snip-80.yaml").read_text()
    assert written == f"description: as it is\n# A remark.\n{training.comment(row)}\nrule: snip\n"
    assert "after 2 steps from scratch; 80.0% sparsity" in written


@pytest.mark.slow
def test_the_price_of_masks_is_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(masks, "load", lambda: build("llama"))
    masks.main(["--rounds", "1", "--batch-size", "1", "--length", "4", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["masks"] for row in rows] == ["none", "keep_zeros", "magnitude", "sr-ste", "movement"]
    assert rows[0]["ratio"] == 1
    assert all(row["ratio"] > 0 for row in rows)  # one turn of tiny steps: any other program moves it
