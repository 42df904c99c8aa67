"""Grids of recipes: how values are read, which combinations are refused, and what they are called."""

from typing import Any

import pytest
from tiny_models import recipe

from llmprune import Unstructured
from llmprune.errors import RecipeError
from llmprune.recipe.grid import combine, read_grid, shown


def labels(grid: dict[str, Any]) -> list[str]:
    return [combination.label for combination in combine(recipe(evaluation={}), grid)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", [0.5]),
        ("0.5,0.6, 0.7", [0.5, 0.6, 0.7]),
        ("2:4,50%,0.5@16x16", ["2:4", "50%", "0.5@16x16"]),
        ("[a, b],[]", [["a", "b"], []]),
        ("['*.a,b'],c", [["*.a,b"], "c"]),
        ("{sparsegpt: {damping: 0.1, block: 3}},wanda", [{"sparsegpt": {"damping": 0.1, "block": 3}}, "wanda"]),
        ("'a,b','it''s, so',\"c\\\",d\"", ["a,b", "it's, so", 'c",d']),
        ("null,no", [None, "no"]),
        ("", [None]),
    ],
    ids=repr,
)
def test_values_are_split_at_top_level_commas(text: str, values: list[Any]) -> None:
    assert read_grid([f"key={text}"]) == {"key": values}


def test_keys_may_lead_into_sections() -> None:
    settings = ["calibration.samples=4,5", "method.sparsegpt.damping=0.1", "pattern=0.5"]
    found = read_grid(settings)
    assert found == {"calibration.samples": [4, 5], "method.sparsegpt.damping": [0.1], "pattern": [0.5]}
    assert list(found) == [setting.partition("=")[0] for setting in settings]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["pattern"], "--set pattern cannot be read"),
        (["=0.5"], "cannot be read"),
        (["pattern=0.5", "pattern=0.6"], "--set pattern is given twice\nfix: .*pattern=VALUE,VALUE"),
        (["pattern=0.5,"], "has an empty value"),
        (["exclude=[a,b"], r"--set exclude=\[a,b: "),
        (["exclude=a],b]"], r"--set exclude=a\]"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        combine("demo", read_grid(settings))


def test_every_combination_is_loaded() -> None:
    found = combine(recipe(), {"pattern": [0.5, "2:4"], "method": ["wanda", "random"], "batch_size": [3]})
    assert [str(one.recipe.pattern) for one in found] == ["0.5", "0.5", "2:4", "2:4"]
    assert [next(iter(one.recipe.to_dict()["method"])) for one in found] == ["wanda", "random"] * 2
    assert {one.recipe.batch_size for one in found} == {3}
    assert found[1].settings == {"pattern": 0.5, "method": "random", "batch_size": 3}


def test_values_from_python_are_those_of_a_recipe() -> None:
    (found,) = combine(recipe(), {"pattern": [Unstructured(0.25)], "exclude": [("*.q_proj",)]})
    assert found.settings == {"pattern": "0.25", "exclude": ["*.q_proj"]}
    assert found.recipe.exclude == ("*.q_proj",)


def test_without_values_there_is_one_run() -> None:
    assert labels({}) == ["run"]
    assert labels({"pattern": [0.6]}) == ["run"]


@pytest.mark.parametrize("values", ["wanda", [], 0.5])
def test_values_must_be_a_list(values: object) -> None:
    with pytest.raises(RecipeError, match=r"method: .* in a grid\nexpected: a list"):
        labels({"method": values})


def test_all_mistakes_are_told_at_once_and_each_once() -> None:
    grid = {"pattern": [0.5, 1.5, "a:b"], "method": ["wanda", "wnda"]}
    with pytest.raises(RecipeError) as caught:
        combine(recipe(), grid)
    text = str(caught.value)
    assert text.startswith("5 of 6 combinations cannot be run:\n")
    for mistake in ("sparsity 1.5", "pattern 'a:b' cannot be read", "unknown method 'wnda'; did you mean 'wanda'?"):
        assert text.count(mistake) == 1
    for settings in ("pattern=0.5 method=wnda:", "pattern=1.5 method=wanda:", "pattern=a:b method=wanda:"):
        assert settings in text
    assert "write 0.5 or 50% for half" in text


def test_one_mistake_of_all_is_told_as_it_is() -> None:
    with pytest.raises(RecipeError, match=r"^--set pattern=1\.5: sparsity 1\.5") as caught:
        combine(recipe(), {"pattern": [1.5], "method": ["wanda", "random"]})
    assert "write 0.5" in caught.value.fix


@pytest.mark.parametrize("grid", [{"pattern": [0.5, "50%"]}, {"method": ["wanda", "random", {"wanda": {}}]}])
def test_equal_combinations_are_refused(grid: dict[str, list[Any]]) -> None:
    with pytest.raises(RecipeError, match="are the same run"):
        combine(recipe(), grid)


def test_labels_say_what_differs() -> None:
    assert labels({"pattern": [0.5, "2:4"], "method": ["wanda", "random"], "held_back": [2]}) == [
        "pattern-0.5_wanda",
        "pattern-0.5_random",
        "pattern-2of4_wanda",
        "pattern-2of4_random",
    ]
    assert labels({"calibration.samples": [4, 5]}) == ["samples-4", "samples-5"]
    assert labels({"calibration.samples": [4, 5], "evaluation.samples": [2, 3]})[0] == (
        "calibration.samples-4_evaluation.samples-2"
    )
    assert labels({"method": [{"sparsegpt": {"damping": 0.1}}, "wanda"]}) == ["sparsegpt-damping-0.1", "wanda"]


def test_labels_are_file_names_whatever_the_values() -> None:
    globs = [
        ["*.q_proj"],
        ["*/q_proj"],
        ["*.Q_PROJ"],
        ["../../q_proj"],
        [],
        ["é"],
        ["x" * 300 + "a"],
        ["x" * 300 + "b"],
    ]
    found = labels({"exclude": globs})
    assert len({label.casefold() for label in found}) == len(globs)
    for label in found:
        assert label.isascii()
        assert not set(label) & set('/\\:*?"<>| ')
        assert not label.startswith((".", "-"))
        assert not label.endswith(".")
        assert len(label) < 100


def test_labels_do_not_depend_on_what_was_tried_before() -> None:
    grid = {"exclude": [["a*"], ["a?"]]}
    assert labels(grid) == labels(grid)
    assert labels({"exclude": grid["exclude"][::-1]}) == labels(grid)[::-1]


def test_runs_that_share_a_dense_pass_stand_together() -> None:
    found = combine(recipe(evaluation={}), {"pattern": [0.5, 0.6], "batch_size": [2, 3], "evaluation.samples": [4, 5]})
    order = [(one.recipe.batch_size, one.settings["evaluation.samples"], one.settings["pattern"]) for one in found]
    assert order == [(batch, samples, pattern) for batch in (2, 3) for samples in (4, 5) for pattern in (0.5, 0.6)]


def test_settings_are_shown_as_they_are_typed() -> None:
    settings = {"pattern": 0.5, "exclude": ["*.a"], "method": {"sparsegpt": {"damping": 0.1}}}
    text = shown(settings)
    assert text == "pattern=0.5 exclude=['*.a'] method={sparsegpt: {damping: 0.1}}"
    assert shown({}) == "the recipe"
