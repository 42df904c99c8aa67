"""Texts of several sources in a recipe."""

import pytest

from llmprune.errors import RecipeError
from llmprune.recipe.recipe import load_recipe
from llmprune.text.mix import EvaluationMix, MixPart, TextMix

MIX = """pattern: 0.5
method: wanda
calibration:
- {source: a.jsonl, share: 0.75, max_seq_length: 64}
- {source: self}
evaluation: [{source: b.jsonl, samples: 3}, {source: self, samples: 5}]
"""


def test_a_list_is_a_mix_that_is_written_and_read_back() -> None:
    recipe = load_recipe(MIX, ["calibration.samples=9"])
    parts = MixPart("a.jsonl", share=0.75), MixPart(share=0.25)
    assert recipe.calibration == TextMix(parts, samples=9, length=64)
    evaluated = MixPart("b.jsonl", order="text", seed=12345, share=3), MixPart(seed=12345, share=5)
    assert recipe.evaluation == EvaluationMix(evaluated, samples=8, length=64)
    assert load_recipe(recipe.to_yaml()) == recipe
    assert recipe.texts["calibration"].sequences == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{source: a, samples: 3}, {source: self}]", "samples of a text in a mix"),
        ("[{source: a, length: 3}, {source: self, length: 4}]", "lengths 4 and 3"),
        ("[{source: a, share: 1}, {source: b}]", "nothing is left for a text without a share"),
        ("[{source: a, shar: 1}]", r"unknown key 'shar' in calibration\.mix\.0; did you mean 'share'"),
        ("{mix: [{source: a}], source: b}", r"source beside a mix of texts \(in calibration\.source\)"),
        ("[{source: self, seed: 12345}, {source: a}]", "are both 12345"),
        ("[]", "mix is empty"),
    ],
)
def test_mistakes_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"pattern": 0.5, "method": "wanda"}, [f"calibration={text}"])
