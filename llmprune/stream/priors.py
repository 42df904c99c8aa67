"""Complete the statistics of experts with too few calibration tokens."""

from llmprune.ranks import SINGLE, Ranks
from llmprune.statistics import ColumnNorm, Gram
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer


def add_priors(layer: ResidentLayer, groups: list[Group], min_tokens: int, ranks: Ranks = SINGLE) -> dict[str, int]:
    """Complete the statistics of experts with too few tokens.

    Below `min_tokens` an expert's Gram is mostly noise, and without any token it would make every weight look useless.
    The missing tokens are replaced by uncorrelated ones with the mean square of the inputs of all experts in the layer,
    which moves the solution towards magnitude pruning the more data is missing.

    Args:
        layer: resident.
        groups: its groups; their statistics are completed in place.
        min_tokens: tokens that every expert should have.
        ranks: the processes of which each has the sums of its own groups only.

    Returns:
        Matrix name -> tokens added, for the matrices of experts with too few.
    """
    priors: dict[str, int] = {}
    matrices = (layer.matrices[group.names[0]] for group in groups)
    # Every token meets the blocks of a block-diagonal matrix: they never lack any.
    kinds = {matrix.name: matrix.kind if matrix.routed else None for matrix in matrices}
    routed = [(kind, group) for group in groups if (kind := kinds[group.names[0]]) is not None]
    if ranks.size > 1:
        routed = [(kind, group) for kind, group in routed if group.owner == ranks.rank]
    sums = [each for found in ranks.gather([_sums(kind, group.statistics) for kind, group in routed]) for each in found]
    for kind, group in routed:
        if group.statistics is None:
            continue
        missing = min_tokens - group.statistics.tokens
        if missing > 0:
            alike = [(count, total) for other, count, total in sums if other == kind]
            elements, total = sum(count for count, _ in alike), sum(total for _, total in alike)
            group.statistics.add_prior(missing, total / elements if total > 0 else 1.0)
            priors.update(dict.fromkeys(group.names, missing))
    return priors


def _sums(kind: str, statistics: ColumnNorm | Gram | None) -> tuple[str, int, float]:
    """The number of input values that a kind of matrix has seen, and the sum of their squares."""
    if statistics is None:
        return kind, 0, 0.0
    return kind, statistics.tokens * len(statistics.squares), float(statistics.squares.sum())
