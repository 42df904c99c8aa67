"""What has an influence on what inside one traced decoder layer: gradients of a matrix's inputs, group by group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.structures.find.tracing import OUT, Axis, Trace

# What an index of an axis may be instead of a group's own.
STAYS, UNUSED, PARTLY = -1, -2, -3


def group_size(trace: Trace, inputs: list[tuple[Tensor, int]], width: int, within: int | None = None) -> int | None:
    """How many consecutive columns have rows of matrices to themselves, or None if no matrix feeds them so.

    The second column is asked, since the heads' first channels may follow one another where heads have one value.

    Args:
        trace: of the layer.
        inputs: of the matrix.
        width: its columns.
        within: look only for what sets the first so many columns apart; None: all of them.
    """
    # Columns of one group are fed by the same rows, those of another group by other rows: rows that feed the second
    # column and not the last are its group's own, and the columns that they reach in turn are the group.
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
    # Groups are of equal size and fill the width, or there are none.
    return size if size and first % size == 0 and width % size == 0 else None


def pull(trace: Trace, inputs: list[tuple[Tensor, int]], columns: Tensor | None = None) -> dict[Axis, Tensor]:
    """Which indices of each axis have an influence on the columns (bool [width]; None: on any)."""
    random = torch.Generator().manual_seed(1)
    # Random weights, so that influences of several columns on one index do not cancel by chance.
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
            # An index counts if it has an influence for any token: only exact zeros are none. A path that is closed for
            # all tokens is none either, hence their number.
            seen = (gradient != 0).movedim(dim, -1).reshape(-1, leaf.shape[dim]).any(0)
        hits[axis] = hits[axis] | seen if axis in hits else seen
    return hits


def push(trace: Trace, inputs: list[tuple[Tensor, int]], rows: Mapping[Axis, Tensor], width: int) -> Tensor:
    """Which columns (bool [width]) the rows of matrices have an influence on: a Jacobian-vector product."""
    random = torch.Generator().manual_seed(2)
    sources = [source for source in trace.sources() if source[0] in rows]
    # Reverse mode twice gives forward mode: the gradient is linear in the probes, so that its derivative in them, in
    # the direction of the rows, is what the rows do to the columns.
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
    """Values [n] shaped to multiply a tensor along its dimension."""
    return values.view([-1 if place == dim % like.dim() else 1 for place in range(like.dim())])


def owners_of(trace: Trace, inputs: list[tuple[Tensor, int]], width: int, size: int) -> dict[Axis, Tensor]:
    """For each index of each axis the only group that it has an influence on.

    UNUSED says none, STAYS all of them, PARTLY several that have a bit of their numbers in common.
    """
    # Asking group by group would take a backward pass for each. Instead the columns of all groups whose number has a
    # given bit are asked at once, and those without it: an index that feeds one group alone is hit on exactly one side
    # of each bit, and the sides spell the group's number. One that feeds several groups is hit on both sides wherever
    # their numbers differ.
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
        # In this order: who is hit on both sides of every bit is hit on both sides of some, too.
        owner = (one.long() << torch.arange(len(one))[:, None]).sum(0)
        owner[(one & zero).any(0)] = PARTLY
        owner[(one & zero).all(0)] = STAYS
        owner[~(one | zero).any(0)] = UNUSED
        owners[axis] = owner
    return owners
