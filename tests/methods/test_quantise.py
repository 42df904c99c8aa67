"""Quantised weights: their form, the zeros, and the errors that later columns make up for."""

import pytest
import torch

from llmprune.errors import RecipeError
from llmprune.losses import relative_loss
from llmprune.methods import SparseGPT, Wanda
from llmprune.methods.quantise import Quantiser
from llmprune.patterns import parse
from llmprune.statistics import Gram
from llmprune.storage.formats import quantise

SIZES = [(8, 128), (8, 32), (8, 7), (8, None), (4, 128), (4, 20), (4, None)]


def problem(width=152, rows=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    gram = Gram.empty(width)
    gram.update(torch.randn(4 * width, width, generator=generator) @ mix)
    return torch.randn(rows, width, generator=generator).to(dtype).float(), gram


def rounded(weight, bits, group):
    """To the nearest, without compensation."""
    if bits == 8:
        return quantise(weight, group or weight.shape[1])
    parts = weight.split(group or weight.shape[1], 1)
    peaks = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in parts], 1)
    return (weight * 7 / peaks).nan_to_num().round() * peaks / 7


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), SIZES)
def test_every_group_is_on_the_grid_of_its_peak(bits, group, stored):
    weight, gram = problem(dtype=stored)
    pruned = SparseGPT()(weight, gram, parse("0.5"))
    result = Quantiser(bits, group)(pruned.weight, pruned.mask, gram, stored)
    assert result.dtype == torch.float32
    assert torch.equal(result.to(stored).float(), result)
    assert not result[~pruned.mask].any()
    for part in result.split(group or weight.shape[1], 1):
        shares = (part.double() / part.abs().amax(1, keepdim=True).double()).nan_to_num()
        numbers = shares * (127 if bits == 8 else 7)
        # Rounded to the stored dtype, a weight is off by half of its last digit.
        assert ((numbers - numbers.round()).abs() <= numbers.abs() * torch.finfo(stored).eps + 1e-9).all()
    if bits == 8:
        assert torch.equal(quantise(result.to(stored), group or weight.shape[1]).float(), result)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 20), (4, None), (8, None)])
def test_later_columns_make_up_for_the_errors(bits, group, pattern):
    weight, gram = problem()
    pruned = SparseGPT()(weight, gram, parse(pattern))
    losses = {
        name: relative_loss(pruned.weight, values, gram)
        for name, values in (
            ("compensated", Quantiser(bits, group)(pruned.weight, pruned.mask, gram, torch.float32)),
            ("nearest", rounded(pruned.weight, bits, group)),
        )
    }
    assert losses["compensated"] < 0.9 * losses["nearest"]


def test_quantising_what_sparsegpt_returns_is_quantising_inside_it():
    """Column by column in float64: mask and compensation of both errors at once, straight from the formulas."""
    weight, gram = problem(width=12, rows=5)
    weight, upper = weight.double(), gram.factor(0.01).upper.double()
    pruned = SparseGPT()(weight, gram, parse("0.5"))
    peaks = pruned.weight.abs().amax(1)
    errors, expected = torch.zeros(12, 5, dtype=torch.float64), torch.zeros(5, 12, dtype=torch.float64)
    for k in range(12):
        present = weight[:, k] + upper[:k, k] @ errors[:k] / upper[k, k]
        number = (present * 127 / peaks).round().clamp(-127, 127)
        first = pruned.weight[:, k].abs() == peaks
        number = torch.where(first, pruned.weight[:, k].sign() * 127, number)
        expected[:, k] = number * pruned.mask[:, k] * peaks / 127
        errors[k] = weight[:, k] - expected[:, k]
    result = Quantiser(8, 300)(pruned.weight, pruned.mask, gram, torch.float64)
    # One group in one step: its peaks are those of the values at its beginning, SparseGPT's own.
    present = pruned.weight
    assert torch.equal(present.abs().amax(1), result.abs().amax(1))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_rows_of_zeros_dead_inputs_and_empty_matrices_stay():
    weight, gram = problem(width=20, rows=4)
    weight[1] = 0
    gram.sums[:, 3] = gram.sums[3] = 0
    result = Quantiser(4, 8)(weight, weight != 0, gram, torch.bfloat16)
    assert not result[1].any()
    assert result.isfinite().all()
    empty = Quantiser()(torch.zeros(0, 20), torch.zeros(0, 20, dtype=torch.bool), gram, torch.float32)
    assert empty.shape == (0, 20)


def test_inputs_are_not_changed():
    weight, gram = problem()
    pruned = Wanda()(weight, gram, parse("2:4"))
    before = pruned.weight.clone(), pruned.mask.clone(), gram.products.clone()
    Quantiser(4)(pruned.weight, pruned.mask, gram, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(before, (pruned.weight, pruned.mask, gram.products), strict=True))


def test_groups_without_columns_are_refused():
    with pytest.raises(RecipeError, match="quantise"):
        Quantiser(group=0)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, None), (8, 20)])
def test_the_scale_of_the_inputs_changes_nothing_beside_dead_ones(bits, group):
    weight, _ = problem()
    inputs = torch.randn(600, weight.shape[1], generator=torch.Generator().manual_seed(0))
    inputs[:, ::5] = 0
    results = []
    for scale in (1.0, 2.0**-12):
        gram = Gram.empty(weight.shape[1])
        gram.update(inputs * scale)
        results.append(Quantiser(bits, group)(weight, torch.ones_like(weight, dtype=torch.bool), gram, torch.float32))
    assert torch.equal(*results)
