"""Complete the statistics of experts with too few calibration tokens."""

from collections.abc import Sequence

from llmprune.statistics import ColumnNorm, Gram
from llmprune.stream.observation import Group
from llmprune.stream.stream import ResidentLayer


def add_priors(layer: ResidentLayer, groups: list[Group], min_tokens: int) -> dict[str, int]:
    """Complete the statistics of experts with too few tokens.

    Below `min_tokens` an expert's Gram is mostly noise, and without any token it would make every weight look useless.
    The missing tokens are replaced by uncorrelated ones with the mean square of the inputs of all experts in the layer,
    which moves the solution towards magnitude pruning the more data is missing.

    Args:
        layer: resident.
        groups: its groups; their statistics are completed in place.
        min_tokens: tokens that every expert should have.

    Returns:
        Matrix name -> tokens added, for the matrices of experts with too few.
    """
    priors: dict[str, int] = {}
    matrices = (layer.matrices[group.names[0]] for group in groups)
    # Every token meets the blocks of a block-diagonal matrix: they never lack any.
    kinds = {matrix.name: matrix.kind if matrix.routed else None for matrix in matrices}
    for group in groups:
        kind = kinds[group.names[0]]
        if group.statistics is None or kind is None:
            continue
        missing = min_tokens - group.statistics.tokens
        if missing > 0:
            alike = [g.statistics for g in groups if g.statistics is not None and kinds[g.names[0]] == kind]
            group.statistics.add_prior(missing, _mean_square(alike))
            priors.update(dict.fromkeys(group.names, missing))
    return priors


def _mean_square(alike: Sequence[ColumnNorm | Gram]) -> float:
    elements = sum(statistics.tokens * len(statistics.squares) for statistics in alike)
    total = sum(float(statistics.squares.sum()) for statistics in alike)
    return total / elements if total > 0 else 1.0
