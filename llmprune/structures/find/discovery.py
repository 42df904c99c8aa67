"""Find which rows of which parameters belong to each head, FFN channel or expert, from data flow alone.

The model's own code runs over a few tokens without its weights: each matmul with a weight is cut and its result
replaced by random values, so that the inputs of a matrix (the consumer: o_proj, down_proj) depend only on the matmuls
just before it (the producers: q, k, v or gate, up) and on the small parameters in between. Gradients of the consumer's
input columns then show exactly which rows feed which columns: rows that feed a single group of columns are removed with
it, and rows that feed several groups are kept. Binary codes over the groups find this for all rows in 2 log2(groups)
backward passes.

A norm makes every row feed every column a little. So the model runs twice: with the statistics of norms held constant,
which shows what belongs together, and unmodified, which shows whether anything else depends on it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmprune.models.decoder import Decoder
from llmprune.structures.find.influence import KEPT, PARTLY, group_size, owners_of, pull
from llmprune.structures.find.tracing import OUT, Axis, Trace, TracedForward, eagerly

Kind = Literal["heads", "ffn", "experts", "mixer"]


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The part of one tensor that belongs to each group.

    Attributes:
        name: of the parameter or buffer, inside its decoder layer.
        dim: the dimension that shrinks.
        index: int64 [groups, k], ascending in each row; the groups are disjoint.
    """

    name: str
    dim: int
    index: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """Groups of a decoder layer that can be removed physically.

    Attributes:
        kind: "heads" (KV groups: a KV head with its query heads), "ffn" (channels), "experts", or "mixer" (a
            convolution or recurrence, always refused).
        consumer: name, inside the layer, of the matrix whose input columns are grouped; for experts, of the matrix that
            computes their output.
        groups: number of groups.
        columns: number of the consumer's consecutive input columns in each group; 0 for experts.
        slices: what belongs to the groups, including the consumer's own columns; empty if refused.
        refusal: why groups of it cannot be removed exactly; None if they can.
        partitions: consecutive runs of groups, of equal length, that must all lose the same number (the query heads of
            one KV head).
    """

    kind: Kind
    consumer: str
    groups: int
    columns: int
    slices: tuple[Slice, ...]
    refusal: str | None = None
    partitions: int = 1


def find_structures(decoder: Decoder) -> list[list[Structure]]:
    """Find the structures of every decoder layer, without reading any weights.

    Args:
        decoder: a causal LM; meta tensors suffice. Left unchanged.

    Returns:
        For each layer, its structures in the order in which it uses them; the same on every call.

    Raises:
        ModelError: a matrix is used in an unknown layout.
    """
    return _found(decoder, _draft)


def find_query_heads(decoder: Decoder) -> list[list[Structure]]:
    """Find the individual query heads of every decoder layer; their KV heads are kept.

    Args:
        decoder: a causal LM; meta tensors suffice. Left unchanged.

    Returns:
        For each layer, a structure of kind "heads" for each of its attention modules, with one partition per KV head.
        Refused if each KV head has a single query head: `find_structures` then finds the same groups.

    Raises:
        ModelError: a matrix is used in an unknown layout.
    """
    return _found(decoder, _draft_query_heads)


def _found(decoder: Decoder, draft: Callable[[Trace], list["_Draft"]]) -> list[list[Structure]]:
    """The structures, drafted with the statistics of norms held constant and confirmed without."""
    with torch.enable_grad(), eagerly(decoder.model):
        # Norms held constant: sharing a norm with a group does not count as being fed by it.
        first = TracedForward(decoder, frozen=True)
        drafts = first.each(once(lambda index, trace: draft(trace)))
        second = TracedForward(decoder, frozen=False)
        # Which layers pass more than hidden states to later ones is known only at the end of a run.
        second.handed_on = first.handed_on
        found: list[list[Structure]] = second.each(
            once(lambda index, trace: [done for draft in drafts[index] if (done := _confirm(draft, trace))])
        )
    return found


def once(visit: Callable[[int, Trace], Any]) -> Callable[[int, Trace], Any]:
    """Visit one of several identical layers; the others share its result."""
    known: dict[tuple[object, ...], Any] = {}

    def visit_new(index: int, trace: Trace) -> Any:
        key = trace.signature()
        if key not in known:
            known[key] = visit(index, trace)
        return known[key]

    return visit_new


@dataclass
class _Draft:
    """A structure as found with the statistics of norms held constant."""

    structure: Structure
    owners: dict[Axis, Tensor]


def _draft(trace: Trace) -> list[_Draft]:
    drafts = []
    # Any matrix may be a consumer; if no matmul precedes it in the layer, no rows will be found to feed it.
    for consumer in dict.fromkeys(product.parameter for product in trace.products):
        inputs = trace.inputs(consumer)
        width = trace.matrices[consumer][0].shape[1]
        if not inputs or width < 2 or (size := group_size(trace, inputs, width)) is None or _is_linear(trace, inputs):
            continue
        owners = owners_of(trace, inputs, width, size)
        slices, refusal = _slices(trace, owners, width // size)
        # Its own columns belong to the groups by definition: no gradient is needed for them.
        slices.append(_matrix_slice(trace, consumer, torch.arange(width).view(-1, size), output=False))
        if width == size:
            refusal = "it has only one group"
        drafts.append(_Draft(Structure("ffn", consumer, width // size, size, tuple(slices), refusal), owners))
    return drafts + _draft_experts(trace)


def _draft_query_heads(trace: Trace) -> list[_Draft]:
    drafts = []
    for consumer in dict.fromkeys(product.parameter for product in trace.products):
        inputs = trace.inputs(consumer)
        width = trace.matrices[consumer][0].shape[1]
        if not inputs or width < 2 or (outer := group_size(trace, inputs, width)) is None:
            continue
        if _kind(trace, inputs) != "heads":
            continue
        # Within one KV head, only rows of q distinguish its query heads.
        size = group_size(trace, inputs, width, within=outer) if outer > 2 else None
        if size is None or size in (1, outer) or outer % size:
            one = Structure("heads", consumer, width // outer, outer, (), "its groups are already single query heads")
            drafts.append(_Draft(one, {}))
            continue
        # What feeds several heads of a group (keys and values) is kept.
        found = owners_of(trace, inputs, width, size)
        owners = {axis: owner.where(owner != PARTLY, KEPT) for axis, owner in found.items()}
        slices, refusal = _slices(trace, owners, width // size)
        if not any(dim == OUT and bool((owner >= 0).any()) for (_, dim), owner in owners.items()):
            refusal = "no rows belong to a single query head"
        slices.append(_matrix_slice(trace, consumer, torch.arange(width).view(-1, size), output=False))
        structure = Structure("heads", consumer, width // size, size, tuple(slices), refusal, width // outer)
        drafts.append(_Draft(structure, owners))
    return drafts


def _slices(trace: Trace, owners: dict[Axis, Tensor], groups: int) -> tuple[list[Slice], str | None]:
    """What belongs to each group, and the reason if the groups cannot be removed."""
    slices: list[Slice] = []
    refusal = None
    for (name, dim), owner in owners.items():
        # KEPT and UNUSED are negative: what feeds all groups, or none of them, is not cut.
        places = [place for place, group in enumerate(owner.tolist()) if group >= 0]
        if bool((owner == PARTLY).any()):
            refusal = f"some of its groups share {name}"
        if not places:
            continue
        # Sizes must not depend on which groups are removed, or no config could express them.
        counts = torch.bincount(owner[places], minlength=groups)
        if name.startswith("argument ") or name in trace.fixed:
            refusal = f"it depends on the {name}, which has different values for each group"
        elif bool((counts != counts[0]).any()):
            refusal = f"its groups have different shares of {name}"
        elif any(known.name == name for known in slices):
            refusal = f"{name} belongs to the groups along two dimensions"
        else:
            # A stable sort by owner: row g holds the indices of group g, ascending.
            index = torch.tensor(sorted(places, key=owner.tolist().__getitem__)).view(groups, -1)
            slices.append(_matrix_slice(trace, name, index, output=True) if dim == OUT else Slice(name, dim, index))
            # A bias before a softmax (of keys) has no influence at all, but is removed with its rows.
            if dim == OUT and name in trace.biases:
                bias = trace.biases[name]
                slices.append(Slice(bias, trace.small[bias].dim() - 1, index))
    return slices, refusal


def _matrix_slice(trace: Trace, name: str, index: Tensor, *, output: bool) -> Slice:
    """The slice of a weight for indices [groups, k] of its outputs or its inputs."""
    matrix, fused = trace.matrices[name][0], len(trace.shapes[name]) == 3
    dim = int(output == matrix.transposed)
    if matrix.experts > 1 and not fused and dim == 0:
        # The experts are stacked along the rows.
        index = torch.cat([index + expert * matrix.shape[0 if output else 1] for expert in range(matrix.experts)], 1)
    return Slice(name, dim + fused, index)


def _is_linear(trace: Trace, inputs: list[tuple[Tensor, int]]) -> bool:
    """Whether the consumer's input depends on the producers linearly: a bottleneck, not an FFN."""
    random = torch.Generator().manual_seed(3)
    found = [(product.leaf, product.leaf_dim) for product in trace.products]
    leaves = [leaf for leaf, _ in found]
    probes = [torch.randn(x.shape, generator=random).requires_grad_() for x, _ in inputs]
    results = torch.autograd.grad([x for x, _ in inputs], leaves, probes, create_graph=True, allow_unused=True)
    gradients = [gradient for gradient in results if gradient is not None]
    for (leaf, dim), gradient in zip(found, results, strict=True):
        if gradient is not None:
            open_for = (gradient != 0).movedim(dim, -1).reshape(-1, leaf.shape[dim])
            # The gradient of a ReLU is constant too, but it is zero where the ReLU is inactive.
            if bool((open_for.any(0) & ~open_for.all(0)).any()):
                return False
    # If the second derivative is zero everywhere, the gradients do not depend on the values: the map is linear.
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    change = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return not any(bool(second.any()) for second in change if second is not None)


def _draft_experts(trace: Trace) -> list[_Draft]:
    """Experts, where a top-k over them shows which rows of the router belong to them."""
    drafts: list[_Draft] = []
    for scores in trace.selections:
        # The scores have one column per expert, so groups of one column are the experts.
        count = scores.shape[-1]
        slices, refusal = _slices(trace, owners_of(trace, [(scores, -1)], count, 1), count)
        routers = [s.name for s in slices]
        own = _nearest_experts(trace, routers[0], count) if routers else []
        if not own or any(draft.structure.consumer in own for draft in drafts):
            continue
        # Biases of experts take part in no matmul; they are found in the modules of the matrices.
        modules = {name.rpartition(".")[0] for name in own}
        biases = [
            name
            for name, leaf in trace.small.items()
            if name.rpartition(".")[0] in modules and name not in routers and leaf.shape[:1] == (count,)
        ]
        for name in own + biases:
            rows = torch.arange(trace.shapes[name][0]).view(count, -1)
            slices.append(Slice(name, 0, rows))
        if trace.grouped:
            refusal = "its router chooses groups of experts first"
        # The last matmul of the experts computes their output.
        last = [product.parameter for product in trace.products if product.parameter in own]
        drafts.append(_Draft(Structure("experts", (last or own)[-1], count, 0, tuple(slices), refusal), {}))
    return drafts


def _nearest_experts(trace: Trace, router: str, count: int) -> list[str]:
    """The fused matrices of `count` experts that are nearest to a router's parameter."""
    for parent in _parents(router):
        own = [n for n, m in trace.matrices.items() if m[0].experts == count and n.startswith(parent)]
        if own:
            return own
    return []


def _parents(name: str) -> Iterator[str]:
    """The modules around a parameter, innermost first, each name with a trailing dot."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name + "."


def _confirm(draft: _Draft, trace: Trace) -> Structure | None:
    """Check a draft against the unmodified model; None if it is part of something larger (the residual stream)."""
    structure = draft.structure
    if structure.kind == "experts":
        return _settled(structure, "experts", structure.refusal)
    inputs = trace.inputs(structure.consumer)
    taken = {axis: owner >= 0 for axis, owner in draft.owners.items()}

    def feeds(sinks: list[Tensor]) -> bool:
        known = [(sink, -1) for sink in sinks if sink.requires_grad]
        hits = pull(trace, known) if known else {}
        return any(bool((hits[axis] & mine).any()) for axis, mine in taken.items() if axis in hits)

    # With norms unmodified. If another matrix, a router or the residual stream also sees what would be removed, then
    # these rows do not belong to this consumer alone, and there is no structure.
    others = [p.read for p in trace.products if p.parameter != structure.consumer]
    if feeds([*others, *trace.selections, *trace.hidden]):
        return None
    kind = _kind(trace, inputs)
    owners = owners_of(trace, inputs, structure.groups * structure.columns, structure.columns)
    # A norm over all groups (of queries, say) makes each row feed all columns: the owners then differ from those found
    # with frozen statistics, and the kept groups would be normalised differently.
    blurred = [axis[0] for axis, mine in taken.items() if bool((owners[axis] != draft.owners[axis])[mine].any())]
    refusal = structure.refusal
    if kind == "mixer":
        refusal = "it mixes tokens by a convolution or recurrence, so it has neither heads nor FFN channels"
    elif feeds(trace.other_outputs):
        refusal = "later layers read the same keys and values"
    elif kind == "heads" and structure.columns == 1:
        refusal = "it has only one head"
    elif blurred:
        refusal = f"the output of {blurred[0]} is normalised over all groups: the others would change"
    return _settled(structure, kind, refusal)


def _settled(structure: Structure, kind: Kind, refusal: str | None) -> Structure:
    return replace(structure, kind=kind, refusal=refusal, slices=() if refusal else structure.slices)


def _kind(trace: Trace, inputs: list[tuple[Tensor, int]]) -> Kind:
    """Heads have a softmax between producers and consumer; FFN channels do not mix tokens."""
    # An expert may have received no tokens; the largest input is one that was used.
    x, dim = max(inputs, key=lambda pair: pair[0].numel())
    if "Softmax" in _operations(x):
        return "heads"
    # The last token's inputs depend on its own matmuls, and on earlier tokens only if tokens are mixed.
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    products = [product for product in trace.products if product.leaf.numel()]
    gradients = torch.autograd.grad(rows[-1].sum(), [p.leaf for p in products], retain_graph=True, allow_unused=True)
    for product, gradient in zip(products, gradients, strict=True):
        if gradient is not None and (gradient != 0).any(product.leaf_dim).sum() > 1:
            return "mixer"
    return "ffn"


def _operations(x: Tensor) -> str:
    """The names of the operations that led to x since the last matmuls with weights."""
    seen: set[Any] = set()
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return " ".join(node.name() for node in seen)
