"""Scores against loops over single channels in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericsError, PatternError
from llmprune.structures.choose.scores import NEEDS, SCORES, Channels, lowest_groups

GROUPS, TOKENS = 4, 50


def example() -> tuple[Channels, Tensor]:
    """A KV group's two kinds of widths: 3 columns of the reading matrix and 1 of another one; and the inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = draw(TOKENS, 12) * torch.linspace(0.1, 2, 12) + torch.linspace(-1, 2, 12)
    reading, writing = draw(5, 12), draw(7, 4)
    channels = Channels(
        groups=GROUPS,
        matrices=(reading, writing),
        reading=reading,
        tokens=TOKENS,
        sums=inputs.sum(0),
        squares=inputs.square().sum(0),
        active=(inputs > 0).sum(0).float(),
        products=inputs.T @ inputs,
        gradients=(draw(5, 12), draw(7, 4)),
        squared_gradients=(draw(5, 12).square(), draw(7, 4).square()),
        gains=(draw(12), draw(12)),
    )
    return channels, inputs.double()


def information(inputs: Tensor, reading: Tensor, columns: list[int]) -> float:
    """In nats, summed over outputs: from the residual of a regression of each output on the group's channels."""
    known = torch.cat([inputs[:, columns], torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    outputs = inputs @ reading.T
    left = outputs - known @ torch.linalg.lstsq(known, outputs).solution
    return float(0.5 * (outputs.var(0, unbiased=False) / left.var(0, unbiased=False)).log().sum())


def slow(name: str, channels: Channels, inputs: Tensor, group: int) -> float:
    """One group's score, written out."""
    columns = range(3 * group, 3 * group + 3)
    reading = channels.reading
    assert reading is not None
    # (weight, gradient, squared gradient) of every weight of the group.
    weights = [
        tuple(
            float(values[index][row, column])
            for values in (channels.matrices, channels.gradients, channels.squared_gradients)
        )
        for index, mine in ((0, columns), (1, [group]))
        for column in mine
        for row in range(len(channels.matrices[index]))
    ]
    mean_square = {j: float(inputs[:, j].square().mean()) for j in columns}
    norm = {j: float(reading[:, j].double().square().sum()) for j in columns}
    values = {
        "magnitude-l1": sum(abs(w) for w, _, _ in weights),
        "magnitude-l2": math.sqrt(sum(w * w for w, _, _ in weights)),
        "activation-norm": math.sqrt(sum(mean_square.values())),
        "activation-frequency": sum(float((inputs[:, j] > 0).double().mean()) for j in columns) / 3,
        "wanda": sum(float(reading[:, j].double().abs().sum()) * math.sqrt(mean_square[j]) for j in columns),
        "channel-norm": math.sqrt(sum(norm[j] * mean_square[j] for j in columns)),
        "flap": sum(float(inputs[:, j].var(unbiased=False)) * norm[j] for j in columns),
        "mutual-information": information(inputs, reading.double(), list(columns)),
        "taylor": sum(abs(g * w) for w, g, _ in weights),
        "fisher": sum(w * w * f / 2 for w, _, f in weights),
        "norm-gain": sum(abs(float(gain[j])) for gain in channels.gains for j in columns),
    }
    return values[name]


@pytest.mark.parametrize("name", SCORES)
def test_equals_the_formula(name: str) -> None:
    channels, inputs = example()
    found = SCORES[name](channels)
    exact = torch.tensor([slow(name, channels, inputs, group) for group in range(GROUPS)], dtype=torch.float64)
    assert found.shape == (GROUPS,)
    assert torch.allclose(found, exact, rtol=1e-5, atol=0)
    assert float(found.std()) > 0.01 * float(found.mean())


@pytest.mark.parametrize("name", SCORES)
def test_needs_are_what_is_read(name: str) -> None:
    channels, _ = example()
    fields = {need: getattr(channels, need) for need in NEEDS[name]}
    assert torch.equal(SCORES[name](Channels(GROUPS, **fields)), SCORES[name](channels))
    for need in NEEDS[name] - {"tokens"}:
        with pytest.raises((AssertionError, ValueError)):
            SCORES[name](Channels(GROUPS, **{key: value for key, value in fields.items() if key != need}))


def test_every_score_says_what_it_needs() -> None:
    assert set(NEEDS) == set(SCORES)


def test_a_constant_input_does_not_fluctuate() -> None:
    """FLAP's point: a bias can stand in for it. Sums are rounded, and a variance is never below zero all the same."""
    sums, squares = torch.tensor([1.0000001, 5.0]), torch.tensor([1.0, 26.0])
    channels = Channels(2, reading=torch.ones(2, 2), sums=sums, squares=squares)
    assert SCORES["flap"](channels).tolist() == [0, 2]


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(PatternError, match="12 channels in 5 groups"):
        SCORES["magnitude-l1"](Channels(5, matrices=(torch.ones(2, 12),)))


def test_values_that_are_not_finite() -> None:
    with pytest.raises(NumericsError, match="a score"):
        SCORES["magnitude-l2"](Channels(2, matrices=(torch.tensor([[1.0, math.inf]]),)))


def test_the_lowest_go() -> None:
    scores = torch.tensor([5.0, 1.0, 1.0, 1.0, 0.5, 9.0, 8.0, 7.0])
    assert lowest_groups(scores, 3).tolist() == [1, 2, 4]
    assert lowest_groups(scores, 4, partitions=2).tolist() == [1, 2, 4, 7]
    assert lowest_groups(scores, 0).tolist() == []
    assert lowest_groups(scores, 8).tolist() == list(range(8))


@pytest.mark.parametrize(("remove", "partitions"), [(9, 1), (-1, 1), (3, 2), (3, 3)])
def test_numbers_that_do_not_fit(remove: int, partitions: int) -> None:
    with pytest.raises(PatternError, match="partitions"):
        lowest_groups(torch.rand(8), remove, partitions)


def test_information_does_not_depend_on_the_scale_of_outputs_or_the_mean_of_inputs() -> None:
    channels, inputs = example()
    assert channels.reading is not None
    moved = inputs + 3
    other = replace(
        channels,
        reading=channels.reading * torch.tensor([1.0, 2.0, 5.0, 0.1, 7.0])[:, None],
        sums=moved.sum(0).float(),
        products=(moved.T @ moved).float(),
    )
    score = SCORES["mutual-information"]
    torch.testing.assert_close(score(other), score(channels), rtol=1e-3, atol=0)


def test_information_of_channels_that_never_vary_is_zero_and_of_copies_finite() -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    inputs[:, :2] = 1.5
    inputs[:, 3] = inputs[:, 2]
    reading = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    reading[2] = torch.tensor([0.0, 0, 1, 1, 0, 0])
    channels = Channels(
        groups=3, reading=reading, tokens=40, sums=inputs.sum(0), products=inputs.double().T @ inputs.double()
    )
    first, copies, rest = SCORES["mutual-information"](channels).tolist()
    assert first == pytest.approx(0, abs=1e-6)
    # One output is a function of the copies alone.
    assert rest < copies < 30
