"""Keys under the names that other tools give them."""

import pytest

from llmprune import load_recipe
from llmprune.errors import RecipeError
from llmprune.methods import METHODS

OURS = """
pattern: 0.5
method: {sparsegpt: {damping: 0.05}}
rules:
  - {match: "*.q_proj", method: {sparsegpt: {damping: 0.2}}}
calibration: {samples: 3, length: 32}
evaluation: {samples: 2, length: 16}
held_back: 7
"""
THEIRS = """
pattern: 0.5
method: {sparsegpt: {dampening_frac: 0.05}}
rules:
  - {match: "*.q_proj", method: {sparsegpt: {dampening_frac: 0.2}}}
calibration: {num_samples: 3, max_seq_length: 32}
evaluation: {num_samples: 2, max_seq_length: 16}
num_validation: 7
"""


def test_both_names_mean_the_same() -> None:
    assert load_recipe(THEIRS) == load_recipe(OURS)
    assert load_recipe(THEIRS).digest == load_recipe(OURS).digest
    assert load_recipe(THEIRS).held_back == 7


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_validation=2", "held_back=2"),
        ("method.sparsegpt.dampening_frac=0.3", "method.sparsegpt.damping=0.3"),
        ("calibration.num_samples=9", "calibration.samples=9"),
        ("evaluation.max_seq_length=64", "evaluation.length=64"),
    ],
)
@pytest.mark.parametrize("recipe", [OURS, THEIRS])
def test_overrides_know_both_names_whatever_the_recipe_uses(recipe: str, theirs: str, ours: str) -> None:
    assert load_recipe(recipe, [theirs]) == load_recipe(recipe, [ours]) != load_recipe(recipe)


def test_a_key_under_both_names_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^recipe:\d+: num_validation and held_back are two names of one key"):
        load_recipe(OURS + "num_validation: 3\n")
    with pytest.raises(RecipeError, match="--set held_back is given 2 times"):
        load_recipe(OURS, ["num_validation=3", "held_back=4"])


def test_a_mistake_is_found_on_the_line_of_the_other_name() -> None:
    with pytest.raises(RecipeError, match=r"^recipe:8: held_back"):
        load_recipe(THEIRS.replace("num_validation: 7", "num_validation: -1"))


def test_names_of_other_sections_stay_unknown() -> None:
    for wrong in ("calibration.num_validation=1", "num_samples=3"):
        with pytest.raises(RecipeError, match="unknown"):
            load_recipe(OURS, [wrong])


def test_every_method_with_a_damping_has_the_other_name() -> None:
    for name, method in METHODS.items():
        if "damping" in getattr(method, "__dataclass_fields__", {}):
            theirs = {"pattern": "0.5@16x16", "method": {name: {"dampening_frac": 0.5}}}
            assert load_recipe(theirs) == load_recipe({"pattern": "0.5@16x16", "method": {name: {"damping": 0.5}}})
