"""Block OBS against the formulas of its paper, one block at a time with explicit inverses, in float64."""

from itertools import product
from typing import Any

import pytest
import torch
from references import correlated_inputs, least_squares, output_error
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.losses import relative_loss
from llmprune.methods import BlockOBS, SparseGPT, block_obs
from llmprune.patterns import Block, parse
from llmprune.statistics import Gram

SHAPE = (24, 40)


def case(shape: tuple[int, int] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Gram]:
    inputs = correlated_inputs(400, shape[1], seed).to(dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight, Gram(inputs.T @ inputs, 400)


def greedy(weight: Tensor, gram: Tensor, pattern: Block, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Remove the cheapest block of all that may go, again and again, from whichever row of blocks it is in."""
    height, size = pattern.size
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    groups, blocks = weight.shape[0] // height, weight.shape[1] // size
    values = weight.clone().view(groups, height, -1)
    inverses = [torch.linalg.inv(damped) for _ in range(groups)]
    kept = {(group, block) for group, block in product(range(groups), range(blocks))}
    within = [{group} for group in range(groups)] if pattern.over == "row" else [set(range(groups))]
    zeros = pattern.zeros((weight.shape[0], weight.shape[1])) // (height * size)

    def step(group: int, block: int) -> tuple[float, Tensor, Tensor]:
        columns = torch.arange(block * size, (block + 1) * size)
        across = torch.linalg.solve(inverses[group][columns][:, columns], inverses[group][columns])
        pivot = torch.linalg.inv(inverses[group][columns][:, columns])
        removed = values[group][:, columns]
        return float((removed @ pivot * removed).sum()), columns, across

    for groups_here in within:
        found = {place: step(*place) for place in sorted(kept) if place[0] in groups_here}
        for _ in range(zeros // len(within)):
            (group, block), (_, columns, across) = min(found.items(), key=lambda item: item[1][0])
            values[group] -= values[group][:, columns] @ across
            inverses[group] = inverses[group] - inverses[group][:, columns] @ across
            kept.remove((group, block))
            del found[group, block]
            found |= {place: step(*place) for place in found if place[0] == group}
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for group, block in kept:
        mask[group * height : (group + 1) * height, block * size : (block + 1) * size] = True
    return values.view(weight.shape) * mask, mask


@pytest.mark.parametrize("chunk", [1, 2**28], ids=["one by one", "together"])
@pytest.mark.parametrize("text", ["0.5@4x4", "0.5@4x4/row", "0.3@8x2", "0.8@3x5", "0.5@12x4", "0.6@24x40"])
def test_equals_removal_one_block_at_a_time(text: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_obs, "_CHUNK_BYTES", chunk)
    weight, gram = case()
    pattern = parse(text)
    assert isinstance(pattern, Block)
    exact, mask = greedy(weight, gram.products, pattern)
    pruned = BlockOBS()(weight, gram, pattern)
    assert torch.equal(pruned.mask, mask)
    assert torch.allclose(pruned.weight, exact, rtol=0, atol=1e-9)
    assert (pruned.damping, pruned.tried) == (0.01, (0.01,))


def test_what_is_left_is_the_least_squares_fit() -> None:
    weight, gram = case()
    pruned = BlockOBS(damping=0.0)(weight, gram, parse("0.5@8x4"))
    inputs = correlated_inputs(400, SHAPE[1])
    best = output_error(weight, least_squares(weight, pruned.mask, inputs), inputs)
    assert output_error(weight, pruned.weight, inputs) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("text", ["0.5@8x8", "0.5@16x16", "0.7@4x8/row"])
def test_it_loses_less_than_a_sweep(text: str) -> None:
    """In aggregate, in float32: the sweep's columns compensate only for those before them."""
    lost = dict.fromkeys(("obs", "sparsegpt"), 0.0)
    for seed in range(3):
        weight, gram = case((48, 96), seed, torch.float32)
        for name, method in (("obs", BlockOBS()), ("sparsegpt", SparseGPT())):
            lost[name] += relative_loss(weight, method(weight, gram, parse(text)).weight, gram)
    assert lost["obs"] < 0.9 * lost["sparsegpt"]


def test_a_search_that_rounding_breaks_is_repeated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a pivot were not positive definite in float32."""
    seen, costs = [], block_obs._costs

    def broken(values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = costs(values, *others)
        seen.append(values.dtype)
        return *found[:2], found[2] | (values.dtype == torch.float32)

    weight, gram = case(dtype=torch.float32)
    plain = BlockOBS()(weight, gram, parse("0.5@8x4"))
    monkeypatch.setattr(block_obs, "_costs", broken)
    repeated = BlockOBS()(weight, gram, parse("0.5@8x4"))
    assert {torch.float32, torch.float64} == set(seen)
    assert repeated.weight.dtype == torch.float32
    assert torch.equal(repeated.mask, plain.mask)
    assert torch.equal(repeated.weight, plain.weight)


def test_a_pivot_that_is_not_positive_definite_is_noticed() -> None:
    values, left = torch.ones(2, 3, 4), torch.eye(4).repeat(2, 1, 1)
    gone = torch.zeros(2, 2, dtype=torch.bool)
    assert not bool(block_obs._costs(values, left, gone, 2)[2])
    left[1, 3, 3] = -1
    assert bool(block_obs._costs(values, left, gone, 2)[2])
    gone[1, 1] = True  # what is gone no longer matters
    assert not bool(block_obs._costs(values, left, gone, 2)[2])


@pytest.mark.parametrize("text", ["0.5", "2:4", "0.5/layer"])
def test_other_patterns_are_refused(text: str) -> None:
    weight, gram = case()
    with pytest.raises(PatternError, match="obs removes whole blocks"):
        BlockOBS()(weight, gram, parse(text))


def test_costs_follow_the_rows_of_blocks() -> None:
    shape, method = (64, 128), BlockOBS()
    small, large = (method.work(shape, parse(f"0.5@{height}x16")) for height in (8, 32))
    product = 2 * 64 * 128**2
    assert small - product == pytest.approx(4 * (large - product))
    assert method.work(shape, parse("0.9@8x16")) > small
    assert method.workspace((64, 8192)) > 12 * 8192**2
