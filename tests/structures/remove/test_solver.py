"""Group removal against brute force: every candidate set is refitted by a plain float64 inverse."""

import itertools
import math

import pytest
import torch
from references import correlated_inputs, output_error
from torch import Tensor

from llmprune.errors import NumericsError, PatternError, RecipeError
from llmprune.structures.remove import exchange, solver
from llmprune.structures.remove.problem import GroupRemoval, RemovalSettings
from llmprune.structures.remove.solver import refit_groups, remove_groups

DAMPING = 0.01


def sample(rows: int, width: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its inputs [tokens, width] and their Gram, in float64."""
    inputs = correlated_inputs(tokens, width, seed).double()
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def best_fit(weight: Tensor, gram: Tensor, size: int, kept: set[int]) -> Tensor:
    columns = [group * size + offset for group in sorted(kept) for offset in range(size)]
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = (weight @ gram)[:, columns] @ torch.linalg.inv(gram[columns][:, columns])
    return fitted


def loss(weight: Tensor, gram: Tensor, size: int, kept: set[int]) -> float:
    change = weight - best_fit(weight, gram, size, kept)
    return float(((change @ gram) * change).sum())


def slow_greedy(
    weight: Tensor, gram: Tensor, size: int, remove: int, partitions: int = 1
) -> tuple[set[int], list[float]]:
    groups = weight.shape[1] // size
    kept, losses = set(range(groups)), [0.0]
    for turn in range(remove):
        lost = [
            sum(group * partitions // groups == part for group in range(groups) if group not in kept)
            for part in range(partitions)
        ]
        open_to = [group for group in sorted(kept) if lost[group * partitions // groups] == turn // partitions]
        gone = min(open_to, key=lambda group: loss(weight, gram, size, kept - {group}))
        kept -= {gone}
        losses.append(loss(weight, gram, size, kept))
    return kept, losses


def slow_swaps(weight: Tensor, gram: Tensor, size: int, kept: set[int], partitions: int = 1) -> tuple[set[int], int]:
    groups, swaps = weight.shape[1] // size, 0
    while True:
        pairs = [
            (loss(weight, gram, size, (kept | {back}) - {out}), back, out)
            for back in set(range(groups)) - kept
            for out in kept
            if back * partitions // groups == out * partitions // groups
        ]
        lowest, back, out = min(pairs)
        if lowest >= loss(weight, gram, size, kept) * (1 - 1e-6):
            return kept, swaps
        kept, swaps = (kept | {back}) - {out}, swaps + 1


def kept_of(removal: GroupRemoval, groups: int) -> set[int]:
    return set(range(groups)) - set(removal.removed.tolist())


CASES = [(1, 24, 12, 1), (1, 23, 9, 1), (3, 24, 4, 1), (4, 48, 6, 3), (1, 24, 8, 4), (2, 34, 16, 1)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("size", "width", "remove", "partitions"), CASES)
def test_greedy_equals_brute_force(size: int, width: int, remove: int, partitions: int, seed: int) -> None:
    weight, _, gram = sample(5, width, seed)
    found = remove_groups(weight, gram, size, remove, RemovalSettings(DAMPING, swaps=0, partitions=partitions))
    kept, losses = slow_greedy(weight, damped(gram), size, remove, partitions)
    assert kept_of(found, width // size) == kept
    exact = torch.tensor(losses, dtype=torch.float64) / float(((weight @ gram) * weight).sum())
    assert torch.allclose(found.curve, exact, rtol=1e-6, atol=1e-12)
    fitted = best_fit(weight, damped(gram), size, kept)
    assert torch.allclose(found.weight, fitted, rtol=0, atol=1e-9 * float(fitted.abs().max()))
    assert (found.swaps, found.damping, found.tried) == (0, DAMPING, (DAMPING,))


@pytest.mark.parametrize("panel", [1, 4, 6])
def test_panels_change_nothing(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, gram = sample(5, 48)
    settings = RemovalSettings(swaps=0)
    plain = remove_groups(weight, gram, 2, 15, settings)
    monkeypatch.setattr(solver, "_PANEL", panel)
    found = remove_groups(weight, gram, 2, 15, settings)
    assert torch.equal(found.removed, plain.removed)
    assert torch.allclose(found.curve, plain.curve, rtol=1e-9)


def test_more_columns_than_a_panel_holds() -> None:
    """The loss at the end of the search is that of its groups, computed at once."""
    weight, _, gram = sample(40, 300, tokens=900)
    found = remove_groups(weight, gram, 1, 200, RemovalSettings(DAMPING, swaps=0))
    total = float(((weight @ gram) * weight).sum())
    assert float(found.curve[-1]) == pytest.approx(loss(weight, damped(gram), 1, kept_of(found, 300)) / total, rel=1e-8)
    assert bool((found.curve.diff() >= 0).all())


@pytest.mark.parametrize("seed", [0, 3, 5])
@pytest.mark.parametrize(("size", "width", "remove", "partitions"), CASES)
def test_exchanges_equal_brute_force(size: int, width: int, remove: int, partitions: int, seed: int) -> None:
    weight, _, gram = sample(5, width, seed)
    found = remove_groups(weight, gram, size, remove, RemovalSettings(DAMPING, swaps=50, partitions=partitions))
    greedy, _ = slow_greedy(weight, damped(gram), size, remove, partitions)
    kept, swaps = slow_swaps(weight, damped(gram), size, greedy, partitions)
    assert (kept_of(found, width // size), found.swaps) == (kept, swaps)


def test_exchanges_happen_several_in_a_row_and_stop_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, gram = sample(8, 60, seed=2)
    errors = [remove_groups(weight, gram, 1, 30, RemovalSettings(1e-6, swaps=limit)) for limit in range(4)]
    assert [removal.swaps for removal in errors] == [0, 1, 2, 3]
    assert all(later.error < earlier.error for earlier, later in itertools.pairwise(errors))
    monkeypatch.setattr(exchange, "_EXCHANGES", 1)
    one_by_one = remove_groups(weight, gram, 1, 30, RemovalSettings(1e-6, swaps=3))
    assert torch.equal(one_by_one.removed, errors[3].removed)


@pytest.mark.parametrize("size", [1, 3])
def test_a_swept_tableau_equals_a_new_one(size: int) -> None:
    weight, _, gram = sample(5, 24)
    problem = solver.Problem(weight, gram, size, RemovalSettings())
    removed = torch.zeros(24 // size, dtype=torch.bool)
    removed[[1, 4, 5]] = True
    swept = exchange.Tableau(problem, DAMPING, removed)
    swept.sweep(4, 1)
    swept.sweep(2, -1)
    removed[4], removed[2] = False, True
    fresh = exchange.Tableau(problem, DAMPING, removed)
    assert torch.allclose(swept.pivots, fresh.pivots, rtol=1e-8, atol=1e-10 * float(fresh.pivots.abs().max()))
    assert torch.allclose(swept.energies, fresh.energies, rtol=1e-8, atol=1e-10 * float(fresh.energies.abs().max()))
    assert fresh.loss == pytest.approx(loss(weight, damped(gram), size, set(range(24 // size)) - {1, 2, 5}), rel=1e-8)


def test_the_error_is_that_of_the_outputs() -> None:
    weight, inputs, gram = sample(7, 30)
    found = remove_groups(weight, gram, 3, 4)
    exact = output_error(weight, found.weight, inputs) / output_error(weight, torch.zeros_like(weight), inputs)
    assert found.error == pytest.approx(exact, rel=1e-9)
    # The search minimises the damped loss, of which the error is a part.
    assert 0 < found.error < float(found.curve[-1])


def test_removed_groups_are_zero_and_the_rest_is_not() -> None:
    weight, _, gram = sample(7, 30)
    found = remove_groups(weight, gram, 3, 4)
    zero = (found.weight == 0).all(0).view(-1, 3).all(1)
    assert zero.nonzero().view(-1).tolist() == found.removed.tolist() == sorted(found.removed.tolist())
    assert len(found.removed) == 4
    assert found.removed.dtype == torch.int64


def test_partitions_lose_the_same_number() -> None:
    weight, _, gram = sample(7, 48)
    weight[:, :12] *= 1e-3
    found = remove_groups(weight, gram, 2, 12, RemovalSettings(partitions=4))
    assert torch.bincount(found.removed // 6, minlength=4).tolist() == [3, 3, 3, 3]
    free = remove_groups(weight, gram, 2, 12)
    assert torch.bincount(free.removed // 6, minlength=4).tolist() != [3, 3, 3, 3]


def test_float32_loses_no_quality() -> None:
    weight, _, gram = sample(64, 320, tokens=1200)
    exact = remove_groups(weight, gram, 1, 80)
    found = remove_groups(weight.float(), gram.float(), 1, 80)
    assert found.weight.dtype == torch.float32
    change = weight - found.weight.double()
    error = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())
    assert error <= 1.02 * exact.error
    assert found.error == pytest.approx(error, rel=1e-3)


def test_a_copy_takes_over() -> None:
    weight, inputs, _ = sample(6, 12)
    inputs[:, 7] = -2 * inputs[:, 3]
    found = remove_groups(weight, inputs.T @ inputs, 1, 1, RemovalSettings(damping=1e-9))
    assert found.removed.tolist() in ([3], [7])
    expected = weight[:, 3] - 2 * weight[:, 7] if found.removed.tolist() == [7] else weight[:, 7] - 0.5 * weight[:, 3]
    assert torch.allclose(found.weight[:, 10 - int(found.removed)], expected, atol=1e-6)
    assert found.error < 1e-12


def test_dead_inputs_go_first_and_those_that_stay_keep_their_weights() -> None:
    weight, inputs, _ = sample(6, 16)
    inputs[:, [2, 9, 11]] = 0
    weight[:, [2, 9, 11]] = 1e6
    gram = inputs.T @ inputs
    three = remove_groups(weight, gram, 1, 3)
    assert three.removed.tolist() == [2, 9, 11]
    assert three.error == 0
    one = remove_groups(weight, gram, 1, 1)
    assert one.removed.tolist() == [2]
    assert torch.equal(one.weight[:, [9, 11]], weight[:, [9, 11]])


@pytest.mark.parametrize("size", [1, 4])
def test_nothing_and_everything(size: int) -> None:
    weight, _, gram = sample(5, 12)
    nothing = remove_groups(weight, gram, size, 0)
    assert torch.equal(nothing.weight, weight)
    assert (nothing.error, nothing.curve.tolist(), nothing.removed.tolist()) == (0.0, [0.0], [])
    everything = remove_groups(weight, gram, size, 12 // size)
    assert int(everything.weight.count_nonzero()) == 0
    assert everything.error == pytest.approx(1)
    assert len(everything.curve) == 12 // size + 1


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 3), (3, 63), (123, 5)])
def test_odd_shapes(rows: int, width: int) -> None:
    weight, _, gram = sample(rows, width)
    found = remove_groups(weight, gram, 1, width // 2)
    kept, _ = (
        slow_swaps(weight, damped(gram), 1, slow_greedy(weight, damped(gram), 1, width // 2)[0])
        if width > 1
        else ({0}, 0)
    )
    assert kept_of(found, width) == kept


def test_inputs_that_are_all_zero() -> None:
    weight = torch.ones(3, 4)
    found = remove_groups(weight, torch.zeros(4, 4), 1, 2)
    assert (found.error, found.removed.tolist()) == (0.0, [0, 1])


def test_nothing_is_mutated_and_twice_is_the_same() -> None:
    weight, _, gram = sample(5, 24)
    before = weight.clone(), gram.clone()
    first, second = (remove_groups(weight, gram, 2, 5) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.curve, second.curve)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_given_groups_are_refitted() -> None:
    weight, _, gram = sample(5, 24)
    found = refit_groups(weight, gram, 3, torch.tensor([6, 1]), RemovalSettings(DAMPING))
    fitted = best_fit(weight, damped(gram), 3, {0, 2, 3, 4, 5, 7})
    assert torch.allclose(found.weight, fitted, rtol=0, atol=1e-9 * float(fitted.abs().max()))
    assert (found.removed.tolist(), found.curve.tolist()) == ([1, 6], [])


def test_without_refit_the_weights_stay() -> None:
    weight, _, gram = sample(5, 24)
    found = remove_groups(weight, gram, 3, 2, RemovalSettings(refit=False))
    kept = found.weight != 0
    assert torch.equal(found.weight[kept], weight[kept])
    assert found.error > remove_groups(weight, gram, 3, 2).error


def test_a_singular_gram_climbs_the_ladder() -> None:
    weight, inputs, _ = sample(5, 24)
    gram = inputs[:10].T @ inputs[:10]
    found = remove_groups(weight.float(), gram.float(), 1, 12, RemovalSettings(damping=0))
    assert found.tried[0] == 0
    assert found.damping == found.tried[-1] == 0.01
    assert math.isfinite(found.error)


def test_a_pivot_that_fails_late_climbs_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, gram = sample(5, 24)
    remove = solver._Elimination.remove

    def spoil(state: solver._Elimination, group: int) -> None:
        remove(state, group)
        if not spoiled:
            spoiled.append(group)
            state.inverse_blocks.neg_()

    spoiled: list[int] = []
    monkeypatch.setattr(solver._Elimination, "remove", spoil)
    found = remove_groups(weight, gram, 2, 5, RemovalSettings(damping=0.02))
    assert found.tried == (0.02, 0.1)
    assert torch.equal(found.weight, remove_groups(weight, gram, 2, 5, RemovalSettings(damping=0.1)).weight)


def test_no_damping_saves_an_indefinite_gram() -> None:
    weight, _, gram = sample(5, 24)
    with pytest.raises(NumericsError, match=r"not positive definite at damping \[0.01, 0.1, 1.0\]"):
        remove_groups(weight, -gram, 1, 3)


@pytest.mark.parametrize("place", ["weight", "gram"])
def test_values_that_are_not_finite(place: str) -> None:
    weight, _, gram = sample(5, 24)
    (weight if place == "weight" else gram)[2, 3] = math.nan
    with pytest.raises(NumericsError, match=place.replace("gram", "Hessian")):
        remove_groups(weight, gram, 1, 3)


@pytest.mark.parametrize(
    ("size", "remove", "partitions", "message"),
    [(5, 1, 1, "groups of 5"), (0, 1, 1, "groups of 0"), (1, 25, 1, "25 of 24 groups"), (1, -1, 1, "-1 of 24 groups"),
     (1, 3, 2, "evenly"), (1, 5, 5, "evenly")],
)  # fmt: skip
def test_groups_that_do_not_fit(size: int, remove: int, partitions: int, message: str) -> None:
    weight, _, gram = sample(5, 24)
    with pytest.raises(PatternError, match=message):
        remove_groups(weight, gram, size, remove, RemovalSettings(partitions=partitions))


@pytest.mark.parametrize("removed", [[0, 0], [8], [-1]])
def test_given_groups_that_do_not_fit(removed: list[int]) -> None:
    weight, _, gram = sample(5, 24)
    with pytest.raises(PatternError, match="distinct indices"):
        refit_groups(weight, gram, 3, torch.tensor(removed))


@pytest.mark.parametrize("knobs", [{"damping": -1.0}, {"damping": math.nan}, {"swaps": -1}, {"partitions": 0}])
def test_settings_out_of_range(knobs: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        RemovalSettings(**knobs)
