"""The figures in the bundled recipes are those that the bench has written down."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from llmprune.eval.bench import recipes
from llmprune.progress import Progress
from llmprune.recipe.bundled import bundled_recipes
from llmprune.recipe.recipe import load_recipe

RESULTS = Path(__file__).parents[2] / "eval" / "bench" / "results" / "recipes-testbed-cpu.json"
ROWS: dict[str, dict[str, Any]] = {row["recipe"]: row for row in json.loads(RESULTS.read_text())}
NAMES = [name for name, _ in bundled_recipes()]


def text_of(name: str) -> str:
    return files("llmprune.recipes").joinpath(f"{name}.yaml").read_text("utf-8")


def test_every_recipe_was_run() -> None:
    assert sorted(ROWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_gave(name: str) -> None:
    assert text_of(name).count("# Testbed: ") == 1
    assert recipes.comment(ROWS[name]) in text_of(name)


@pytest.mark.parametrize("name", [name for name in NAMES if "refused" not in ROWS[name]])
def test_figures_are_of_this_recipe(name: str) -> None:
    row, recipe = ROWS[name], load_recipe(name)
    if not recipe.rules:
        assert row["sparsity"] == pytest.approx(recipe.pattern.sparsity if recipe.pattern else 0, abs=1e-3)
    assert ("parameters" in row) == (recipe.structures is not None)
    assert row["perplexity"] > row["dense_perplexity"] > 1
    same = [other for other in ROWS.values() if other.get("tokens") == row["tokens"]]
    # Another batch size rounds differently in the last digit.
    assert {round(other["dense_perplexity"], 9) for other in same} == {round(row["dense_perplexity"], 9)}


def test_writing_figures_replaces_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    row: dict[str, Any] = {
        "dense_perplexity": 20.0,
        "perplexity": 25.0,
        "kl_divergence": 0.125,
        "sparsity": 0.5,
        "processor_seconds": 3.0,
        "device": "an abacus",
    }
    again = {**row, "processor_seconds": 4.0}
    for name in NAMES:
        (tmp_path / f"{name}.yaml").write_text(text_of(name), "utf-8")
        recipes.write_comment(name, row)
        recipes.write_comment(name, again)
        written = (tmp_path / f"{name}.yaml").read_text("utf-8")
        assert written.count(recipes.comment(again)) == 1
        assert recipes.comment(row) not in written
        assert written.replace(recipes.comment(again), recipes.comment(ROWS[name])) == text_of(name)
        assert load_recipe(written) == load_recipe(name)


def test_the_clock_runs_while_layers_are_rotated_and_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0, 7.0, 10.0, 11.0, 13.0, 16.0, 100.0])
    monkeypatch.setattr(recipes.time, "process_time", lambda: next(times))
    clock = recipes.ProcessorTime()
    for step in [
        Progress("statistics", 0, 2),
        Progress("rotation", 0, 9),
        Progress("dense perplexity", 1, 2),
        Progress("pruning", 0, 2, "statistics"),
        Progress("pruning", 0, 2, "writing"),
        Progress("pruning", 1, 2, "statistics"),
        Progress("pruning", 2, 2),
        Progress("pruned perplexity", 0, 2),
    ]:
        clock(step)
    assert clock.seconds == (3 + 4) + (1 + 2 + 3)


def test_a_refusal_is_said() -> None:
    row = {"recipe": "x", "refused": "pattern 3:7 on a matrix of 256 x 256", "device": "an abacus"}
    assert recipes.comment(row).startswith("# Testbed: not applicable (pattern 3:7 on a matrix of 256 x 256).")
    assert recipes.table([row]).row_count == 1
