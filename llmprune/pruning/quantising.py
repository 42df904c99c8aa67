"""Quantise the matrices of a layer: each as it has been solved, or all once the layer has been fitted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.losses import StepLoss, relative_loss
from llmprune.methods import Pruned
from llmprune.pruning.jobs import Job
from llmprune.statistics import Gram
from llmprune.storage.report import MatrixRow
from llmprune.stream.priors import add_priors
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.weighting import TokenWeight

STEP = "quantise"


def quantise_solved(layer: ResidentLayer, name: str, target: Tensor, pruned: Pruned, gram: Gram, job: Job) -> Pruned:
    """Quantise what a solver has returned; its loss before and after is in the result, as that of a step.

    Args:
        layer: the layer, which knows the dtype that the matrix is stored in.
        name: of the matrix.
        target: [out, in], what was solved for.
        pruned: what the solver returned.
        gram: of the matrix's inputs.
        job: with a quantiser.

    Raises:
        NumericsError: the factorisation fails with every damping; names the matrix.
    """
    losses = pruned.losses or (StepLoss("", relative_loss(target, pruned.weight, gram)),)
    weight = _quantised(layer, name, pruned.weight, pruned.mask, gram, job)
    loss = StepLoss(STEP, relative_loss(target, weight, gram))
    return replace(pruned, weight=weight, losses=(*losses, loss))


def quantise_fitted(
    layer: ResidentLayer,
    jobs: Mapping[str, Job],
    rows: Sequence[MatrixRow],
    token_weight: TokenWeight,
    min_tokens: int,
    tell: Callable[[str], None],
) -> list[MatrixRow]:
    """Quantise the matrices of a layer that was fitted as a whole, on the inputs that they have now.

    Args:
        layer: resident; its matrices are replaced.
        jobs: matrix name -> what was done to it.
        rows: the report rows.
        token_weight: how tokens are weighed in the statistics.
        min_tokens: as for `solve_layer`.
        tell: told about each matrix.

    Returns:
        The rows, with the zeros that there are now.

    Raises:
        NumericsError: as for `quantise_solved`.
    """
    waiting = [name for name, job in jobs.items() if job.quantiser is not None and job.late]
    if not waiting:
        return list(rows)
    tell("statistics for quantising")
    ranks, stages = layer.stream.settings.ranks, layer.stream.stages
    groups = layer.observe(dict.fromkeys(waiting, Gram), token_weight)
    add_priors(layer, groups, min_tokens, ranks)
    with torch.no_grad(), stages("solve"):
        owners = {name: group.owner for group in groups for name in group.names}
        while groups:
            group = groups.pop(0)
            for name in group.names if group.owner == ranks.rank else ():
                tell(f"quantising {name.removeprefix(layer.name + '.')}")
                assert isinstance(group.statistics, Gram), "it was asked for"
                weight = layer.weight(name)
                layer.replace(name, _quantised(layer, name, weight, weight != 0, group.statistics, jobs[name]))
        if ranks.size > 1:
            for name, owner in owners.items():
                layer.receive(name, owner)
    return [replace(row, zeros=layer.count_zeros(row.name)) for row in rows]


def _quantised(layer: ResidentLayer, name: str, weight: Tensor, mask: Tensor, gram: Gram, job: Job) -> Tensor:
    assert job.quantiser is not None, "only what is to be quantised"
    stored = layer.stream.source.stored_dtype(layer.index, layer.matrices[name].parameter)
    try:
        return job.quantiser(weight, mask, gram, stored)
    except NumericsError as error:
        raise error.at(name) from error
