"""ATP: sparsities in arithmetic progression over depth (arXiv 2502.14770); one slope, found by a few trials."""


def steepest(layers: int, sparsity: float) -> float:
    """The largest slope per layer, up or down, with which every sparsity stays in [0, 1].

    Args:
        layers: how many, >= 1.
        sparsity: the target, in [0, 1].
    """
    return 2 * min(sparsity, 1 - sparsity) / (layers - 1) if layers > 1 else 0.0


def atp(layers: int, sparsity: float, slope: float) -> list[float]:
    """The sparsity of each layer: S - slope (L - 1) / 2 + slope l.

    Args:
        layers: L.
        sparsity: the target S, in [0, 1].
        slope: from one layer to the next; positive protects the early ones.

    Example:
        >>> [round(value, 2) for value in atp(3, 0.5, 0.1)]
        [0.4, 0.5, 0.6]
    """
    return [sparsity - slope * (layers - 1) / 2 + slope * layer for layer in range(layers)]
