"""What holds for every method under every pattern; a new method or pattern is covered by its row in the table."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import product
from typing import Any

import pytest
import torch
from references import correlated_inputs, least_squares, output_error, violations, wanda_scores
from torch import Tensor

from llmprune import methods
from llmprune.errors import NumericsError, PatternError
from llmprune.losses import relative_loss
from llmprune.methods import Chain, Method, Pruned, Random, Refit, SparseGPT, gradient_kind, with_gradient
from llmprune.patterns import Block, Pattern, parse
from llmprune.statistics import ColumnNorm, Gram

SHAPE = (24, 48)


def given_gradients(method: Method) -> Method:
    """The method; if it reads gradients, with some that depend on the weight at their place, and move with it."""
    return method if gradient_kind(method) is None else WithGradients(method)


class WithGradients:
    """Gives a method a gradient for whichever weight it is called with."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def _bound(self, weight: Tensor) -> Method:
        return with_gradient(self._method, lambda: (3 * weight.double()).cos() ** 2 + 0.01)

    def scores(self, weight: Tensor, statistics: ColumnNorm | Gram | None) -> Tensor:
        return self._bound(weight).scores(weight, statistics)

    def __call__(self, weight: Tensor, statistics: ColumnNorm | Gram | None, pattern: Pattern) -> Pruned:
        return self._bound(weight)(weight, statistics, pattern)


# Every method, and a chain whose steps work with every pattern.
METHODS: dict[str, Callable[[], Method]] = {
    **{name: (lambda kind=kind: given_gradients(kind())) for name, kind in methods.METHODS.items()},
    "sparsegpt + refit": lambda: Chain(SparseGPT(), (("refit", Refit()),)),
}
PATTERNS = [
    *("0.5", "0.3/row", "0.37/matrix", "0.6/layer", "0.01", "0.99/row"),
    *("2:4", "4:8", "1:4", "3:4", "1:3", "5:24"),
    *("0.5@8x8", "0.5@8x8/row", "0.3@1x16", "0.7@24x1", "0.25@2x3/row"),
    *("0", "0/row", "4:4", "0@8x8", "1", "1/row", "0:4", "1@8x8"),
]
DENSE = [text for text in PATTERNS if parse(text).sparsity == 0]
EMPTY = [text for text in PATTERNS if parse(text).sparsity == 1]
# Methods that promise not to touch the weights that stay.
SELECTING = ["random", "magnitude", "wanda", "ria", "gradient", "taylor", "fisher"]
# Methods that end with a least-squares fit.
REFITTED = ["alps", "sparsegpt + refit"]
CALIBRATED = [name for name, method in METHODS.items() if method().needs]

every_method = pytest.mark.parametrize("name", METHODS)


def pairs(names: Iterable[str] = METHODS, texts: Iterable[str] = PATTERNS) -> pytest.MarkDecorator:
    """Every method with every pattern that it does not refuse; what is refused, and why, is tested by itself."""
    found = [(name, text) for text in texts for name in names if not METHODS[name]().refuses(parse(text))]
    return pytest.mark.parametrize(("name", "text"), found)


def weight_of(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    """Normal weights in rows of unequal scale."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape[0], 1, generator=generator))


def collect(method: Method, inputs: Tensor) -> Any:
    """The statistics that a method needs, in the dtype of the inputs."""
    if method.needs is None:
        return None
    statistics = method.needs.empty(inputs.shape[1])
    for name, value in tensors(statistics).items():
        setattr(statistics, name, value.to(inputs.dtype))
    statistics.update(inputs)
    return statistics


def tensors(statistics: ColumnNorm | Gram | None) -> dict[str, Tensor]:
    values = {field.name: getattr(statistics, field.name) for field in fields(statistics)} if statistics else {}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def prune(name: str, weight: Tensor, inputs: Tensor, text: str) -> Pruned:
    method = METHODS[name]()
    return method(weight, collect(method, inputs), parse(text))


def check(pruned: Pruned, weight: Tensor, name: str, text: str) -> None:
    """What every result must be."""
    pattern = parse(text).compared(METHODS[name]().scope)
    assert pruned.mask.shape == pruned.weight.shape == weight.shape
    assert pruned.weight.dtype == weight.dtype
    assert int((~pruned.mask).sum()) == pattern.zeros((weight.shape[0], weight.shape[1]))
    assert violations(pruned.mask, pattern) == []
    assert not pruned.weight[~pruned.mask].any()
    assert bool(torch.isfinite(pruned.weight).all())
    assert pruned.weight.is_contiguous()


@pairs()
def test_the_count_is_exact_and_the_mask_legal(name: str, text: str) -> None:
    weight, inputs = weight_of(), correlated_inputs(200, SHAPE[1])
    pruned = prune(name, weight, inputs, text)
    check(pruned, weight, name, text)
    # Weights that stay are not zero by accident, or a count of zeros would be another number.
    assert bool(pruned.weight[pruned.mask].all())
    if name in SELECTING:
        assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])


@pairs()
def test_inputs_are_not_changed(name: str, text: str) -> None:
    method, weight = METHODS[name](), weight_of()
    statistics = collect(method, correlated_inputs(200, SHAPE[1]))
    weight_before, statistics_before = weight.clone(), copy.deepcopy(statistics)
    pruned = method(weight, statistics, parse(text))
    assert torch.equal(weight, weight_before)
    assert tensors(statistics).keys() == tensors(statistics_before).keys()
    for field, value in tensors(statistics).items():
        assert torch.equal(value, tensors(statistics_before)[field])
    assert pruned.weight.data_ptr() != weight.data_ptr()
    if statistics:
        assert statistics.tokens == statistics_before.tokens


@pairs()
def test_twice_gives_the_same_bits(name: str, text: str) -> None:
    """Also with the same statistics, whose factor is by then cached, and for a weight stored column by column."""
    method, weight, inputs = METHODS[name](), weight_of(), correlated_inputs(200, SHAPE[1])
    statistics = collect(method, inputs)
    first = method(weight, statistics, parse(text))
    torch.rand(7)
    others = [
        method(weight, statistics, parse(text)),
        METHODS[name]()(weight.clone(), collect(method, inputs), parse(text)),
        method(weight.T.contiguous().T, statistics, parse(text)),
    ]
    for other in others:
        assert torch.equal(other.mask, first.mask)
        assert torch.equal(other.weight, first.weight)


@pairs([n for n in METHODS if n != "random"], [text for text in PATTERNS if not isinstance(parse(text), Block)])
def test_permuted_rows_give_a_permuted_result(name: str, text: str) -> None:
    """Without ties a score's rank does not depend on its place. Blocks span rows, and random masks mean nothing."""
    weight, inputs = weight_of(), correlated_inputs(200, SHAPE[1])
    order = torch.randperm(SHAPE[0])
    plain, permuted = prune(name, weight, inputs, text), prune(name, weight[order], inputs, text)
    assert torch.equal(permuted.mask, plain.mask[order])
    assert torch.allclose(permuted.weight, plain.weight[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["0.5/row", "2:4", "5:24"])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_rows_do_not_see_one_another(name: str, text: str) -> None:
    """Not even where scores tie: each row alone gives the same bits as the whole."""
    weight, inputs = weight_of().round(), correlated_inputs(200, SHAPE[1])
    whole = prune(name, weight, inputs, text)
    for row in range(SHAPE[0]):
        assert torch.equal(prune(name, weight[row : row + 1], inputs, text).weight[0], whole.weight[row])


@pairs(texts=DENSE)
def test_sparsity_zero_is_the_identity(name: str, text: str) -> None:
    weight = weight_of()
    pruned = prune(name, weight, correlated_inputs(200, SHAPE[1]), text)
    assert bool(pruned.mask.all())
    assert torch.allclose(pruned.weight, weight, rtol=1e-6, atol=0)


@pairs(texts=EMPTY)
def test_sparsity_one_is_all_zeros(name: str, text: str) -> None:
    pruned = prune(name, weight_of(), correlated_inputs(200, SHAPE[1]), text)
    assert not pruned.mask.any()
    assert torch.equal(pruned.weight, torch.zeros(SHAPE))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-30])
@pairs()
def test_equal_weights(name: str, value: float, text: str) -> None:
    weight = torch.full(SHAPE, value)
    alike = (torch.ones(200, SHAPE[1]), torch.eye(SHAPE[1])) if value == 1.0 else ()
    for inputs in (correlated_inputs(200, SHAPE[1]), *alike):
        check(prune(name, weight, inputs, text), weight, name, text)


# ADMM ranks again and again, and by then equal weights are no longer equal.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("random", "admm", "obs")])
def test_of_equal_scores_the_lower_index_goes_first(name: str) -> None:
    for text, expected in (("0.5/row", [0, 0, 1, 1]), ("0.25/row", [0, 1, 1, 1]), ("1:2", [0, 1, 0, 1])):
        mask = prune(name, torch.full((3, 4), 2.0), torch.eye(4), text).mask
        assert mask.int().tolist() == [expected] * 3


@pairs(CALIBRATED, ["0.5/row", "2:4", "0.5@24x1", "0.3@2x1/row"])
def test_dead_inputs_go_first(name: str, text: str) -> None:
    weight, inputs = weight_of(), correlated_inputs(200, SHAPE[1])
    dead = torch.zeros(SHAPE[1], dtype=torch.bool)
    dead[[0, 5, 6, 17, 30, 47]] = True
    inputs[:, dead] = 0
    weight[:, dead] *= 1e6
    pruned = prune(name, weight, inputs, text)
    check(pruned, weight, name, text)
    assert not pruned.mask[:, dead].any()


@pairs([n for n in CALIBRATED if n not in ("wanda", "ria")], ["0.5@8x8", "0.5@16x16", "0.5@8x8/row"])
def test_dead_inputs_do_not_decide_which_blocks_go(name: str, text: str) -> None:
    """Weak inputs on the right, and as many dead ones everywhere but in the strongest columns, which have more."""
    weight = 0.02 * torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    inputs = 0.2 * torch.randn(1000, 96, generator=torch.Generator().manual_seed(1))
    inputs[:, 48:] *= 0.2
    inputs[:, [*range(0, 48, 4), *range(48, 96, 16)]] = 0
    pruned = prune(name, weight, inputs, text)
    assert not pruned.mask[:, 48:].any()
    assert relative_loss(weight, pruned.weight, collect(METHODS[name](), inputs)) < 0.05


@pairs(CALIBRATED, ["0.5", "0.6/row", "2:4", "0.5@8x8"])
def test_the_scale_of_the_inputs_changes_nothing(name: str, text: str) -> None:
    """Not a bit, for a power of two; nor beside dead inputs, whose diagonal no scale changes."""
    weight, inputs = weight_of(), correlated_inputs(200, SHAPE[1])
    inputs[:, [0, 5, 6, 17, 30, 47]] = 0
    one, other = (prune(name, weight, inputs * scale, text) for scale in (1, 2**-12))
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("tokens", [0, 200])
@pairs(CALIBRATED)
def test_inputs_that_are_all_dead(name: str, text: str, tokens: int) -> None:
    weight = weight_of()
    check(prune(name, weight, torch.zeros(tokens, SHAPE[1]), text), weight, name, text)


@pairs(CALIBRATED)
def test_a_single_token(name: str, text: str) -> None:
    weight = weight_of()
    check(prune(name, weight, correlated_inputs(1, SHAPE[1]), text), weight, name, text)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 123), (123, 1), (3, 3), (3, 63), (63, 3), (63, 123), (123, 123)], ids=str
)
@every_method
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    weight, inputs = weight_of(shape), correlated_inputs(50, shape[1])
    candidates = ["0.5", "0.5/row", "0.7/matrix", "1:3", "3:9", "10:41", "0.5@3x3", "0.5@1x3/row", "0.4@1x1", "0", "1"]
    fitting = [text for text in candidates if fits(parse(text), shape) and not METHODS[name]().refuses(parse(text))]
    assert len(fitting) >= (1 if name == "obs" else 6)
    for text in fitting:
        check(prune(name, weight, inputs, text), weight, name, text)


def fits(pattern: Pattern, shape: tuple[int, int]) -> bool:
    try:
        pattern.check(shape)
    except PatternError:
        return False
    return True


@pairs(texts=["3:5", "0.5@5x8", "0.5@8x7/row"])
def test_a_pattern_that_does_not_fit_is_refused(name: str, text: str) -> None:
    with pytest.raises(PatternError, match="24 x 48"):
        prune(name, weight_of(), correlated_inputs(20, SHAPE[1]), text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pairs(texts=["0.5", "2:4", "1", "0", "0.5@8x8"])
def test_weights_that_are_not_finite_are_refused(name: str, text: str, value: float) -> None:
    weight = weight_of()
    weight[3, 7] = value
    with pytest.raises(NumericsError):
        prune(name, weight, correlated_inputs(200, SHAPE[1]), text)


@pytest.mark.parametrize("value", [math.nan, 1e30])
@pairs(CALIBRATED, ["0.5", "2:4", "1", "0", "0.5@8x8"])
def test_inputs_whose_squares_are_not_finite_are_refused(name: str, text: str, value: float) -> None:
    inputs = correlated_inputs(200, SHAPE[1])
    inputs[3, 7] = value
    with pytest.raises(NumericsError, match="NaN or infinite"):
        prune(name, weight_of(), inputs, text)


@pairs()
def test_float64_gives_the_same_in_float64(name: str, text: str) -> None:
    """Random masks are drawn for the bits of the weights, so they differ."""
    weight, inputs = weight_of(), correlated_inputs(200, SHAPE[1])
    single, double = prune(name, weight, inputs, text), prune(name, weight.double(), inputs.double(), text)
    check(double, weight.double(), name, text)
    if name != "random":
        assert torch.equal(single.mask, double.mask)
        if name in REFITTED:
            # Conjugate gradient ends where the loss is flat: the masks and the loss agree, not the weights.
            errors = [output_error(weight, result.weight.double(), inputs) for result in (single, double)]
            assert errors[0] == pytest.approx(errors[1], rel=0.05, abs=1e-6)
        else:
            assert torch.allclose(single.weight.double(), double.weight, rtol=1e-3, atol=1e-4)


@pairs(texts=["0.5", "0.6/row", "2:4", "0.5@2x4"])
def test_no_method_beats_least_squares_on_its_mask(name: str, text: str) -> None:
    for seed in range(2):
        weight, inputs = weight_of(seed=seed), correlated_inputs(200, SHAPE[1], seed)
        pruned = prune(name, weight, inputs, text)
        best = output_error(weight, least_squares(weight, pruned.mask, inputs), inputs)
        assert output_error(weight, pruned.weight, inputs) >= best * (1 - 1e-9)


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8"])
def test_output_errors_fall_from_random_to_sparsegpt(text: str) -> None:
    """In aggregate: no theorem says so for a single matrix."""
    errors = dict.fromkeys(("sparsegpt", "wanda", "magnitude", "random"), 0.0)
    for seed, name in product(range(6), errors):
        weight, inputs = torch.nn.functional.normalize(weight_of((32, 96), seed)), correlated_inputs(1000, 96, seed)
        dense = output_error(weight, torch.zeros(32, 96), inputs)
        errors[name] += output_error(weight, prune(name, weight, inputs, text).weight, inputs) / dense
    assert errors["sparsegpt"] < 0.9 * errors["wanda"]
    assert errors["wanda"] < 0.9 * errors["magnitude"]
    assert errors["magnitude"] < 0.9 * errors["random"]


@pytest.mark.parametrize("name", METHODS)
def test_scores_cover_the_matrix_and_are_never_negative(name: str) -> None:
    method, weight = METHODS[name](), weight_of()
    scores = method.scores(weight, collect(method, correlated_inputs(200, SHAPE[1])))
    assert scores.shape == weight.shape
    assert bool((scores >= 0).all())


def test_wandas_score_is_the_papers() -> None:
    method, weight, inputs = METHODS["wanda"](), weight_of(), correlated_inputs(200, SHAPE[1])
    scores = method.scores(weight, collect(method, inputs))
    assert torch.allclose(scores.double(), wanda_scores(weight, inputs), rtol=1e-5, atol=0)


def test_magnitudes_score_is_the_absolute_weight() -> None:
    assert torch.equal(METHODS["magnitude"]().scores(weight_of(), None), weight_of().abs())


def test_methods_compare_where_their_papers_do() -> None:
    """Wanda inside each row, the others over the matrix; a scope that the pattern names comes first."""
    inputs = correlated_inputs(200, SHAPE[1])
    for name in (name for name in METHODS if name != "obs"):
        scope = "row" if name == "wanda" else "matrix"
        left_open = prune(name, weight_of(), inputs, "0.5").mask
        assert torch.equal(left_open, prune(name, weight_of(), inputs, f"0.5/{scope}").mask)
        other = {"matrix": "row", "row": "matrix"}[scope]
        assert not torch.equal(left_open, prune(name, weight_of(), inputs, f"0.5/{other}").mask)


@pytest.mark.parametrize("name", ["random", "magnitude", "wanda", "ria", "sparsegpt"])
def test_costs_of_a_matrix(name: str) -> None:
    """The forecast adds them up; what they amount to on a machine is measured elsewhere."""
    method = METHODS[name]()
    rows, width = SHAPE
    sweeps = name == "sparsegpt"
    assert method.work(SHAPE, parse("0.5")) == sweeps * 2 * rows * width**2
    assert method.shared_work(width) == sweeps * width**3 / 3
    assert method.workspace(SHAPE) == 20 * rows * width + sweeps * 6 * width**2


def test_random_masks_depend_on_the_seed_and_on_the_weights() -> None:
    seeds = [0, 1, 2, -1, 2**31, 2**32, 2**40, -(2**70)]
    masks = [Random(seed)(weight_of(), None, parse("0.5")).mask for seed in seeds]
    masks.append(Random()(weight_of(seed=1), None, parse("0.5")).mask)
    assert len({tuple(mask.view(-1).tolist()) for mask in masks}) == len(masks)


def test_random_masks_are_uniform() -> None:
    """Every weight is as likely to stay as any other: 400 masks, five standard deviations."""
    masks = [Random(seed)(weight_of(), None, parse("0.5")).mask for seed in range(400)]
    assert int((torch.stack(masks).sum(0) - 200).abs().max()) < 5 * math.sqrt(400 / 4)
