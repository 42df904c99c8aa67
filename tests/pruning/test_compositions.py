"""Every method with every chain of steps under every kind of pattern: it runs and keeps its promises, or is refused.

On a small matrix, and on a layer with routed experts, one of which sees no token.
"""

import copy
from itertools import chain, permutations, product
from typing import Any

import pytest
import torch
from references import correlated_inputs, violations
from streams import stream
from tiny_models import build
from torch import Tensor

from llmprune.errors import RecipeError
from llmprune.methods import METHODS, STEPS, Chain, Method, gradient_kind, with_gradient
from llmprune.patterns import Block, parse
from llmprune.pruning.jobs import Job
from llmprune.pruning.solving import solve_layer
from llmprune.recipe.recipe import load_recipe
from llmprune.statistics import Gram
from llmprune.storage.report import MatrixRow
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer
from llmprune.timing import Stages

PATTERNS = ["0.6", "0.5/row", "0.37/matrix", "0.5/layer", "2:4", "1:8", "0.5@8x8", "0.3@4x16/row"]
CHAINS = [steps for length in range(len(STEPS) + 1) for steps in permutations(STEPS, length)]


def refused(method: str, steps: tuple[str, ...], pattern: str) -> str:
    """What the recipe is to say against it; empty if it must run."""
    blocks = isinstance(parse(pattern), Block)
    if method == "obs" and not blocks:
        return "obs removes whole blocks"
    return "step swaps: it swaps single weights" if "swaps" in steps and blocks else ""


CASES = [
    pytest.param(method, steps, pattern, id=f"{' + '.join([method, *steps])}-{pattern}")
    for method, steps, pattern in product(METHODS, CHAINS, PATTERNS)
]
REFUSED = [case for case in CASES if refused(*case.values)]


def given(method: Method, weight: Tensor) -> Method:
    """With gradients that depend on the weight, if it reads any."""
    return with_gradient(method, lambda: (3 * weight).cos() ** 2 + 0.01) if gradient_kind(method) else method


def read(method: str, steps: tuple[str, ...], pattern: str) -> Any:
    return load_recipe({"pattern": pattern, "method": [method, *steps] if steps else method})


def check_losses(losses: Any, method: Method) -> None:
    """One for the method and one for each step, none above the one before."""
    values = [part.loss for part in losses]
    assert len(values) == (1 + len(method.steps) if isinstance(method, Chain) else 0)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("method", "steps", "pattern"), [case for case in CASES if case not in REFUSED])
def test_what_a_recipe_accepts_runs(method: str, steps: tuple[str, ...], pattern: str) -> None:
    recipe = read(method, steps, pattern)
    assert recipe.method is not None
    assert recipe.pattern is not None
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    inputs = correlated_inputs(100, 32)
    inputs[:, 5] = 0
    statistics = None if recipe.method.needs is None else recipe.method.needs.empty(32)
    if statistics is not None:
        statistics.update(inputs)
    pruned = given(recipe.method, weight)(weight, statistics, recipe.pattern)
    compared = recipe.pattern.compared(recipe.method.scope)
    assert int((pruned.weight == 0).sum()) == compared.zeros((16, 32))
    assert violations(pruned.mask, compared) == []
    assert not pruned.weight[~pruned.mask].any()
    check_losses(pruned.losses, recipe.method)


@pytest.mark.parametrize(("method", "steps", "pattern"), REFUSED)
def test_the_others_are_refused_with_the_reason(method: str, steps: tuple[str, ...], pattern: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(method, steps, pattern)
    assert refused(method, steps, pattern) in caught.value.what
    assert "(in method)" in caught.value.what
    assert caught.value.fix


@pytest.fixture(scope="module")
def experts() -> tuple[ResidentLayer, list[Group], dict[str, Tensor]]:
    """A layer with routed experts, its statistics, and its weights; the last expert gets no token."""
    layer = next(iter(stream(build("mixtral"))))
    groups = layer.observe(dict.fromkeys(layer.matrices, Gram))
    for group in groups:
        if layer.matrices[group.names[0]].expert == 3:
            group.statistics = Gram.empty(layer.matrices[group.names[0]].shape[1])
    return layer, groups, {name: layer.weight(name) for name in layer.matrices}


@pytest.mark.parametrize("pattern", ["0.5/row", "0.37/matrix", "0.6/layer", "2:4", "0.5@8x8"])
@pytest.mark.parametrize(
    ("method", "steps"), [*((method, ()) for method in METHODS), ("taylor", ("swaps",)), ("wanda", ("swaps", "refit"))]
)
def test_experts_alike(
    method: str, steps: tuple[str, ...], pattern: str, experts: tuple[ResidentLayer, list[Group], dict[str, Tensor]]
) -> None:
    if refused(method, steps, pattern):
        with pytest.raises(RecipeError):
            read(method, steps, pattern)
        return
    recipe, (layer, groups, weights) = read(method, steps, pattern), experts
    for name, weight in weights.items():
        layer.replace(name, weight)
    jobs = {name: Job(recipe.pattern, given(recipe.method, weight), method) for name, weight in weights.items()}
    rows = solve_layer(layer, copy.deepcopy(groups), jobs, 20, Stages())
    assert {row.name for row in rows} == set(weights)
    assert any(row.tokens == 0 and row.prior_tokens == 20 for row in rows)
    check_counts(rows, recipe)
    for row in rows:
        check_losses(row.losses, recipe.method)


def check_counts(rows: list[MatrixRow], recipe: Any) -> None:
    """Exactly as many zeros as the pattern says: in each matrix, or over the layer."""
    compared = recipe.pattern.compared(recipe.method.scope)
    if getattr(recipe.pattern, "over", None) == "layer":
        elements = sum(row.shape[0] * row.shape[1] for row in rows)
        assert sum(row.zeros for row in rows) == int(0.6 * elements + 0.5)
    else:
        assert [row.zeros for row in rows] == [compared.zeros(row.shape) for row in rows]


def test_every_kind_of_pattern_is_there() -> None:
    kinds = {(type(parse(text)).__name__, getattr(parse(text), "over", None)) for text in PATTERNS}
    assert {kind for kind, _ in kinds} == {"Unstructured", "NM", "Block"}
    assert set(chain.from_iterable(CHAINS)) == set(STEPS)
