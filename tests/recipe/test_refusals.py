"""Methods that cannot do what a recipe asks of them are refused at their key, or at the rule's."""

import pytest

from llmprune.errors import RecipeError
from llmprune.recipe.recipe import load_recipe


def test_a_pattern_that_the_method_refuses() -> None:
    with pytest.raises(RecipeError, match=r"obs removes whole blocks.*\(in method\)"):
        load_recipe({"pattern": "2:4", "method": "obs"})


def test_a_rule_is_named_and_may_mend_it() -> None:
    rule = {"match": "*.mlp.*", "pattern": "0.5@16x16", "method": "obs"}
    load_recipe({"pattern": "2:4", "method": "wanda", "rules": [rule]})
    with pytest.raises(RecipeError, match=r"obs removes whole blocks.*\(in rules"):
        load_recipe({"pattern": "2:4", "method": "wanda", "rules": [{"match": "*.mlp.*", "method": "obs"}]})
