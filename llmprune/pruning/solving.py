"""Solve one resident decoder layer: every matrix by its own method under its own pattern."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from llmprune.devices import return_freed_memory
from llmprune.errors import NumericsError
from llmprune.methods import Method, Pruned, lacks_gradient
from llmprune.methods.correction import corrected
from llmprune.patterns import Pattern, Unstructured, layer_shares
from llmprune.pruning.jobs import Job
from llmprune.pruning.quantising import quantise_solved
from llmprune.ranks import Ranks
from llmprune.statistics import ColumnNorm, Gram
from llmprune.storage.report import MatrixRow
from llmprune.stream.observation import Group
from llmprune.stream.priors import add_priors
from llmprune.stream.resident import DenseRows, ResidentLayer
from llmprune.stream.weighting import TokenWeight
from llmprune.timing import Stages


def solve_layer(
    layer: ResidentLayer,
    groups: list[Group],
    jobs: Mapping[str, Job],
    min_tokens: int,
    stages: Stages,
    step: Callable[[str], None] = lambda step: None,
    alpha: float = 0.0,
) -> list[MatrixRow]:
    """Prune the matrices of a resident layer in place.

    Args:
        layer: the layer.
        groups: what `layer.observe` returned; emptied along the way, so that no Gram outlives its matrices.
        jobs: matrix name -> what to do; matrices without a job stay dense.
        min_tokens: experts with fewer tokens are topped up to this many with synthetic, uncorrelated ones.
        stages: stopwatch.
        step: told about each step.
        alpha: part of the inputs' errors that is corrected, where the statistics have them (`methods.correction`).

    Returns:
        The report rows, in the order in which the layer uses the matrices.

    Raises:
        NumericsError: a value is not finite, or a factorisation fails with every damping; names the matrix.
    """
    ranks = layer.stream.settings.ranks
    priors = add_priors(layer, groups, min_tokens, ranks)
    owners = {name: group.owner for group in groups for name in group.names}
    with torch.no_grad(), stages("solve"):
        return_freed_memory()  # what the forward pass has freed, before the workspaces of the solvers are allocated
        shares = _layer_shares(layer, groups, jobs, alpha)
        rows: list[MatrixRow] = []
        while groups:
            group = groups.pop(0)
            for name in group.names if group.owner == ranks.rank else ():
                step(f"solving {name.removeprefix(layer.name + '.')}")
                pattern = shares.get(name, jobs[name].pattern)
                rows.append(_solve_matrix(layer, group, name, jobs[name], pattern, priors.get(name, 0), alpha))
    return rows if ranks.size == 1 else _exchanged(layer, rows, owners, ranks, stages)


def _exchanged(
    layer: ResidentLayer, rows: list[MatrixRow], owners: Mapping[str, int], ranks: Ranks, stages: Stages
) -> list[MatrixRow]:
    """Give every process the matrices and rows of all owners."""
    found = {row.name: row for process in ranks.gather(rows) for row in process}
    with stages("exchange"):
        for name, owner in owners.items():
            layer.receive(name, owner)
    return [found[name] for name in owners]


def solve_in_turn(
    layer: ResidentLayer,
    jobs: Mapping[str, Job],
    token_weight: TokenWeight,
    min_tokens: int,
    stages: Stages,
    step: Callable[[str], None] = lambda step: None,
    importance: Tensor | None = None,
    dense: Callable[[Collection[str]], DenseRows] | None = None,
    alpha: float = 0.0,
) -> list[MatrixRow]:
    """Prune the matrices of a resident layer in place, each on the outputs of the pruned matrices before it.

    Args:
        layer: the layer.
        jobs: matrix name -> what to do.
        token_weight: how tokens are weighed in the statistics.
        min_tokens: as for `solve_layer`.
        stages: stopwatch.
        step: told about each step.
        importance: as for `ResidentLayer.observe`.
        dense: gives what `ResidentLayer.observe` takes, for the matrices of a turn.
        alpha: as for `solve_layer`.

    Returns:
        The report rows, in the order in which the layer uses the matrices.

    Raises:
        NumericsError: as for `solve_layer`.
    """
    rows: list[MatrixRow] = []
    for names in turns(layer, layer.observe(dict.fromkeys(jobs), batches=1)):
        step(f"statistics of {', '.join(sorted({name.rpartition('.')[2] for name in names}))}")
        needs = {name: jobs[name].needs for name in names}
        paired = None if dense is None else dense(names)
        groups = layer.observe(needs, token_weight, importance=importance, dense=paired)
        rows += solve_layer(layer, groups, {name: jobs[name] for name in names}, min_tokens, stages, step, alpha)
    return rows


def turns(layer: ResidentLayer, groups: Sequence[Group]) -> list[list[str]]:
    """The matrices of each turn: those that share an input, and the same matrix of all experts."""
    turns: dict[str, list[str]] = {}
    for group in groups:
        first = layer.matrices[group.names[0]]
        turns.setdefault(first.kind or first.name, []).extend(group.names)
    return list(turns.values())


def _solve_matrix(
    layer: ResidentLayer, group: Group, name: str, job: Job, pattern: Pattern, prior_tokens: int, alpha: float
) -> MatrixRow:
    start = time.perf_counter()
    original = layer.weight(name)
    target, correction = _target(original, group.statistics, alpha, name)
    pruned = _apply(job.method, target, group.statistics, pattern, name)
    if job.quantiser is not None and not job.late:
        assert isinstance(group.statistics, Gram), "a job with a quantiser needs it"
        pruned = quantise_solved(layer, name, target, pruned, group.statistics, job)
    damping, tried, losses, by_magnitude = pruned.damping, pruned.tried, pruned.losses, pruned.by_magnitude
    layer.replace(name, pruned.weight)
    del pruned, target  # freed before the difference is computed
    statistics = group.statistics
    error = layer.output_error(group, name, original)
    if error is not None and not math.isfinite(error):
        raise NumericsError(
            f"{name}: the relative output error is {error}",
            expected="inputs and outputs whose sums of squares are finite in float32",
            fix="check the source checkpoint; if activations overflow, set compute_dtype: float32",
        )
    return MatrixRow(
        layer=layer.name,
        name=name,
        shape=layer.matrices[name].shape,
        pattern=str(job.pattern),
        method=job.method_name,
        zeros=layer.count_zeros(name),
        error=error,
        damping=damping,
        damping_tried=tried,
        tokens=statistics.tokens - prior_tokens if statistics else 0,
        prior_tokens=prior_tokens,
        top_tokens=group.top_tokens,
        dead_inputs=int((statistics.squares == 0).sum()) if statistics else None,
        seconds=time.perf_counter() - start,
        peak_bytes=layer.stream.peak_bytes,
        losses=losses,
        correction=correction,
        by_magnitude=by_magnitude,
    )


def _apply(method: Method, weight: Tensor, statistics: ColumnNorm | Gram | None, pattern: Pattern, name: str) -> Pruned:
    try:
        return method(weight, statistics, pattern)
    except NumericsError as error:
        raise error.at(name) from error


def _target(
    original: Tensor, statistics: ColumnNorm | Gram | None, alpha: float, name: str
) -> tuple[Tensor, float | None]:
    """What to solve for, and how far it is from the original; None if there is nothing to correct."""
    if not alpha or not isinstance(statistics, Gram) or statistics.errors is None:
        return original, None
    try:
        return corrected(original, statistics, alpha)
    except NumericsError as error:
        raise error.at(name) from error


def _layer_shares(
    layer: ResidentLayer, groups: list[Group], jobs: Mapping[str, Job], alpha: float
) -> dict[str, Pattern]:
    """Resolve patterns that compare scores over the whole layer into one count per matrix."""
    ranks = layer.stream.settings.ranks
    statistics = {name: group.statistics for group in groups for name in group.names}
    owners = {name: group.owner for group in groups for name in group.names}
    pools: dict[tuple[float, Method], list[str]] = {}
    for name, job in jobs.items():
        if isinstance(job.pattern, Unstructured) and job.pattern.over == "layer":
            pools.setdefault((job.pattern.sparsity, job.method), []).append(name)
    shares: dict[str, Pattern] = {}
    for (sparsity, _), names in pools.items():
        # Each by its own job: equal methods may have been given different gradients.
        own = [name for name in names if owners[name] == ranks.rank]
        targets = ((name, _target(layer.weight(name), statistics[name], alpha, name)[0]) for name in own)
        # Experts that no token reached cannot be compared with others: they get the sparsity that all have together.
        scores = {
            name: jobs[name].method.scores(target, statistics[name])
            for name, target in targets
            if not lacks_gradient(jobs[name].method, target)
        }
        found = {name: score for process in ranks.gather(scores) for name, score in process.items()}
        if found:
            sizes = {name: math.prod(layer.matrices[name].shape) for name in names}
            alone = sum(Unstructured(sparsity).zeros((1, sizes[name])) for name in names if name not in found)
            left = Unstructured(sparsity).zeros((1, sum(sizes.values()))) - alone
            rest = left / sum(sizes[name] for name in found)
            shares.update(layer_shares({name: found[name] for name in names if name in found}, rest))
    return shares
