"""Widths chosen from known curves and KL divergences."""

import itertools
import json
import math

import pytest
import torch
from tiny_models import build
from torch import Tensor

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.sizes import parameters
from llmprune.models.source import ModelSource
from llmprune.structures.choose.budget import Measured, Offer, allowed_size, choose_widths, offer
from llmprune.structures.find.discovery import Structure, find_structures

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def structure(kind: str, groups: int, name: str = "down.weight") -> Structure:
    return Structure(kind, name, groups, 1, ())


def measured(layer: int, kind: str, curve: list[float], divergence: float, size: int = 10) -> Measured:
    """A structure of which all groups but one can go, each of the same size; measured without one."""
    groups = len(curve)
    sizes = tuple(float(size * (groups - level)) for level in range(groups))
    own = Offer(structure(kind, groups, f"{kind}.weight"), tuple(range(groups)), sizes, 1)
    return Measured(layer, own, tuple(curve), 1, divergence)


def random_curve(groups: int) -> list[float]:
    steps: Tensor = torch.rand(groups - 1, dtype=torch.float64)
    return [0.0, *steps.cumsum(0).tolist()]


def test_the_choice_is_the_best_of_all() -> None:
    known = [measured(layer, "ffn", random_curve(5), 0.1 * (layer + 1)) for layer in range(3)]
    known += [measured(layer, "heads", random_curve(3), 0.3 / (layer + 1), size=30) for layer in range(3)]
    budget = 3 * (50 + 90) - 130.0
    errors = [[value * one.divergence / one.curve[1] for value in one.curve] for one in known]
    best = min(
        sum(own[level] for own, level in zip(errors, levels, strict=True))
        for levels in itertools.product(*(range(len(own)) for own in errors))
        if sum(one.offer.sizes[level] for one, level in zip(known, levels, strict=True)) <= budget
    )
    plan = choose_widths(known, budget)
    assert plan.error == pytest.approx(best)
    assert plan.bound <= plan.error <= plan.uniform_error
    assert plan.size == sum(share.sizes[share.removed] for share in plan.shares) <= budget
    assert plan.error == pytest.approx(sum(share.error for share in plan.shares))
    assert not plan.is_uniform
    assert json.loads(json.dumps(plan.to_dict()))["shares"][3]["removed"] == plan.shares[3].removed


def test_a_structure_that_the_model_needs_keeps_its_groups() -> None:
    """Alike in their own errors, but the second costs the model ten times as much."""
    curve = [0.0, 0.1, 0.3, 0.6, 1.0]
    plan = choose_widths([measured(0, "ffn", curve, 0.01), measured(1, "ffn", curve, 0.1)], 100 - 40.0)
    # By hand: three and one cost 0.06 + 0.1 nats, four and none 0.1, two and two 0.33.
    assert plan.groups == {0: {"ffn.weight": 4}}
    assert plan.error == pytest.approx(0.1)
    assert plan.uniform_error == pytest.approx(0.03 + 0.3)
    assert [share.uniform for share in plan.shares] == [2, 2]
    assert (plan.size, plan.uniform_size, plan.budget) == (60, 60, 60)


def test_uniform_takes_a_fraction_of_each_kind() -> None:
    """Layers differ in width: half of four groups is two, half of eight is four; heads may lose another fraction."""
    narrow, wide = [0.0, 0.1, 0.2, 9.0], [0.0, 0.05, 0.1, 0.15, 0.2, 9.0, 9.0, 9.0]
    known = [
        measured(0, "ffn", narrow, 0.1), measured(1, "ffn", wide, 0.05),
        measured(0, "heads", [0.0, 1.0], 1.0), measured(1, "heads", [0.0, 1.0], 1.0),
    ]  # fmt: skip
    plan = choose_widths(known, sum(one.offer.sizes[0] for one in known) - 60)
    assert [share.uniform for share in plan.shares] == [2, 4, 0, 0]
    assert plan.is_uniform
    assert [share.removed for share in plan.shares] == [2, 4, 0, 0]


def test_no_uniform_choice_keeps_the_budget() -> None:
    """Sizes that were measured need not fall: only a mixture fits here."""
    first = Offer(structure("ffn", 3, "a"), (0, 1), (5.0, 1.0), 1)
    second = Offer(structure("ffn", 3, "b"), (0, 1), (1.0, 5.0), 1)
    plan = choose_widths([Measured(0, one, (0.0, 0.1), 1, 0.1) for one in (first, second)], 2.0)
    assert plan.groups == {0: {"a": 1}}
    assert (plan.uniform_error, plan.uniform_size) == (None, None)
    assert [share.uniform for share in plan.shares] == [1, 0]


def test_a_divergence_of_rounding_is_not_free() -> None:
    plan = choose_widths([measured(0, "ffn", [0.0, 1.0, 2.0], -1e-9), measured(1, "ffn", [0.0, 1.0, 2.0], 0.0)], 50.0)
    assert plan.error > 0


def test_what_is_dead_goes_first() -> None:
    dead = measured(0, "ffn", [0.0, 0.0, 0.0], 0.0)
    plan = choose_widths([dead, measured(1, "ffn", [0.0, 0.1, 0.2], 0.1)], 40.0)
    assert plan.groups == {0: {"ffn.weight": 2}}
    assert plan.error == 0


def test_a_divergence_that_is_not_finite() -> None:
    with pytest.raises(NumericsError, match=r"layer 3, ffn\.weight"):
        choose_widths([measured(3, "ffn", [0.0, 1.0], math.nan)], 10.0)


def test_levels_of_a_structure() -> None:
    source = ModelSource(build("llama"))
    heads, channels = find_structures(source.decoder)[0]
    offered = offer(source.layers[0], channels, parameters, multiple=16, most=0.7)
    assert offered.levels == (0, 16, 32)
    # Two matrices and their biases lose rows, one loses columns.
    assert [offered.sizes[0] - size for size in offered.sizes] == [0, 16 * (3 * 32 + 2), 32 * (3 * 32 + 2)]
    assert offered.reference == 1
    assert offer(source.layers[0], channels, parameters, reference=0.5).reference == 24
    assert offer(source.layers[0], heads, parameters, most=1.0).levels == (0, 1)
    assert offer(source.layers[0], channels, parameters, multiple=48).levels == (0,)


def test_what_is_no_candidate() -> None:
    layer = ModelSource(build("llama")).layers[0]
    refused = Structure("heads", "o_proj.weight", 4, 8, (), "its keys are shared")
    with pytest.raises(ModelError, match="its keys are shared"):
        offer(layer, refused, parameters)
    with pytest.raises(ModelError, match="of kind experts"):
        offer(layer, structure("experts", 4), parameters)
    with pytest.raises(PatternError, match=r"most is 1\.5"):
        offer(layer, structure("ffn", 4), parameters, most=1.5)


@pytest.mark.parametrize("remove", [0.0, -1.0, 41.0, math.nan])
def test_more_than_can_go(remove: float) -> None:
    known = measured(0, "ffn", [0.0] * 5, 0.1).offer
    assert allowed_size([known], 40.0) == 10
    with pytest.raises(PatternError, match=r"but at most 80\.0% can be removed"):
        allowed_size([known], remove)
