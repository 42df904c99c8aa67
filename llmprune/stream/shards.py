"""Put together what several processes have observed of a layer, each on batches of its own."""

from collections.abc import Mapping, Sequence

import torch

from llmprune.models.decoder import Matrix
from llmprune.ranks import Ranks
from llmprune.statistics import ColumnNorm, Gram
from llmprune.stream.observation import Group, Observer


def collect(observer: Observer, ranks: Ranks, matrices: Mapping[str, Matrix], *, everywhere: bool = False) -> None:
    """Give the sums of all processes to the owners of the groups.

    All processes go through the same groups in the same order: experts that only some of them have seen would otherwise
    make one wait for sums that another never sends.

    Args:
        observer: of a finished pass; its groups become the same in all processes, and get owners.
        ranks: the processes.
        matrices: name -> matrix, of the layer.
        everywhere: every process gets the sums and what is held back, not only the owner.
    """
    observer.regroup(_united(ranks.gather([group.names for group in observer.groups])))
    for group, owner in zip(observer.groups, _owners(observer.groups, matrices, ranks.size), strict=True):
        group.owner = owner
    counts = ranks.gather([_facts(group) for group in observer.groups])
    for place, group in enumerate(observer.groups):
        tokens, weighted, errors = (list(column) for column in zip(*(found[place] for found in counts), strict=True))
        _add(group.statistics, group.owner, ranks, sum(tokens), any(errors), everywhere=everywhere)
        _add(group.weighted, group.owner, ranks, sum(weighted), any(errors), everywhere=everywhere)
        _hand_over(group, ranks, observer.device, everywhere=everywhere)


def _facts(group: Group) -> tuple[int, int, bool]:
    """Tokens in the sums and in the weighted ones, and whether there are sums of errors."""
    counts = [0 if sums is None else sums.tokens for sums in (group.statistics, group.weighted)]
    return counts[0], counts[1], isinstance(group.statistics, Gram) and group.statistics.errors is not None


def _united(found: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """The groups of all processes, those of the first one in front; a matrix is in the first that has it."""
    groups: list[list[str]] = []
    known: set[str] = set()
    for process in found:
        for names in process:
            if new := [name for name in names if name not in known]:
                groups.append(new)
                known.update(new)
    return groups


def _owners(groups: Sequence[Group], matrices: Mapping[str, Matrix], size: int) -> list[int]:
    """Who solves which group: the most expensive first, each to whoever has the least to do."""
    costs = [_cost(group, matrices) for group in groups]
    loads, owners = [0] * size, [0] * len(groups)
    for place in sorted(range(len(groups)), key=lambda place: -costs[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += costs[place]
    return owners


def _cost(group: Group, matrices: Mapping[str, Matrix]) -> int:
    """Operations of a regression, up to a factor: a factorisation, then every output's row against all inputs."""
    width = matrices[group.names[0]].shape[1]
    return width**3 + width**2 * sum(matrices[name].shape[0] for name in group.names)


def _add(
    sums: ColumnNorm | Gram | None, owner: int, ranks: Ranks, tokens: int, errors: bool, *, everywhere: bool
) -> None:
    if sums is None:
        return
    if errors and isinstance(sums, Gram) and sums.errors is None:
        sums.errors = torch.zeros_like(sums.sums)
    for tensor in sums.tensors():
        ranks.sum_at(owner, tensor, lower=isinstance(sums, Gram) and tensor is sums.sums)
        if everywhere:
            ranks.send(tensor, owner)
    if everywhere or owner == ranks.rank:
        sums.summed(tokens)


def _hand_over(group: Group, ranks: Ranks, device: torch.device, *, everywhere: bool) -> None:
    """Give the rows that were held back, and how much each token weighed, to the owner, or to all."""
    rows = [group.held_back, group.energies]
    found = ranks.gather(rows) if everywhere else ranks.gather_at(group.owner, rows)
    if found:
        group.held_back = [part.to(device) for process in found for part in process[0]]
        group.energies = [part for process in found for part in process[1]]
    else:
        group.held_back, group.energies = [], []
