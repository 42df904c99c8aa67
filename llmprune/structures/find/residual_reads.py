"""Find what reads the residual stream in each decoder layer, behind which norm, and the values of its KV heads.

From data flow, like the structures: every matmul with a weight is cut, so that a matrix whose input depends on the gain
of a norm over the hidden channels reads that norm's output and nothing else that is hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.models.decoder import Decoder
from llmprune.stream.observation import PRODUCTS
from llmprune.structures.find.discovery import Structure, once
from llmprune.structures.find.influence import owners_of, pull
from llmprune.structures.find.tracing import OUT, Trace, TracedForward, eagerly, storage_of


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Where the values of attention are computed and read; one vector of `size` values per KV head.

    Attributes:
        producer: name, inside the layer, of the parameter that computes them.
        bias: of the producer; None without one.
        rows: its outputs, int64 [heads, size].
        consumer: name, inside the layer, of the parameter that reads them, mixed over tokens.
        columns: its inputs, int64 [heads, query heads of each, size].
    """

    producer: str
    bias: str | None
    rows: Tensor
    consumer: str
    columns: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerReads:
    """What reads the residual stream in one decoder layer; names are those inside the layer.

    Attributes:
        readers: parameter -> gain of the norm whose output it multiplies.
        values: of its attention, if they can be rotated exactly; None if they cannot, or if it has none.
        refusal: why a rotation of the residual stream would change what the layer computes; None if it would not.
    """

    readers: Mapping[str, str]
    values: Values | None
    refusal: str | None = None


def find_residual_reads(
    decoder: Decoder, hidden: Mapping[str, Sequence[int]], gains: Sequence[str], found: Sequence[Sequence[Structure]]
) -> list[LayerReads]:
    """Find the readers of the residual stream in every decoder layer, without reading any weights.

    Args:
        decoder: a causal LM; meta tensors suffice. Left unchanged.
        hidden: parameter in the whole model -> its dimensions that are hidden width.
        gains: names in the whole model of the gains of norms over hidden channels.
        found: the structures of each layer.

    Raises:
        ModelError: a matrix is used in an unknown layout.
    """

    def visit(index: int, trace: Trace) -> LayerReads:
        prefix = f"{decoder.layer_name(index)}."
        own = {name.removeprefix(prefix): dims for name, dims in hidden.items() if name.startswith(prefix)}
        inside = [name.removeprefix(prefix) for name in gains if name.startswith(prefix)]
        readers, refusal = _readers(trace, own, inside, forward.routers)
        forward.routers.clear()
        heads = [s for s in found[index] if s.kind == "heads" and (s.refusal is None or s.groups == 1)]
        values = _values(trace, heads[0]) if len(heads) == 1 and refusal is None else None
        return LayerReads(readers, values, refusal)

    forward = _WithRouters(decoder)
    with torch.enable_grad(), eagerly(decoder.model):
        return forward.each(once(visit))


class _WithRouters(TracedForward):
    """Cuts the matmuls with small weights, those of routers, as well, and records their inputs.

    Attributes:
        routers: (parameter, input) of each such matmul of the current layer.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder, frozen=False)
        self.routers: list[tuple[str, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        trace = self._trace
        if trace is None or not (func is F.linear or func in PRODUCTS):
            return result
        operands = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        small = {storage_of(leaf): name for name, leaf in trace.small.items() if leaf.dim() > 1 and leaf.is_leaf}
        known = [(small[storage_of(value)], value) for value in operands[:2] if storage_of(value) in small]
        for name, weight in known:
            self.routers += [(name, value) for value in operands[:2] if value is not weight]
        return result.detach() if known else result


def _readers(
    trace: Trace, hidden: Mapping[str, Sequence[int]], gains: Sequence[str], routers: Sequence[tuple[str, Tensor]]
) -> tuple[dict[str, str], str | None]:
    """The readers, and why their layer cannot be rotated."""
    reads = [(product.parameter, product.read) for product in trace.products] + list(routers)
    readers: dict[str, str] = {}
    if added := _influencing(trace, [*trace.hidden, *trace.other_outputs], gains):
        return readers, f"the output of the norm with {added[0]} is added to the residual stream"
    for parameter, read in reads:
        if not read.numel():
            continue  # an expert without tokens
        behind = _influencing(trace, [read], gains)
        if not behind:
            continue
        known = readers.setdefault(parameter, behind[0])
        if len(behind) > 1 or known != behind[0]:
            return readers, f"{parameter} reads the outputs of several norms: {', '.join({known, *behind})}"
        if _read_dim(trace, parameter, hidden) is None:
            return readers, f"{parameter} does not read the output of the norm with {behind[0]} unchanged"
    for parameter, matrices in trace.matrices.items():
        if parameter not in readers and _read_dim(trace, parameter, hidden) is not None:
            used = any(name == parameter for name, _ in reads)
            found = "reads the residual stream without a norm" if used else "was not used for a few random tokens"
            return readers, f"{matrices[0].name} {found}"
    return readers, None


def reading_dim(shape: Sequence[int], transposed: bool) -> int:
    """The dimension of a parameter [out, in] or [experts, out, in], or transposed, along its inputs."""
    return len(shape) - (2 if transposed else 1)


def _read_dim(trace: Trace, parameter: str, hidden: Mapping[str, Sequence[int]]) -> int | None:
    """The dimension of a parameter along its inputs, if that is hidden width."""
    dims = hidden.get(parameter, ())
    if parameter not in trace.matrices:
        return dims[0] if len(dims) == 1 else None  # a router's
    dim = reading_dim(trace.shapes[parameter], trace.matrices[parameter][0].transposed)
    return dim if dim in dims else None


def _influencing(trace: Trace, tensors: Sequence[Tensor], gains: Sequence[str]) -> list[str]:
    """Those of the gains on which a tensor depends."""
    with_graph = [tensor for tensor in tensors if tensor.requires_grad]
    if not with_graph or not gains:
        return []
    random = torch.Generator().manual_seed(4)
    weights = [torch.randn(tensor.shape, generator=random) for tensor in with_graph]
    leaves = [trace.small[name] for name in gains]
    gradients = torch.autograd.grad(with_graph, leaves, weights, retain_graph=True, allow_unused=True)
    return [name for name, grad in zip(gains, gradients, strict=True) if grad is not None and bool(grad.any())]


def _values(trace: Trace, structure: Structure) -> Values | None:
    """The values of an attention module; None if they reach the consumer in another way than mixed over tokens.

    A value reaches one column in each query head of its KV head; a query, all columns of its head, and a key, all those
    of its KV head. So the rows of V are those that no other row shares its columns with, and together they reach every
    column once; an elementwise gate, or a norm over the values, would break this.
    """
    size, inputs = structure.columns, trace.inputs(structure.consumer)
    if structure.groups * size != trace.matrices[structure.consumer][0].shape[1] or size < 2 or not inputs:
        return None
    width = structure.groups * size
    place = torch.arange(width) % size
    reached = [pull(trace, inputs, place == column) for column in range(size)]
    owners = owners_of(trace, inputs, width, size)
    found = []
    for axis in reached[0]:
        if axis[1] == OUT and axis[0] in trace.matrices and len(trace.matrices[axis[0]]) == 1:
            rows = _value_rows(torch.stack([hits[axis] for hits in reached], 1), owners[axis], structure)
            if rows is not None:
                found.append(Values(axis[0], trace.biases.get(axis[0]), rows[0], structure.consumer, rows[1]))
    return found[0] if len(found) == 1 else None


def _value_rows(reached: Tensor, owners: Tensor, structure: Structure) -> tuple[Tensor, Tensor] | None:
    """The rows [heads, size] of V and the columns [heads, copies, size] that they reach.

    Args:
        reached: which columns of its group each row reaches, bool [rows, columns].
        owners: the group that each row reaches.
        structure: the heads.
    """
    if structure.groups == 1:
        owners = torch.where(reached.any(1), 0, -1)  # with a single group, no row is told apart from those it keeps
    rows, columns = [], []
    for group in range(structure.groups):
        mine = (owners == group).nonzero().flatten()
        _, inverse, counts = reached[mine].unique(dim=0, return_inverse=True, return_counts=True)
        alone = counts[inverse] == 1
        sets = reached[mine][alone]
        copies = sets.sum(1)
        if not len(sets) or not bool((sets.sum(0) == 1).all()) or not bool((copies == copies[0]).all()):
            return None
        # In the order of the first column that they reach.
        firsts = sets.long().argmax(1).tolist()
        by_column = torch.tensor(sorted(range(len(firsts)), key=firsts.__getitem__))
        rows.append(mine[alone][by_column])
        columns.append(sets[by_column].nonzero()[:, 1].view(len(sets), -1).T + group * structure.columns)
    if len({row.shape for row in rows}) > 1 or len(rows[0]) < 2:
        return None
    return torch.stack(rows), torch.stack(columns)
