"""Each rule against figures computed by hand, or against a plain float64 reference of its formula."""

import math

import numpy as np
import pytest
import torch

from llmprune.allocation.alpha import alpha, hill, spectrum
from llmprune.allocation.atp import atp, steepest
from llmprune.allocation.dlp import dlp, mean_score
from llmprune.allocation.owl import outlier_share, owl


def test_outliers_are_counted_over_all_matrices_of_a_layer() -> None:
    # Mean (8 * 1 + 32 + 0) / 10 = 4, so that 5 times the mean is 20: one of ten scores. Each matrix alone has others.
    scores = [torch.tensor([[1.0] * 8]), torch.tensor([[32.0, 0.0]])]
    assert outlier_share(scores, 5.0) == 0.1
    assert outlier_share(scores, 0.2) == pytest.approx(0.9)


def test_owl_by_hand() -> None:
    # D = 0.01, 0.03, 0.05 becomes 0, 0.08, 0.16, minus the mean 0.08.
    assert owl([0.01, 0.03, 0.05], 0.7) == pytest.approx([0.78, 0.70, 0.62])
    assert owl([0.02, 0.02], 0.7) == [0.7, 0.7]


def test_dlp_by_hand() -> None:
    assert mean_score([torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0]])]) == 3.0
    # r = 1, 2, 5 keeps 7/8, 6/8, 3/8: scaled to 0.3, 0.225, -0.0 by (k - 3/8) * 0.6, minus the mean 0.175.
    assert dlp([1.0, 2.0, 5.0], 0.7) == pytest.approx([0.575, 0.65, 0.875])


def test_atp_is_arithmetic_and_stays_in_range() -> None:
    assert atp(4, 0.7, 0.05) == pytest.approx([0.625, 0.675, 0.725, 0.775])
    assert steepest(4, 0.7) == pytest.approx(0.2)
    assert (min(atp(4, 0.7, 0.2)), max(atp(4, 0.7, 0.2))) == pytest.approx((0.4, 1.0))
    assert steepest(1, 0.7) == 0.0


def test_the_spectrum_is_that_of_the_singular_values() -> None:
    for shape in ((5, 9), (9, 5), (1, 3), (63, 63)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
        found = np.sort(spectrum(weight).numpy())[::-1]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_the_hill_estimate_against_a_plain_reference() -> None:
    values = np.random.default_rng(0).pareto(2.0, 400) + 1
    counts, edges = np.histogram(np.log10(values), 100)
    start = 10 ** edges[counts.argmax()]
    tail = values[values >= start * (1 - 1e-12)]
    expected = 1 + len(tail) / (np.log(tail).sum() - len(tail) * math.log(start))
    assert hill(torch.from_numpy(values)) == pytest.approx(expected, rel=1e-9)
    # Eigenvalues that are zero but for rounding do not belong to the spectrum.
    assert hill(torch.from_numpy(np.append(values, [0.0, 1e-14]))) == pytest.approx(expected, rel=1e-9)
    assert hill(torch.ones(3)) == math.inf
    # A matrix of zeros, as rounding may leave them, and one without any eigenvalue.
    assert hill(torch.zeros(3)) == hill(torch.tensor([0.0, -1e-30])) == hill(torch.empty(0)) == math.inf


def test_a_heavier_tail_has_a_smaller_exponent() -> None:
    generator = np.random.default_rng(1)
    heavy, light = (hill(torch.from_numpy(generator.pareto(a, 2000) + 1)) for a in (1.0, 4.0))
    assert heavy < light


def test_alpha_by_hand() -> None:
    # 2, 3, 4 becomes 0.7, 1, 1.3; the weighted mean is (0.7 + 1 + 2.6) / 4 = 1.075.
    found = alpha([2.0, 3.0, 4.0], [10, 10, 20], 0.5)
    assert found == pytest.approx([0.5 * factor / 1.075 for factor in (0.7, 1.0, 1.3)])
    assert sum(s * size for s, size in zip(found, (10, 10, 20), strict=True)) == pytest.approx(20)
    assert alpha([2.0, 2.0], [1, 3], 0.5) == [0.5, 0.5]
