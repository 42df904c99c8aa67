"""ALPS, ADMM and RIA beside plain float64 references, written from their papers' equations."""

from collections.abc import Callable

import pytest
import torch
from references import correlated_inputs, ria_scores, slow_mask, textbook_admm, textbook_alps
from torch import Tensor

from llmprune.methods import ADMM, ALPS, RIA, Method
from llmprune.patterns import Pattern, parse
from llmprune.statistics import ColumnNorm, Gram

PATTERNS = ["0.5", "0.6/row", "2:4", "0.5@4x4", "0.5@2x8/row"]
DTYPES = [torch.float32, torch.float64]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 32, generator=generator).to(dtype), correlated_inputs(300, 32, 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize(
    ("method", "textbook"), [(ADMM(), textbook_admm), (ALPS(refit=200), textbook_alps)], ids=["admm", "alps"]
)
def test_solvers_agree_with_their_papers_equations(
    method: Method, textbook: Callable[[Tensor, Tensor, Pattern], tuple[Tensor, Tensor]], text: str, dtype: torch.dtype
) -> None:
    """The same masks, and values within 1e-3 (float32) or 1e-6 (float64) of the largest.

    Independent: the Gram matrix, the scaling, the iterations (row by row, with explicit inverses where the package
    factorises and multiplies all rows), the choice (by sorting), and the end of ALPS, an exact solution on the support
    for conjugate gradient, which therefore gets 200 iterations. Not independent, as the papers leave it open: where
    ALPS begins, that its changes are counted as a share of the kept weights, N:M on ADMM's ramp, how blocks are judged.
    """
    weight, inputs = problem(dtype)
    gram = Gram(torch.zeros(32, 32, dtype=dtype))
    gram.update(inputs)
    pattern = parse(text).compared("matrix")
    pruned = method(weight, gram, pattern)
    values, mask = textbook(weight, inputs, pattern)
    assert torch.equal(pruned.mask, mask)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(pruned.weight.double(), values, rtol=0, atol=tolerance * float(values.abs().max()))


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rias_scores_and_masks_are_the_papers(dtype: torch.dtype, power: float) -> None:
    """Scores within 1e-5 of each; masks by sorting the reference's. All of it is independent."""
    weight, inputs = problem(dtype)
    norms = ColumnNorm(torch.zeros(32, dtype=dtype))
    norms.update(inputs)
    expected = ria_scores(weight, inputs, power)
    torch.testing.assert_close(RIA(power).scores(weight, norms).double(), expected, rtol=1e-5, atol=0)
    for pattern in (parse(text).compared("matrix") for text in PATTERNS):
        pruned = RIA(power)(weight, norms, pattern)
        mask = torch.from_numpy(slow_mask(expected.numpy(), pattern))
        assert torch.equal(pruned.mask, mask)
        assert torch.equal(pruned.weight, weight * mask)
