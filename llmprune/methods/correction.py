"""Error-corrected targets: weights that do on a pruned model's inputs what the dense ones do on the dense model's.

With X the inputs in the dense model and X' those in the pruned one, the weights that bring W' X' closest to W X are

    W' = W + W D (G + d I)^-1,    D = (X - X') X'^T,    G = X' X'^T,

and ||W X - V X'||^2 differs from ||(W' - V) X'||^2 by what no V can change: every solver can aim at W' as it aims at W.
A part alpha of the correction is taken, because with few tokens all of it fits their noise.
"""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.precision import float32_products
from llmprune.statistics import Gram, check_finite

# d, as a fraction of the mean of G's diagonal.
_DAMPING = 0.01
# Corrections beyond this relative size are left out: they answer to an input that the errors have made another one.
LARGEST = 0.3


def corrected(weight: Float[Tensor, "out in"], gram: Gram, alpha: float) -> tuple[Float[Tensor, "out in"], float]:
    """What to solve for in place of a weight.

    Args:
        weight: the dense model's, W, in the dtype of the Gram or in float32.
        gram: of the pruned model's inputs, with their errors.
        alpha: which part of the correction to take, in [0, 1].

    Returns:
        The target, in the dtype of the Gram, and its relative distance d = ||W' - W|| / ||W||. If d is above `LARGEST`,
        the target is W itself.

    Raises:
        NumericsError: the sums are not finite, or cannot be factorised.
    """
    assert gram.errors is not None, "the errors of the inputs were not collected"
    check_finite(gram.errors, "the products of the inputs' errors")
    upper = gram.factor(_DAMPING).upper
    weight = weight.to(upper.dtype)
    with float32_products("ieee"):
        step = weight @ gram.errors
        step = torch.linalg.solve_triangular(upper.T, step, upper=False, left=False)
        step = torch.linalg.solve_triangular(upper, step, upper=True, left=False).mul_(alpha)
    check_finite(step, "the correction of the weight")
    size = float(weight.norm())
    distance = float(step.norm()) / size if size else 0.0
    return (weight + step if distance <= LARGEST else weight), distance


def correction_work(shape: tuple[int, int]) -> float:
    """Floating-point operations of `corrected`, for one matrix (out, in), but for the factorisation."""
    rows, width = shape
    return 4.0 * rows * width**2


def correction_bytes(shape: tuple[int, int]) -> int:
    """Bytes that are in use besides a method's workspace: the target, and a factor that the method may not share."""
    rows, width = shape
    return 4 * rows * width + 4 * width**2
