"""What influences what inside one traced decoder layer: gradients of a matrix's inputs, group by group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.structures.find.tracing import OUT, Axis, Trace

# The owner of an index that does not belong to a single group.
KEPT, UNUSED, PARTLY = -1, -2, -3


def group_size(trace: Trace, inputs: list[tuple[Tensor, int]], width: int, within: int | None = None) -> int | None:
    """How many consecutive columns are fed by matrix rows of their own, or None if no rows feed them that way.

    The second column is tested, since the heads' first channels may be adjacent if heads have a single value.

    Args:
        trace: of the layer.
        inputs: of the matrix.
        width: number of its columns.
        within: look for groups within this many first columns only; None: within all of them.
    """
    # Columns of one group are fed by the same rows, those of another group by other rows: rows that feed the second
    # column but not the last belong to the second column's group, and the columns that they reach form that group.
    far = (within or width) - 1
    here, last = (pull(trace, inputs, torch.arange(width) == column) for column in (1, far))
    rows = {
        axis: mine & ~(last[axis] if far > 1 else False)
        for axis, mine in here.items()
        if axis[1] == OUT and bool((mine & ~last[axis]).any())
    }
    if not rows:
        return None
    reached = push(trace, inputs, rows, width).tolist()
    # The run of reached columns around the second one.
    first = end = 1
    while first and reached[first - 1]:
        first -= 1
    while end < width and reached[end]:
        end += 1
    size = end - first
    # Groups must have equal size and fill the width.
    return size if size and first % size == 0 and width % size == 0 else None


def pull(trace: Trace, inputs: list[tuple[Tensor, int]], columns: Tensor | None = None) -> dict[Axis, Tensor]:
    """Which indices of each axis influence the given columns (bool [width]; None: any column)."""
    random = torch.Generator().manual_seed(1)
    # Random weights, so that an index's influences on several columns do not cancel by chance.
    weights = [
        torch.randn(x.shape, generator=random) * (1 if columns is None else _along(columns, x, dim))
        for x, dim in inputs
    ]
    sources = trace.sources()
    gradients = torch.autograd.grad(
        [x for x, _ in inputs], [leaf for _, leaf, _ in sources], weights, retain_graph=True, allow_unused=True
    )
    hits: dict[Axis, Tensor] = {}
    for (axis, leaf, dim), gradient in zip(sources, gradients, strict=True):
        if gradient is None:
            seen = torch.zeros(leaf.shape[dim], dtype=torch.bool)
        else:
            # An index counts if it has an influence for any token; only exact zeros mean none. A path that is inactive
            # for all tokens would be missed, hence the number of tokens.
            seen = (gradient != 0).movedim(dim, -1).reshape(-1, leaf.shape[dim]).any(0)
        hits[axis] = hits[axis] | seen if axis in hits else seen
    return hits


def push(trace: Trace, inputs: list[tuple[Tensor, int]], rows: Mapping[Axis, Tensor], width: int) -> Tensor:
    """Which columns (bool [width]) the given rows of matrices influence: a Jacobian-vector product."""
    random = torch.Generator().manual_seed(2)
    sources = [source for source in trace.sources() if source[0] in rows]
    # Reverse mode twice gives forward mode: the gradient is linear in the probes, so its derivative with respect to
    # them, in the direction of the rows, is the effect of the rows on the columns.
    probes = [torch.zeros_like(x).requires_grad_() for x, _ in inputs]
    gradients = torch.autograd.grad(
        [x for x, _ in inputs], [leaf for _, leaf, _ in sources], probes, create_graph=True, allow_unused=True
    )
    total = torch.zeros(())
    for (axis, leaf, dim), gradient in zip(sources, gradients, strict=True):
        if gradient is not None:
            total = total + (gradient * torch.randn(leaf.shape, generator=random) * _along(rows[axis], leaf, dim)).sum()
    effects = torch.autograd.grad(total, probes, retain_graph=True, allow_unused=True)
    reached = torch.zeros(width, dtype=torch.bool)
    for (_, dim), effect in zip(inputs, effects, strict=True):
        if effect is not None:
            reached |= (effect != 0).movedim(dim, -1).reshape(-1, width).any(0)
    return reached


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Values [n], reshaped to multiply a tensor along one dimension."""
    return values.view([-1 if place == dim % like.dim() else 1 for place in range(like.dim())])


def owners_of(trace: Trace, inputs: list[tuple[Tensor, int]], width: int, size: int) -> dict[Axis, Tensor]:
    """For each index of each axis, the only group that it influences.

    UNUSED means none, KEPT all of them, PARTLY several whose numbers share a bit.
    """
    # Testing group by group would take a backward pass for each. Instead, for each bit, the columns of all groups whose
    # number has it are tested at once, then those without it: an index that feeds a single group is hit on exactly one
    # side of each bit, and the sides spell the group's number. One that feeds several groups is hit on both sides of
    # every bit in which their numbers differ.
    group = torch.arange(width) // size
    owners: dict[Axis, Tensor] = {}
    ones: dict[Axis, list[Tensor]] = {}
    zeros: dict[Axis, list[Tensor]] = {}
    for bit in range(max(int(group[-1]).bit_length(), 1)):
        coded = (group >> bit & 1).bool()
        for hits, found in ((ones, pull(trace, inputs, coded)), (zeros, pull(trace, inputs, ~coded))):
            for axis, hit in found.items():
                hits.setdefault(axis, []).append(hit)
    for axis in ones:
        one, zero = torch.stack(ones[axis]), torch.stack(zeros[axis])
        # The order matters: an index hit on both sides of every bit is also hit on both sides of some bit.
        owner = (one.long() << torch.arange(len(one))[:, None]).sum(0)
        owner[(one & zero).any(0)] = PARTLY
        owner[(one & zero).all(0)] = KEPT
        owner[~(one | zero).any(0)] = UNUSED
        owners[axis] = owner
    return owners
