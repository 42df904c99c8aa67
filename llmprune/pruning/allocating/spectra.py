"""Tail exponents of the layers' spectra; only weights are read."""

import math

import torch

from llmprune.allocation.alpha import hill, spectrum
from llmprune.models.decoder import prunable_matrices
from llmprune.models.source import Source
from llmprune.progress import Progress
from llmprune.pruning.allocating.pool import Pool
from llmprune.pruning.context import Run


def exponents(run: Run, source: Source, pool: Pool) -> dict[int, float]:
    """Decoder layer -> the mean tail exponent of its matrices.

    A spectrum without a tail (all eigenvalues equal) counts as the largest exponent of any matrix.
    """
    found: dict[int, list[float]] = {}
    for index in dict.fromkeys(unit.layer for unit in pool.units):
        run.watch(Progress("allocation, spectra", index, pool.layers))
        wanted = {place.name for unit in pool.in_layer(index) for place in pool.named(unit)}
        source.load_layer(index, run.device)
        try:
            parameters = dict(source.layers[index].named_parameters())
            matrices = prunable_matrices(source.layers[index], f"{source.layers_path}.{index}")
            with torch.no_grad(), run.stages("allocation"):
                found[index] = [
                    hill(spectrum(matrix.view(parameters[matrix.parameter])))
                    for matrix in matrices
                    if matrix.name in wanted
                ]
        finally:
            source.free_layer(index)
    finite = [value for own in found.values() for value in own if math.isfinite(value)]
    largest = max(finite, default=1.0)
    return {layer: sum(min(value, largest) for value in own) / len(own) for layer, own in found.items()}
