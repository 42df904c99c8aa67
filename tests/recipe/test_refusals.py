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


DEPTH = {"structures": {"depth": {"remove": 1}}}


@pytest.mark.parametrize("statistics", [{"alpha": 0.5}, {"loss_weight": "tokens"}, {"sequential": True}], ids=str)
def test_statistics_that_nothing_reads(statistics: dict[str, object]) -> None:
    ((key, _),) = statistics.items()
    with pytest.raises(RecipeError, match=rf"do not read these statistics \(in statistics.{key}\)"):
        load_recipe({**DEPTH, "statistics": statistics})
    assert load_recipe({**DEPTH, "statistics": {"token_weight": "clip"}}).statistics.token_weight == "clip"


@pytest.mark.parametrize("statistics", [{"loss_weight": "tokens"}, {"sequential": True}], ids=str)
def test_statistics_that_no_method_reads(statistics: dict[str, object]) -> None:
    ((key, _),) = statistics.items()
    base = {"pattern": "2:4", "method": "magnitude", "statistics": statistics}
    with pytest.raises(RecipeError, match=rf"with magnitude, which reads no inputs \(in statistics.{key}\)"):
        load_recipe(base)
    for more in ({"quantise": {}}, {"rules": [{"match": "*.mlp.*", "method": "wanda"}]}):
        assert getattr(load_recipe({**base, **more}).statistics, key) == statistics[key]


@pytest.mark.parametrize("base", [DEPTH, {"pattern": "2:4", "method": "wanda"}], ids=["structures", "weights"])
def test_layers_are_fitted_only_with_validation_sequences(base: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"reconstruct without validation sequences \(in held_back\)"):
        load_recipe({**base, "reconstruct": {}, "held_back": 0})
    assert load_recipe({**base, "reconstruct": {}, "held_back": 1}).held_back == 1
