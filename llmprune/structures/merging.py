"""Merge a run of decoder layers into its first one, at the usual size (FlattenGPT, arXiv 2602.08858).

    x = h + sum_l A_l(h)      their attentions side by side, all on what the first layer reads
    y = x + sum_l F_l(x)      then their MLPs

The heads of all these attentions read by one matrix, the output projections side by side, are a structure like any
other: of n times as many heads, those are removed for which the others compensate best, and what is left, refitted, has
the size of one layer. So have the channels of the MLPs, observed behind the merged attention. The gains of the norms
are folded first: then all layers read the same.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmprune.devices import return_freed_memory
from llmprune.errors import ModelError
from llmprune.precision import float32_products
from llmprune.statistics import check_finite
from llmprune.storage.report import MatchRow
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.structures.find.discovery import Structure
from llmprune.structures.find.subblocks import PARTS, Part, without
from llmprune.structures.mergeable import Mergeable, bias_of
from llmprune.structures.remove.problem import RemovalSettings
from llmprune.structures.remove.solver import remove_groups
from llmprune.structures.replacing import relative_error
from llmprune.structures.turning import fold_layer

# How far what a moved group computes may be from what it computed before, relative to its norm. bfloat16 gives 0.004.
_TOLERANCE = 0.02


def merge_run(
    layer: ResidentLayer,
    removed: Sequence[int],
    found: Mergeable,
    inputs: HiddenStates,
    targets: HiddenStates,
    settings: RemovalSettings,
) -> MatchRow:
    """Let a layer take up the best heads and channels of the removed layers after it; it stays if that does not help.

    Args:
        layer: resident, dense; changed in place.
        removed: numbers of the layers directly after it.
        found: of its model.
        inputs: what the layer is run on, a tensor [samples, length, hidden] a batch.
        targets: the outputs of the last removed layer, likewise.
        settings: of the removal and the refit.

    Returns:
        The report row: the mean relative squared error of a token on the validation sequences (on all sequences if none
        are held back) without the removed layers and with what was taken from them.

    Raises:
        ModelError: a group computes something else in its new layer.
        NumericsError: a factorisation fails, or a new weight is not finite.
    """
    start = time.perf_counter()
    with torch.no_grad(), layer.stream.stages("solve"):
        before = relative_error(layer, inputs, targets)
        kept = {name: parameter.detach().clone() for name, parameter in layer.module.named_parameters()}
        with _resident(layer.stream, removed) as others:
            merge = _Merge((layer, *others), found, inputs, settings)
            for part in PARTS:
                merge.merge(part)
        after = relative_error(layer, inputs, targets)
        better = after < before
        if not better:
            for name, parameter in layer.module.named_parameters():
                parameter.copy_(kept[name])
                layer.replaced.discard(name)
    return MatchRow(
        layer.name, "merge", before, after if better else before, 1, int(better), time.perf_counter() - start
    )


@contextmanager
def _resident(stream: Stream, indices: Sequence[int]) -> Iterator[list[ResidentLayer]]:
    """Layers that are ahead of the stream's own."""
    try:
        for index in indices:
            with stream.stages("load"):
                stream.source.load_layer(index, stream.settings.device)
        yield [ResidentLayer(stream, index) for index in indices]
    finally:
        for index in indices:
            stream.source.free_layer(index)
        return_freed_memory()


class _Merge:
    """Merges the parts of some layers, one after the other, into the first of them."""

    def __init__(
        self, members: Sequence[ResidentLayer], found: Mergeable, inputs: HiddenStates, settings: RemovalSettings
    ) -> None:
        self._members, self._found, self._inputs, self._settings = members, found, inputs, settings
        self._layer, self._stream = members[0], members[0].stream
        for member in members:
            fold_layer(found.residual, member.module, member.name)
        # Their gains are 1 now, in the checkpoint as well.
        self._parameters = [dict(member.module.named_parameters()) for member in members]
        for name in self._parameters[0]:
            if f"{self._layer.name}.{name}" in found.residual.offsets:
                self._layer.replaced.add(name)

    def merge(self, part: Part) -> None:
        """Merge the attentions or, with merged attention, the MLPs."""
        structure = self._found.groups[part]
        consumer, size, groups = structure.consumer, structure.columns, structure.groups
        weight = torch.cat([own[consumer].detach().float() for own in self._parameters], 1)
        gram = weight.new_zeros(weight.shape[1], weight.shape[1])
        for batch in self._stream.counted:
            rows = self._all(part, batch)
            with float32_products("ieee"):
                gram.addmm_(rows.T, rows)
        self._stream.settings.ranks.total(gram)
        check_finite(gram, f"the inputs of {consumer} in {self._layer.name} and the layers after it")
        removal = remove_groups(weight, gram, size, groups * (len(self._members) - 1), self._settings)
        gone = set(removal.removed.tolist())
        order = torch.tensor(
            placed([group for group in range(groups * len(self._members)) if group not in gone], groups)
        )
        some = self._stream.own[0]
        expected = self._columns(self._all(part, some), order, size)
        for piece in structure.slices:
            if piece.name != consumer:
                self._store(piece.name, self._moved(structure, piece.name, piece.dim, piece.index, order))
        self._store(consumer, self._columns(removal.weight, order, size))
        if (bias := bias_of(consumer)) in self._parameters[0]:
            self._store(
                bias, sum((own[bias].detach().float() for own in self._parameters[1:]), self._parameters[0][bias])
            )
        self._require_equal(self._read(self._layer, part, some), expected, part)

    def _all(self, part: Part, batch: int) -> Tensor:
        return torch.cat([self._read(member, part, batch) for member in self._members], 1)

    def _read(self, member: ResidentLayer, part: Part, batch: int) -> Tensor:
        """What the consumer of a member's part reads, float32 [tokens, width]."""
        hidden = self._inputs[batch].to(self._stream.settings.device)
        if part == "mlp":
            with self._without(self._layer, "mlp"):
                hidden = tree_leaves(self._layer.forward(hidden, batch))[0]
        seen: list[Tensor] = []
        linear = member.module.get_submodule(self._found.groups[part].consumer.rpartition(".")[0])
        hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            with self._without(member, "attention" if part == "mlp" else "mlp"):
                member.forward(hidden, batch)
        finally:
            hook.remove()
        return seen[0].flatten(0, -2).float()

    def _without(self, member: ResidentLayer, part: Part) -> AbstractContextManager[None]:
        return without(member.module, member.index, [self._found.blocks[member.index][part]])

    @staticmethod
    def _columns(matrix: Tensor, order: Tensor, size: int) -> Tensor:
        """The columns of some groups, in this order."""
        return matrix.unflatten(1, (-1, size))[:, order.to(matrix.device)].flatten(1)

    def _moved(self, structure: Structure, name: str, dim: int, index: Tensor, order: Tensor) -> Tensor:
        """A parameter of the first layer with the groups of the others in their new places."""
        new = self._parameters[0][name].detach().clone()
        for number, own in enumerate(self._parameters):
            slots = (order // structure.groups == number).nonzero().flatten()
            there = index[order[slots] % structure.groups].flatten().to(new.device)
            new.index_copy_(dim, index[slots].flatten().to(new.device), own[name].detach().index_select(dim, there))
        return new

    def _store(self, name: str, value: Tensor) -> None:
        """Set a parameter of the first layer, rounded to the dtype in which it will be stored."""
        rounded = value.to(self._stream.source.stored_dtype(self._layer.index, name))
        check_finite(rounded, f"{self._layer.name}.{name}, merged,")
        self._parameters[0][name].copy_(rounded)
        self._layer.replaced.add(name)

    def _require_equal(self, computed: Tensor, expected: Tensor, part: Part) -> None:
        error = float((computed - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not error <= _TOLERANCE:
            raise ModelError(
                f"{self._layer.name}: the groups of its {part} compute something else than in the layers they come "
                f"from (relative difference {error:.3g})",
                expected="layers that treat heads and channels alike, whatever their place",
                fix="set structures.depth.replace to linear, or leave it out",
            )


def placed(kept: Sequence[int], groups: int) -> list[int]:
    """Which of the kept groups stands in each place of the merged layer: those of the first layer stay where they are.

    Args:
        kept: as many as one layer has, ascending; those of the n-th layer begin at n x groups.
        groups: of one layer.

    Example:
        >>> placed([1, 3, 4, 7], 4)
        [4, 1, 7, 3]
    """
    own = {group for group in kept if group < groups}
    others = iter([group for group in kept if group >= groups])
    return [place if place in own else next(others) for place in range(groups)]
