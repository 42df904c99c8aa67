"""Recipes of `train`: the bundled ones, and values of another type than they should have."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmprune.errors import RecipeError, TrainingError
from llmprune.eval.bench import training
from llmprune.recipe.bundled import bundled_recipes, recipe_texts
from llmprune.recipe.recipe import load_recipe
from llmprune.training.recipe import load_train_recipe
from llmprune.training.rules import RULES

RESULTS = Path(__file__).parents[2] / "eval" / "bench" / "results" / "training-testbed-cpu.json"
NAMES = [name for name, _ in bundled_recipes("train")]


@pytest.mark.parametrize(
    ("recipe", "words_"),
    [
        ({"training": {"batch_size": 2.5}}, "training: batch_size 2.5"),
        ({"training": {"checkpointing": "no"}}, "training: checkpointing 'no'"),
        ({"training": {"learning_rate": "high"}}, "training: learning_rate 'high'"),
        ({"training": 5}, "training is 5"),
        ({"schedule": [1]}, r"schedule is \[1\]"),
        ({"schedule": {"stages": 2.5}}, r"schedule\.stages is 2\.5"),
        ({"rule": {"rigl": {"interval": 1.5}}}, r"rule rigl\.interval is 1\.5"),
        ({"rule": {"rigl": [1]}}, r"rule rigl is \[1\]"),
        ({"schedule": {"stages": 10_001}}, r"schedule\.stages is 10001(.|\n)*at most 10,000"),
        ({"include": 5}, r"include is 5(.|\n)*a list of globs"),
        ({"exclude": "*.0.*"}, r"exclude is '\*\.0\.\*'(.|\n)*a list of globs"),
        ({"pattern": 0.5}, r"pattern 0\.5 for a training(.|\n)*schedule\.end"),
        ({"method": "wanda", "scope": "model"}, r"scope model with a method(.|\n)*remove scope"),
        ({"calibration_samples": 2.5, "method": "wanda"}, "calibration_samples is 2.5"),
    ],
)
def test_values_of_another_type_are_refused(recipe: dict[str, Any], words_: str) -> None:
    with pytest.raises(TrainingError, match=words_):
        load_train_recipe(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_recipe_is_read_and_written_back(name: str) -> None:
    recipe = load_train_recipe(name)
    assert recipe.description
    assert load_train_recipe(recipe.to_yaml()) == recipe


def test_a_knob_of_a_rule_is_set_where_the_rule_is_a_bare_name() -> None:
    assert load_train_recipe({"rule": "rigl"}, ["rule.rigl.interval=7"]).rule.interval == 7
    with pytest.raises(RecipeError, match=r"the rule is rigl, not movement(.|\n)*set a knob of this rule"):
        load_train_recipe({"rule": "rigl"}, ["rule.movement.strength=7"])


def test_mistyped_names_have_a_hint() -> None:
    with pytest.raises(TrainingError, match=r"no rule 'momentum'; did you mean 'movement'\?"):
        load_train_recipe({"rule": "momentum"})
    with pytest.raises(TrainingError, match=r"rule rigl has no key 'intervall'; did you mean 'interval'\?"):
        load_train_recipe({"rule": {"rigl": {"intervall": 5}}})


def test_a_recipe_with_a_scope_or_a_method_is_written_back() -> None:
    for keys in ({"scope": "model"}, {"method": "wanda"}, {"pattern": "2:4"}):
        recipe = load_train_recipe(keys)
        assert load_train_recipe(recipe.to_yaml()) == recipe


def test_changes_are_added_to_the_description() -> None:
    changed = load_train_recipe("gradual-80", ["schedule.end=0.5", "training.seed=3"])
    assert changed.description.endswith("in ten stages; changed: schedule.end=0.5")


def test_there_is_a_bundled_recipe_for_every_rule() -> None:
    assert {load_train_recipe(name).rule_name for name in NAMES} == {*RULES, ""}
    assert not set(NAMES) & set(recipe_texts())


def test_a_recipe_of_the_other_command_is_recognised() -> None:
    with pytest.raises(RecipeError, match="llmprune train --recipe gradual-80"):
        load_recipe("gradual-80")
    with pytest.raises(RecipeError, match="llmprune prune --recipe best"):
        load_train_recipe("best")
    with pytest.raises(RecipeError, match="did you mean 'gradual-80'"):
        load_train_recipe("gradual-79")


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_recipe_says_what_it_gave(name: str) -> None:
    (row,) = (row for row in json.loads(RESULTS.read_text("utf-8")) if row["recipe"] == name)
    assert training.comment(row) in recipe_texts("train")[name]
    recipe = load_train_recipe(name)
    assert row["overrides"] == training.overrides(recipe)
    if recipe.rule_name != "soft-movement":
        assert row["sparsity"] == pytest.approx(recipe.schedule.end, abs=1e-3)
