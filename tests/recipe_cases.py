"""The bundled recipes, the smallest one, and how the tests look at refusals."""

from pathlib import Path
from typing import Any

import pytest

from llmprune.errors import RecipeError
from llmprune.methods import ALPS, Magnitude, Random, SparseGPT, Wanda
from llmprune.patterns import NM, Unstructured
from llmprune.recipe.recipe import load_recipe

EXPECTED = {
    "best": (NM(2, 4), ALPS()),
    "best-fast": (NM(2, 4), ALPS()),
    "demo": (Unstructured(0.5), SparseGPT()),
    "magnitude-50": (Unstructured(0.5), Magnitude()),
    "random-50": (Unstructured(0.5), Random()),
    "sparsegpt-2of4": (NM(2, 4), SparseGPT()),
    "sparsegpt-4of8": (NM(4, 8), SparseGPT()),
    "sparsegpt-50": (Unstructured(0.5), SparseGPT()),
    "sparsegpt-60": (Unstructured(0.6), SparseGPT()),
    "sparsegpt-70": (Unstructured(0.7), SparseGPT()),
    "sparsegpt-attention-2of4-mlp-50": (Unstructured(0.5), SparseGPT()),
    "wanda-2of4": (NM(2, 4), Wanda()),
    "wanda-50": (Unstructured(0.5), Wanda()),
}


SMALL = {"pattern": "2:4", "method": "wanda"}


def refusal(recipe: object, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return caught.value


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Bundled recipes that remove structures: the sections, and pattern and method where weights are pruned too.
STRUCTURED: dict[str, tuple[set[str], Any]] = {
    "heads-25": ({"heads"}, None),
    "ffn-25": ({"ffn"}, None),
    "ffn-25-matched": ({"ffn"}, None),
    "heads-ffn-25": ({"heads", "ffn"}, None),
    "width-25": ({"width"}, None),
    "depth-25": ({"depth"}, None),
    "depth-25-matched": ({"depth"}, None),
    "experts-50": ({"experts"}, None),
    "budget-25": ({"heads", "ffn", "budget"}, None),
    "ffn-25-sparsegpt-2of4": ({"ffn"}, (NM(2, 4), SparseGPT())),
}
