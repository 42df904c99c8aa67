"""Every rule worked by hand on a matrix or two, and what holds for all of them."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericsError, PatternError, TrainingError
from llmprune.patterns import NM
from llmprune.training.reading import read_rule, read_schedule, read_selection
from llmprune.training.rules import RULES, GraSP, RigL, Rule, Schedule, Selection, SoftMovement
from llmprune.training.rules.lottery import Lottery, random_ticket
from llmprune.training.rules.rule import Moment
from llmprune.training.stages import Plan

WEIGHT = torch.tensor([[4.0, -1.0, 3.0, 2.0], [-0.5, 6.0, -7.0, 8.0]])
ALL = torch.ones(2, 4, dtype=torch.bool)


def moment(sparsity: float, **changes: Any) -> Moment:
    """A moment at the beginning of a stage."""
    known: dict[str, Any] = {
        "step": 0, "steps": 100, "begins": True, "sparsity": sparsity, "end": 0.75, "selection": Selection(),
        "weights": {"w": WEIGHT}, "kept": {"w": ALL}, "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return Moment(**{**known, **changes})


def kept(mask: Tensor) -> list[list[int]]:
    return mask.int().tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 0.75 - 0.75 (1 - i/3)^3
        ("cubic", (0.75 * (1 - 8 / 27), 0.75 * (1 - 1 / 27), 0.75)),
        ("linear", (0.25, 0.5, 0.75)),
        # 1/4 is left after three stages: (1/4)^(1/3) after each
        ("iterative", (1 - 0.25 ** (1 / 3), 1 - 0.25 ** (2 / 3), 0.75)),
        ("one-shot", (0.75, 0.75, 0.75)),
    ],
)
def test_schedules(kind: Any, expected: tuple[float, ...]) -> None:
    assert Schedule(kind, stages=3, end=0.75).sparsities == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cubic", "linear", "iterative"])
def test_schedules_begin_where_they_are_told_to_and_rise(kind: Any) -> None:
    found = (0.5, *Schedule(kind, stages=20, start=0.5, end=0.9).sparsities)
    assert all(before < after for before, after in pairwise(found))
    assert found[-1] == 0.9
    assert found[1] < 0.57


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "cosine"}, {"stages": 0}, {"start": 0.6}, {"start": -0.1}, {"end": 1.0}, {"end": math.nan},
        {"every": 0}, {"dense": -1}, {"step": 3}, {"stages": "ten"},
    ],
)  # fmt: skip
def test_schedules_refuse(keys: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"schedule[ .](\w|\n)+"):
        read_schedule(keys, Selection())


def test_magnitude_keeps_the_largest_of_those_that_are_left() -> None:
    rule = read_rule("magnitude")
    first = rule.choose(moment(0.25))["w"]
    assert kept(first) == [[1, 0, 1, 1], [0, 1, 1, 1]]  # |-1| and |-0.5| are the two smallest of eight
    # The pruned -1 has grown behind the mask: it stays pruned, and 2, 3 go.
    grown = WEIGHT.clone()
    grown[0, 1] = 100
    second = rule.choose(moment(0.5, weights={"w": grown}, kept={"w": first}))["w"]
    assert kept(second) == [[1, 0, 0, 0], [0, 1, 1, 1]]


def test_scopes() -> None:
    weights = {"a": WEIGHT, "b": WEIGHT / 10}
    every = {"a": ALL, "b": ALL}
    each = read_rule("magnitude").choose(moment(0.5, weights=weights, kept=every))
    assert kept(each["a"]) == kept(each["b"]) == [[1, 0, 0, 0], [0, 1, 1, 1]]
    whole = read_rule("lottery").choose(moment(0.5, weights=weights, kept=every, selection=Selection("model")))
    # The eight largest of sixteen: all of b but 0.6, 0.7, 0.8 are below 0.5 and -0.5, and 1 is above all of b.
    assert kept(whole["a"]) == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert kept(whole["b"]) == [[0, 0, 0, 0], [0, 0, 0, 1]]


def test_a_pattern_is_approached_by_keeping_more_of_each_group() -> None:
    selection = Selection(pattern=NM(1, 4))
    assert [str(selection.at(sparsity)) for sparsity in (0.0, 0.2, 0.25, 0.5, 0.74, 0.75)] == [
        "4:4", "4:4", "3:4", "2:4", "2:4", "1:4",
    ]  # fmt: skip
    found = read_rule("magnitude").choose(moment(0.5, selection=selection))["w"]
    assert kept(found) == [[1, 0, 1, 0], [0, 0, 1, 1]]


def test_hard_movement_keeps_the_highest_scores_wherever_they_are() -> None:
    scores = torch.tensor([[0.1, 0.9, -0.3, 0.2], [0.8, -0.1, 0.3, 0.0]])
    rule = read_rule({"movement": {"score_rate": 0.1}})
    before = torch.zeros(2, 4, dtype=torch.bool)  # pruned weights come back
    assert kept(rule.choose(moment(0.5, scores={"w": scores}, kept={"w": before}))["w"]) == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert rule.first_scores({"w": WEIGHT}, None)["w"].equal(torch.zeros(2, 4))


def test_soft_movement_keeps_scores_above_a_threshold() -> None:
    rule = SoftMovement(threshold=0.5, strength=8.0)
    scores = torch.tensor([[0.1, 0.9, -0.3, 0.2], [0.8, -0.1, 0.3, -0.01]])
    # At the end the sigmoid must be above 0.5; half way, at 0.75 / 2, above 0.25.
    assert kept(rule.choose(moment(0.75, scores={"w": scores}))["w"]) == [[1, 1, 0, 1], [1, 0, 1, 0]]
    assert rule.choose(moment(0.375, scores={"w": scores}))["w"].all()
    # d/dS of 8 mean sigmoid(S) over eight scores = sigmoid (1 - sigmoid): 1/4 at zero; half of it half way.
    slopes = rule.penalty({"w": torch.zeros(2, 4)}, 1.0)["w"]
    assert slopes.equal(torch.full((2, 4), 0.25))
    assert rule.penalty({"w": torch.zeros(2, 4)}, 0.5)["w"].equal(slopes / 2)
    # No matrix is emptied: one of 400 is more than half a percent of it less than two.
    low = torch.arange(400.0).view(20, 20) - 1000
    assert int(rule.choose(moment(0.75, scores={"w": low}))["w"].sum()) == 2


def test_rigl_moves_a_share_of_the_weights_to_where_the_gradient_is_largest() -> None:
    rule = RigL(interval=10, fraction=0.5, until=1.0)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    slope = torch.tensor([[0.0, 0.5, 0.1, 9.0], [-0.6, 0.0, 0.2, -0.3]])
    now = moment(0.5, begins=False, kept={"w": mask}, gradients={"w": slope})
    # At step 0 half of the four kept weights move: 2 and 3 are the smallest. The dropped 2 has the largest gradient
    # and is grown again; -0.6 is next.
    assert kept(rule.choose(now)["w"]) == [[1, 0, 0, 1], [1, 1, 0, 0]]
    # Half way it is a quarter (cosine): only 2 is dropped, and grown again at once.
    assert rule.choose(replace(now, step=50))["w"].equal(mask)
    # After the last move nothing moves.
    assert rule.choose(replace(now, step=100))["w"].equal(mask)


def test_rigl_moves_zeros_within_groups_if_there_is_a_pattern() -> None:
    rule = RigL(interval=10, fraction=0.5, until=1.0)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    slope = torch.tensor([[0.0, 0.5, 0.1, 0.9], [9.0, 8.0, 0.0, 0.0]])
    selection = Selection(pattern=NM(2, 4))
    now = moment(0.5, begins=False, kept={"w": mask}, gradients={"w": slope}, selection=selection)
    # Half of the four kept weights are dropped, 4 and 3: both of the first group, where 0.9 and 0.5 are grown. The
    # larger gradients of the second group have no place to be grown at.
    assert kept(rule.choose(now)["w"]) == [[0, 1, 0, 1], [0, 0, 1, 1]]


def test_rigl_begins_with_random_places_if_told_to() -> None:
    rule = RigL(initial="random")
    weight = torch.arange(1.0, 1001.0).view(10, 100)
    everything = torch.ones(10, 100, dtype=torch.bool)
    found = rule.choose(moment(0.5, weights={"w": weight}, kept={"w": everything}))["w"]
    assert int(found.sum()) == 500
    assert 200 < int(found[5:].sum()) < 300
    smallest = RigL().choose(moment(0.5, weights={"w": weight}, kept={"w": everything}))["w"]
    assert smallest[5:].all()


def test_sr_ste_passes_gradients_on_and_shrinks_what_is_pruned() -> None:
    rule = read_rule({"sr-ste": {"decay": 0.5}})
    mask = rule.choose(moment(0.5, selection=Selection(pattern=NM(2, 4))))["w"]
    assert kept(mask) == [[1, 0, 1, 0], [0, 0, 1, 1]]
    gradient = torch.full((2, 4), 10.0)
    # g + 0.5 w where pruned: -1 -> 9.5, 2 -> 11, -0.5 -> 9.75, 6 -> 13
    assert rule.gradient(gradient, WEIGHT, mask).tolist() == [[10.0, 9.5, 10.0, 11.0], [9.75, 13.0, 10.0, 10.0]]


def test_snip_is_the_product_of_gradient_and_weight() -> None:
    weight = WEIGHT.clone().requires_grad_()
    slope = torch.tensor([[1.0, 2.0, -1.0, 0.1], [1.0, 0.0, 0.5, -1.0]])
    rule = read_rule("snip")
    scores = rule.first_scores({"w": weight}, lambda temperature: (weight * slope).sum() / temperature)
    torch.testing.assert_close(scores["w"], torch.tensor([[4.0, 2, 3, 0.2], [0.5, 0, 3.5, 8]]))
    assert kept(rule.choose(moment(0.5, scores=scores))["w"]) == [[1, 0, 1, 0], [0, 0, 1, 1]]


def test_grasp_is_the_product_of_weight_and_hessian_times_gradient() -> None:
    """L = sum(c w^2) / 2: g = c w, H = diag(c), so that w (H g) = c^2 w^2; and a negative curvature stays positive."""
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True)
    curvature = torch.tensor([[1.0, 0.5], [-1.0, 4.0]])
    rule = GraSP(temperature=1.0)
    scores = rule.first_scores({"w": weight}, lambda temperature: (curvature * weight**2).sum() / 2 / temperature)
    torch.testing.assert_close(scores["w"], torch.tensor([[1.0, 1.0], [9.0, 4.0]]))
    # A product of two weights, L = a b: g = (b, a), H g = (a, b): w (H g) = (a^2, b^2) although a b < 0.
    scores = rule.first_scores({"w": weight}, lambda temperature: weight[0, 0] * weight[0, 1] / temperature)
    torch.testing.assert_close(scores["w"], torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
    assert GraSP().temperature == 200


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scores_before_training_need_a_loss(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"{name} without a loss(.|\n)*pass loss"):
        read_rule(name).first_scores({"w": WEIGHT}, None)


def test_a_random_ticket_has_as_many_weights_of_each_matrix() -> None:
    ticket = {"a": torch.rand(30, 40) < 0.2, "b": torch.rand(20, 20) < 0.7}
    drawn = random_ticket(ticket, torch.Generator().manual_seed(1))
    for name, mask in ticket.items():
        assert int(drawn[name].sum()) == int(mask.sum())
        share = float((drawn[name] & mask).sum() / mask.sum())
        assert share == pytest.approx(float(mask.float().mean()), abs=0.15)  # in places of their own


def test_a_random_ticket_follows_the_pattern() -> None:
    mask = NM(2, 4).mask(torch.rand(30, 40))
    drawn = random_ticket({"a": mask}, torch.Generator().manual_seed(1), NM(2, 4))["a"]
    assert drawn.view(-1, 4).sum(1).eq(2).all()
    assert 0.4 < float((drawn & mask).sum() / mask.sum()) < 0.6


@pytest.mark.parametrize("name", ["magnitude", "lottery", "snip", "grasp"])
def test_what_is_pruned_already_stays_so_even_if_it_is_more_than_asked_for(name: str) -> None:
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    found = read_rule(name).choose(moment(0.25, kept={"w": mask}, scores={"w": WEIGHT}))["w"]
    assert found.equal(mask)


def scored(rule: Rule, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = {name: weight.requires_grad_() for name, weight in weights.items()}
    return rule.first_scores(
        parameters, lambda temperature: sum((w.sin() ** 2).sum() for w in parameters.values()) / temperature
    )


@pytest.mark.parametrize("selection", [Selection(), Selection("model"), Selection(pattern=NM(2, 4))], ids=str)
@pytest.mark.parametrize("name", sorted(set(RULES) - {"soft-movement"}))
def test_every_rule_prunes_exactly_as_many_as_asked_and_changes_no_input(name: str, selection: Selection) -> None:
    torch.manual_seed(3)
    rule, weights = read_rule(name), {"a": torch.randn(12, 8), "b": torch.randn(3, 16)}
    everything = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in weights.items()}
    scores = {key: score.detach() for key, score in scored(rule, weights).items()}
    given = moment(
        0.5, weights={key: weight.detach() for key, weight in weights.items()}, kept=everything, selection=selection,
        scores=scores,
    )  # fmt: skip
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    masks = rule.choose(given)
    assert sum(int(mask.sum()) for mask in masks.values()) == (96 + 48) // 2
    assert all(mask.dtype == torch.bool and mask.shape == weights[key].shape for key, mask in masks.items())
    if selection.pattern:
        assert all(int(group.sum()) == 2 for mask in masks.values() for group in mask.view(-1, 4))
    assert all(weights[key].equal(weight) for key, weight in before.items())
    assert all(mask.all() for mask in everything.values())


@pytest.mark.parametrize(
    ("interval", "stages", "every", "moves"),
    [(100, 1, 80, False), (60, 1, 80, False), (59, 1, 80, True), (10, 8, 10, False), (10, 4, 20, True)],
)
def test_rigl_without_a_single_move_is_refused(interval: int, stages: int, every: int, moves: bool) -> None:
    """Up to three quarters of 80 steps; where a stage ends, the next one chooses by size."""
    schedule = Schedule("linear", stages=stages, end=0.5)
    if moves:
        assert Plan.of(schedule, RigL(interval), every).steps == 80
        return
    with pytest.raises(TrainingError, match=r"rigl moves no zeros(.|\n)*lower interval"):
        Plan.of(schedule, RigL(interval), every)


@pytest.mark.parametrize(
    "rule",
    [
        "obd", {"rigl": {"interval": 0}}, {"rigl": {"fraction": 1.0}}, {"rigl": {"until": 0}}, {"rigl": {"alpha": 1}},
        {"rigl": {"initial": "zero"}}, {"movement": {"score_rate": 0}}, {"soft-movement": {"threshold": 1}},
        {"sr-ste": {"decay": -1}}, {"lottery": {"rewind": -1}}, {"lottery": {"control": "luck"}},
        {"grasp": {"temperature": 0}}, {"rigl": {}, "snip": {}}, {"rigl": 3}, 3,
    ],
)  # fmt: skip
def test_rules_refuse(rule: Any) -> None:
    with pytest.raises(TrainingError, match="expected: "):
        read_rule(rule)


def test_selections_refuse() -> None:
    with pytest.raises(TrainingError, match="N:M"):
        read_selection(Lottery(), "0.5", None)
    with pytest.raises(TrainingError, match="matrix or model"):
        read_selection(Lottery(), None, "layer")
    with pytest.raises(TrainingError, match=r"leave schedule\.end out"):
        read_schedule({"end": 0.6}, read_selection(Lottery(), "2:4", None))
    assert read_schedule({}, read_selection(Lottery(), "1:4", None)).end == 0.75
    assert read_selection(Lottery(), None, None).scope == "model"
    with pytest.raises(TrainingError, match=r"soft-movement with the pattern 2:4(.|\n)*sr-ste"):
        read_selection(SoftMovement(), "2:4", None)
    with pytest.raises(TrainingError, match=r"scope model with the pattern 2:4(.|\n)*remove scope"):
        read_selection(Lottery(), "2:4", "model")
    with pytest.raises(PatternError, match="multiple of 4"):
        Selection(pattern=NM(2, 4)).masks({"w": torch.ones(2, 6)}, 0.5)
    with pytest.raises(NumericsError, match="NaN"):
        Selection("model").masks({"w": torch.full((2, 2), math.nan)}, 0.5)
