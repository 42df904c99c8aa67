"""The section `rotation` of a recipe."""

import pytest

from llmprune.errors import RecipeError
from llmprune.recipe.recipe import load_recipe
from llmprune.recipe.rotation import RotationOptions

SMALL = {"pattern": "2:4", "method": "wanda"}


def test_defaults_and_round_trip() -> None:
    recipe = load_recipe({**SMALL, "rotation": {}})
    assert recipe.rotation == RotationOptions(kind="learned", steps=200, seed=0, untie=False)
    assert load_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        ({"stpes": 3}, "stpes"),
        ({"steps": 0}, "steps"),
        ({"kind": "best"}, "kind"),
        ({"seed": 2**63}, "rotation.seed is 9223372036854775808"),
        ({"steps": 2**31}, "rotation.steps is 2147483648"),
        ({"kind": "hadamard", "steps": 500}, "steps has no effect on a rotation of the kind hadamard"),
        ({"kind": "random", "steps": 500}, "steps has no effect on a rotation of the kind random"),
        ({"seed": 5}, r"seed has no effect on a rotation of the kind learned \(in rotation.seed\)"),
    ],
)
def test_mistakes_are_named(rotation: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**SMALL, "rotation": rotation})
