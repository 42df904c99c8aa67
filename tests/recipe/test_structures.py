"""The recipe's section `structures`."""

from typing import Any

import pytest

from llmprune.errors import RecipeError
from llmprune.recipe.recipe import load_recipe


def refused(structures: Any, **others: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"structures": structures, **others})
    return caught.value


def test_structures_alone_are_a_recipe() -> None:
    recipe = load_recipe({"structures": {"ffn": {"remove": 0.25}, "heads": {"remove": 1}}})
    assert recipe.structures is not None
    assert recipe.for_matrix("model.layers.0.mlp.down_proj") is None
    assert recipe.structures.ffn is not None
    assert recipe.structures.heads is not None
    assert recipe.structures.ffn.count(704) == 176
    assert recipe.structures.heads.count(4) == 1
    assert load_recipe(recipe.to_yaml()) == recipe


def test_weights_and_structures_go_together() -> None:
    recipe = load_recipe({"structures": {"ffn": {"remove": 0.25}}, "pattern": "2:4", "method": "wanda", "format": "nm"})
    assert recipe.for_matrix("anything") is not None
    assert recipe.structures is not None


def test_only_obs_refits_unless_asked() -> None:
    def refitted(**keys: Any) -> bool:
        structures = load_recipe({"structures": {"ffn": {"remove": 0.25, **keys}}}).structures
        assert structures is not None
        assert structures.ffn is not None
        return structures.ffn.refitted

    assert refitted()
    assert not refitted(method="wanda")
    assert refitted(method="wanda", refit=True)
    assert not refitted(refit=False)


@pytest.mark.parametrize(
    ("structures", "words"),
    [
        ({}, "structures is empty"),
        ({"ffn": {}}, "ffn.remove is missing"),
        ({"ffn": {"remove": 1.5}}, "remove is 1.5"),
        ({"ffn": {"remove": 0}}, "remove is 0"),
        ({"ffn": {"remove": True}}, "remove is true"),
        ({"fnn": {"remove": 0.5}}, "did you mean 'ffn'?"),
        ({"ffn": {"remove": 0.5, "swap": 1}}, "did you mean 'swaps'?"),
        ({"ffn": {"remove": 0.5, "compensate": True}}, "compensate is for flap"),
        ({"heads": {"remove": 1, "method": "activation-frequency"}}, "ffn, not heads"),
        ({"budget": {"remove": 0.25}}, "structures is empty"),
        ({"depth": {"remove": 1}, "budget": {"remove": 0.25}}, "neither heads nor ffn"),
        ({"ffn": {"remove": 2}, "budget": {"remove": 0.25}}, "ffn.remove is 2"),
        ({"ffn": {"method": "wanda"}, "budget": {"remove": 0.25}}, "ffn.method is wanda"),
        ({"heads": {"unit": "query-head"}, "budget": {"remove": 0.25}}, "heads.unit is query-head"),
    ],
)
def test_what_makes_no_sense_is_refused(structures: Any, words: str) -> None:
    assert words in str(refused(structures))


def test_keys_about_weights_need_a_method() -> None:
    assert "format without a pattern" in refused({"ffn": {"remove": 2}}, format="nm").what
    assert "rules without a pattern" in refused({"ffn": {"remove": 2}}, rules=[{"match": "*", "pattern": 0.5}]).what
    assert "pattern is missing" in refused({"ffn": {"remove": 2}}, method="wanda").what
