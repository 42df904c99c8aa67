"""Recipes of `train` whose values have another type than they should."""

from typing import Any

import pytest

from llmprune.errors import TrainingError
from llmprune.training.recipe import load_train_recipe


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
        ({"include": 5}, "include is 5"),
        ({"pattern": 0.5}, r"pattern 0\.5 for a training(.|\n)*schedule\.end"),
        ({"calibration_samples": 2.5, "method": "wanda"}, "calibration_samples is 2.5"),
    ],
)
def test_values_of_another_type_are_refused(recipe: dict[str, Any], words_: str) -> None:
    with pytest.raises(TrainingError, match=words_):
        load_train_recipe(recipe)
