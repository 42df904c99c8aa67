"""The mapping that OWL and DLP share: layers above the average become denser, within a fixed distance of it."""

from collections.abc import Sequence


def denser(values: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """Sparsities that fall linearly with a layer's importance, with their mean at the target.

    Args:
        values: importance of each layer; scaled so that the range is [0, 2 spread].
        sparsity: the target, in [0, 1].
        spread: half of the distance between the densest and the sparsest layer, in [0, 1].

    Example:
        >>> [round(value, 3) for value in denser([1.0, 3.0, 2.0], 0.5, 0.1)]
        [0.6, 0.4, 0.5]
    """
    low, high = min(values), max(values)
    scaled = [2 * spread * (value - low) / (high - low) if high > low else 0.0 for value in values]
    mean = sum(scaled) / len(scaled)
    return [sparsity - (value - mean) for value in scaled]
