"""Chains of a method and steps: each step lowers the loss or is undone; swaps and refits do what they claim."""

from itertools import product

import pytest
import torch
from references import correlated_inputs, least_squares, output_error, violations
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.losses import relative_loss
from llmprune.methods import ADMM, ALPS, Chain, Magnitude, Pruned, Refit, SparseGPT, Swaps, Wanda, method_name
from llmprune.patterns import Pattern, parse
from llmprune.statistics import Gram

PATTERNS = ["0.5", "0.3/row", "0.7/matrix", "2:4", "1:4", "5:24"]


def case(seed: int = 0, shape: tuple[int, int] = (24, 48), tokens: int = 400) -> tuple[Tensor, Gram, Tensor]:
    inputs = correlated_inputs(tokens, shape[1], seed)
    gram = Gram.empty(shape[1])
    gram.update(inputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), gram, inputs


def chain(*steps: str, method: type = Wanda) -> Chain:
    kinds = {"swaps": Swaps(damping=0.0), "refit": Refit(damping=0.0, iterations=200)}
    return Chain(method(), tuple((name, kinds[name]) for name in steps))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("method", [Wanda, SparseGPT, ALPS])
def test_losses_never_rise_and_are_those_of_the_result(method: type, text: str) -> None:
    weight, gram, _ = case()
    whole = chain("swaps", "refit", method=method)
    pruned = whole(weight, gram, parse(text))
    losses = [part.loss for part in pruned.losses]
    assert [part.step for part in pruned.losses] == ["", "swaps", "refit"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(relative_loss(weight, pruned.weight, gram), rel=1e-5)
    pattern = parse(text).compared(whole.scope)
    assert violations(pruned.mask, pattern) == []
    assert not pruned.weight[~pruned.mask].any()


@pytest.mark.parametrize("text", PATTERNS)
def test_swaps_lower_the_loss_and_keep_the_count_of_each_row(text: str) -> None:
    weight, gram, inputs = case()
    before, after = (run(weight, gram, parse(text)) for run in (chain(method=Wanda), chain("swaps")))
    assert torch.equal(before.mask.sum(1), after.mask.sum(1))
    assert output_error(weight, after.weight, inputs) < 0.9 * output_error(weight, before.weight, inputs)


def test_no_swap_is_left_that_would_gain() -> None:
    """Compared with every pair, tried one after another in float64."""
    weight, gram, _ = case(shape=(6, 12))
    pruned = chain("swaps")(weight, gram, parse("0.5"))
    products = gram.products.double()
    for row, values, mask in zip(weight.double(), pruned.weight.double(), pruned.mask, strict=True):
        error = (row - values) @ products @ (row - values)
        for out, back in product(mask.nonzero().view(-1).tolist(), (~mask).nonzero().view(-1).tolist()):
            tried = values.clone()
            tried[out] = 0
            slope = (row - tried) @ products[:, back]
            tried[back] = slope / products[back, back]
            assert (row - tried) @ products @ (row - tried) >= error * (1 - 1e-4)


@pytest.mark.parametrize("text", ["0.5/row", "2:4"])
@pytest.mark.parametrize("steps", [("swaps",), ("swaps", "refit")], ids="+".join)
def test_dead_inputs_keep_and_get_no_weight_at_any_scale(steps: tuple[str, ...], text: str) -> None:
    """A magnitude mask keeps large weights of dead inputs, which are removed at no cost for others."""
    weight, _, inputs = case()
    inputs[:, ::3] = 0
    weight[:, ::6] *= 3
    found = []
    for scale in (1.0, 2.0**-12):
        gram = Gram.empty(48)
        gram.update(inputs * scale)
        found.append(chain(*steps, method=Magnitude)(weight, gram, parse(text)))
        added = found[-1].mask & ~Magnitude()(weight, None, parse(text).compared("matrix")).mask
        assert not added[:, ::3].any()
        assert not (found[-1].weight[:, ::3] != weight[:, ::3])[found[-1].mask[:, ::3]].any()
        assert added.any()
        if text != "2:4":
            assert not found[-1].mask[:, ::3].any()
    assert torch.equal(found[0].mask, found[1].mask)
    assert torch.equal(found[0].weight, found[1].weight)


@pytest.mark.parametrize("text", ["0.5", "2:4", "0.5@8x8", "0.9"])
def test_a_refit_reaches_least_squares(text: str) -> None:
    weight, gram, inputs = case()
    pruned = chain("refit")(weight, gram, parse(text))
    best = output_error(weight, least_squares(weight, pruned.mask, inputs), inputs)
    assert output_error(weight, pruned.weight, inputs) == pytest.approx(best, rel=1e-3)


def test_a_step_that_raises_the_loss_is_undone() -> None:
    class Worse(Refit):
        def __call__(self, weight: Tensor, gram: Gram, pattern: Pattern, pruned: Pruned) -> Pruned:
            return Pruned(pruned.weight * 2, pruned.mask)

    weight, gram, _ = case()
    alone = SparseGPT()(weight, gram, parse("2:4"))
    pruned = Chain(SparseGPT(), (("worse", Worse()),))(weight, gram, parse("2:4"))
    assert torch.equal(pruned.weight, alone.weight)
    first, second = pruned.losses
    assert second.loss == first.loss
    assert second.undone is not None
    assert second.undone > first.loss
    assert pruned.damping == alone.damping


def test_swaps_refuse_blocks() -> None:
    weight, gram, _ = case()
    with pytest.raises(PatternError, match="step swaps: it swaps single weights"):
        chain("swaps")(weight, gram, parse("0.5@8x8"))


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8", "0.5@8x8"])
def test_better_solvers_lose_less(text: str) -> None:
    """In aggregate, in the order that their papers claim."""
    methods = {"alps": ALPS(), "admm": ADMM(), "refit": chain("refit", method=SparseGPT), "sparsegpt": SparseGPT()}
    lost = dict.fromkeys(methods, 0.0)
    for seed in range(4):
        weight, gram, _ = case(seed, (48, 96), 1000)
        for name, method in methods.items():
            lost[name] += relative_loss(weight, method(weight, gram, parse(text)).weight, gram)
    assert lost["alps"] < lost["admm"] < lost["sparsegpt"]
    assert lost["refit"] < lost["sparsegpt"]


def test_names_and_needs_are_those_of_the_parts() -> None:
    whole = chain("swaps", "refit", method=Magnitude)
    assert method_name(whole) == "magnitude + swaps + refit"
    assert whole.needs is Gram
    assert whole.scope == "matrix"
    assert whole.work((8, 16), parse("2:4")) > sum(step.work((8, 16)) for _, step in whole.steps)
    assert whole.workspace((8, 16)) == max(step.workspace((8, 16)) for _, step in whole.steps)
