"""Remove groups from a resident decoder layer: choose, refit what is kept, and set what is removed to zero.

Attention is pruned before the MLP, and experts before their channels: each choice takes the earlier ones into account.
The layer keeps its full size here; `llmprune.structures.reduction` then swaps it for a physically smaller one.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import ModelError, NumericsError
from llmprune.models.decoder import Matrix
from llmprune.statistics import ChannelGram, Gram, Moments
from llmprune.storage.report import StructureRow
from llmprune.stream.observation import Group
from llmprune.stream.priors import add_priors
from llmprune.stream.resident import Needs, ResidentLayer
from llmprune.structures.choose.channels import channels_of
from llmprune.structures.choose.experts import expert_scores, lowest_experts
from llmprune.structures.choose.scores import NEEDS, SCORES, lowest_groups, needs_gram
from llmprune.structures.find.discovery import Structure
from llmprune.structures.remove.cuts import Cut, mask, routed_without
from llmprune.structures.remove.fused import experts_of, last_groups, permute_channels, removed_last
from llmprune.structures.remove.problem import GroupRemoval, RemovalSettings
from llmprune.structures.remove.solver import refit_groups, remove_groups

_ORDER = ("heads", "experts", "ffn")


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What is to be removed from one structure.

    Attributes:
        structure: one that is not refused.
        remove: number of groups, in [0, structure.groups).
        method: obs, a name in `SCORES`, or one of `EXPERT_METHODS` for experts.
        refit: set the kept weights to their least-squares values.
        settings: damping, swaps and partitions.
        compensate: add the mean output of what is removed to the consumer's bias; None: if it has one.
        removed: the groups to remove, if already known (from gradients): one list, or one per expert.
    """

    structure: Structure
    remove: int
    method: str
    refit: bool = True
    settings: RemovalSettings = field(default_factory=RemovalSettings)
    compensate: bool | None = False
    removed: tuple[tuple[int, ...], ...] | None = None


def reduce_layer(
    layer: ResidentLayer,
    targets: Sequence[Target],
    min_tokens: int,
    step: Callable[[str], None] = lambda step: None,
) -> tuple[list[Cut], list[StructureRow]]:
    """Choose what to remove from each structure of a resident layer, refit what is kept, and zero the rest.

    Args:
        layer: the layer at full size.
        targets: what is to be removed.
        min_tokens: as for `solving.solve_layer`.
        step: called with a description of each step.

    Returns:
        The cuts, for `cuts.shrink`, and a row for each target, both in processing order.

    Raises:
        NumericsError: a value is not finite or a factorisation fails at every damping; names the matrix.
        ModelError: the experts' routing cannot be observed, or the bias needed for compensation is missing.
    """
    cuts: list[Cut] = []
    rows: list[StructureRow] = []
    with ExitStack() as stack:
        for kind in _ORDER:
            chosen = [target for target in targets if target.structure.kind == kind and target.remove]
            if not chosen:
                continue
            step(f"observing {kind}")
            found = _experts(layer, chosen) if kind == "experts" else _channels(layer, chosen, min_tokens, step)
            for cut, row in found:
                if kind == "experts":
                    stack.enter_context(routed_without(layer.module, cut))
                mask(layer.module, cut)
                cuts.append(cut)
                rows.append(row)
    return cuts, rows


def _experts(layer: ResidentLayer, targets: Sequence[Target]) -> Iterable[tuple[Cut, StructureRow]]:
    start = time.perf_counter()
    scores = expert_scores(layer, [target.structure for target in targets], targets[0].method)
    removed = lowest_experts(scores, targets[0].remove)
    seconds = (time.perf_counter() - start) / len(targets)
    for target in targets:
        consumer = target.structure.consumer
        gone = tuple(removed[consumer])
        yield (
            Cut(target.structure, gone),
            _row(layer, target, int(scores[consumer].tokens.sum()), seconds, removed=gone),
        )


def _channels(
    layer: ResidentLayer, targets: Sequence[Target], min_tokens: int, step: Callable[[str], None]
) -> list[tuple[Cut, StructureRow]]:
    matrices = {id(target): _consumers(layer, target) for target in targets}
    needs: Needs = {
        matrix.name: ChannelGram if target.refit or needs_gram(target.method) else Moments
        for target in targets
        for matrix in matrices[id(target)]
    }
    groups = layer.observe(needs, everywhere=True)
    add_priors(layer, groups, min_tokens)
    by_name = {name: group for group in groups for name in group.names}
    with torch.no_grad(), layer.stream.stages("solve"):
        # All structures of a kind are solved on inputs observed before any of them is cut.
        found = []
        for target in targets:
            step(f"removing from {target.structure.consumer.removesuffix('.weight')}")
            found.append(_remove(layer, target, matrices[id(target)], by_name))
    return found


def _consumers(layer: ResidentLayer, target: Target) -> list[Matrix]:
    """The matrices that read a structure: one, or one per expert."""
    return [matrix for matrix in layer.matrices.values() if matrix.parameter == target.structure.consumer]


def _remove(
    layer: ResidentLayer, target: Target, matrices: Sequence[Matrix], groups: Mapping[str, Group]
) -> tuple[Cut, StructureRow]:
    start = time.perf_counter()
    structure = target.structure
    fused = experts_of(layer.module, structure) > 1
    if len(matrices) > 1 and not fused:
        target = replace(target, removed=(_common_choice(layer, target, matrices, groups),))
    solved = [_solve(layer, target, matrix, groups[matrix.name]) for matrix in matrices]
    removals = [removal for removal, _ in solved]
    errors = [error for _, error in solved if error is not None]
    removed: tuple[int, ...] | None = tuple(removals[0].removed.tolist())
    cut = Cut(structure, tuple(removals[0].removed.tolist()))
    if fused:
        order = removed_last([removal.removed.tolist() for removal in removals], structure.groups)
        permute_channels(dict(layer.module.named_parameters()), structure, order)
        layer.replaced.update(part.name for part in structure.slices)
        cut, removed = Cut(structure, last_groups(structure, target.remove)), None
    tokens = sum(statistics.tokens for matrix in matrices if (statistics := groups[matrix.name].statistics))
    row = _row(
        layer, target, tokens, time.perf_counter() - start, removed=removed,
        error=sum(errors) / len(errors) if errors else None,
        damping=max(removal.damping for removal in removals) if target.refit else None,
        swaps=sum(removal.swaps for removal in removals),
    )  # fmt: skip
    return cut, row


def _solve(layer: ResidentLayer, target: Target, matrix: Matrix, group: Group) -> tuple[GroupRemoval, float | None]:
    """Remove the groups from one matrix, in place; returns the result and its relative output error."""
    original = layer.weight(matrix.name)
    try:
        removal = _removal(layer, target, matrix, group, original)
    except NumericsError as error:
        raise error.at(matrix.name) from error
    layer.replace(matrix.name, removal.weight)
    _compensate(layer, target, group, original, removal.removed)
    lost = layer.output_error(group, matrix.name, original)
    if lost is not None and not math.isfinite(lost):
        raise NumericsError(
            f"{matrix.name}: the relative output error is {lost}",
            expected="inputs and outputs whose squares add up to a finite float32",
            fix="check the source checkpoint; if activations overflow, set compute_dtype: float32",
        )
    return removal, lost


def _removal(layer: ResidentLayer, target: Target, matrix: Matrix, group: Group, weight: Tensor) -> GroupRemoval:
    size = target.structure.columns
    refit = target.refit or target.method == "obs"
    gram = group.statistics.products if refit and isinstance(group.statistics, Gram) else None
    if target.method == "obs" and target.removed is None and gram is not None:
        return remove_groups(weight, gram, size, target.remove, target.settings)
    removed = _choose(layer, target, matrix, group).to(weight.device)
    if gram is not None:
        return refit_groups(weight, gram, size, removed, target.settings)
    kept = weight.clone()
    kept.unflatten(1, (-1, size))[:, removed] = 0
    return GroupRemoval(removed, kept, 0.0, kept.new_empty(0, dtype=torch.float64), 0.0, (), 0, 0.0)


def _common_choice(
    layer: ResidentLayer, target: Target, matrices: Sequence[Matrix], groups: Mapping[str, Group]
) -> tuple[int, ...]:
    """Groups to remove from several matrices together: by the sum of their scores, each relative to its mean.

    Exact group removal (obs) handles a single matrix; Wanda scores are used in its place here.
    """
    method = "wanda" if target.method == "obs" else target.method
    total = torch.zeros(target.structure.groups, dtype=torch.float64)
    for matrix in matrices:
        scores = _scores(layer, target.structure, method, groups[matrix.name], matrix.expert).cpu()
        total += scores / scores.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return tuple(lowest_groups(total, target.remove, target.settings.partitions).tolist())


def _choose(layer: ResidentLayer, target: Target, matrix: Matrix, group: Group) -> Tensor:
    """The groups to remove according to a score."""
    if target.removed is not None:
        return torch.tensor(target.removed[matrix.expert or 0 if len(target.removed) > 1 else 0])
    scores = _scores(layer, target.structure, target.method, group, matrix.expert)
    return lowest_groups(scores, target.remove, target.settings.partitions)


def _scores(layer: ResidentLayer, structure: Structure, method: str, group: Group, expert: int | None) -> Tensor:
    known = channels_of(layer.module, structure, NEEDS[method], statistics=group.statistics, expert=expert)
    return SCORES[method](known)


def _compensate(layer: ResidentLayer, target: Target, group: Group, weight: Tensor, removed: Tensor) -> None:
    """Add the mean output of the removed columns to the consumer's bias (FLAP, arXiv 2312.11983, section 3.4)."""
    if target.compensate is False:
        return
    bias = _bias(layer, target)
    moments = group.statistics.moments if isinstance(group.statistics, ChannelGram) else group.statistics
    if bias is None or not isinstance(moments, Moments) or not moments.tokens:
        if target.compensate:
            raise ModelError(
                f"{layer.name}.{target.structure.consumer} has no bias to compensate for the removed channels",
                expected="an architecture with a bias there, for flap with compensate: true",
                fix="set compensate: null, or refit: true, which compensates without a bias",
            )
        return
    size = target.structure.columns
    lost = weight.unflatten(1, (-1, size))[:, removed].flatten(1)
    mean = (moments.totals / moments.tokens).view(-1, size)[removed].flatten()
    bias.add_((lost @ mean).to(bias.dtype))
    layer.replaced.add(f"{target.structure.consumer.removesuffix('.weight')}.bias")


def _bias(layer: ResidentLayer, target: Target) -> Tensor | None:
    """The bias that is added to the consumer's output."""
    return dict(layer.module.named_parameters()).get(f"{target.structure.consumer.removesuffix('.weight')}.bias")


def _row(
    layer: ResidentLayer, target: Target, tokens: int, seconds: float, *, removed: tuple[int, ...] | None, **found: Any
) -> StructureRow:
    structure = target.structure
    known = {"error": None, "damping": None, "swaps": 0, **found}
    return StructureRow(
        layer=layer.name,
        kind=structure.kind,
        consumer=f"{layer.name}.{structure.consumer.removesuffix('.weight')}",
        groups=structure.groups,
        kept=structure.groups - target.remove,
        method=target.method,
        refit=target.refit and structure.kind != "experts",
        compensated=target.compensate is not False and _bias(layer, target) is not None,
        tokens=tokens,
        removed=removed,
        seconds=seconds,
        peak_bytes=layer.stream.peak_bytes,
        **known,
    )
