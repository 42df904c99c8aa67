"""The matrix of one vLLM layer, assembled from the tensors of a checkpoint.

vLLM fuses layers that a checkpoint has apart (q, k and v; gate and up), and a rank of tensor parallelism holds a share
of each. Tensors arrive one by one, in any order. As soon as those of a matrix are complete, this rank's share is cut
from them and the rest is dropped, so that neither the whole matrix nor its dense form is kept. At the end, neighbours
of one kind are stacked and converted to the form that multiplies them: one call for q, k and v.

Nothing here imports vLLM.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import CheckpointError, LlmpruneError, ModelError, NumericsError
from llmprune.serving.cpu_forms import measure_alone
from llmprune.serving.forms import Choice, Served, Unpacked, choose_form
from llmprune.serving.sparse_linear import SparseLinear, self_tests_wanted
from llmprune.storage.formats import BlockLayout, DenseLayout, Layout, NMLayout, Spec
from llmprune.storage.formats.parts import Packed, can_stack, cut_columns, cut_rows, share, stack, stacked

# How vLLM names the parts of a fused layer: by number, q, k and v by letter, several as a tuple, and all as None.
ShardId = str | int | tuple[int, ...] | None

_LETTERS = ("q", "k", "v")

# What vLLM fuses, as most of its models have it.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a vLLM layer.

    Attributes:
        inputs: the input dimension, of the layer and of this rank's share.
        outputs: the output dimension of each of its parts (one unless it is fused), likewise.
        rank: of this process in tensor parallelism.
        ranks: their number.
        dtype: in which the layer computes.
    """

    inputs: tuple[int, int]
    outputs: tuple[tuple[int, int], ...]
    rank: int
    ranks: int
    dtype: torch.dtype


@dataclass(slots=True)
class _Shard:
    """One matrix of the checkpoint, and the parts of the layer that it fills."""

    name: str
    layout: Layout | None  # None: dense
    parts: tuple[int, ...]
    arrived: dict[str, Tensor] = field(default_factory=dict)
    done: bool = False

    @property
    def suffixes(self) -> set[str]:
        return set(self.specs)

    @property
    def specs(self) -> dict[str, Spec]:
        return self.layout.tensors() if self.layout else {"weight": Spec(())}


class Assembly:
    """Collects the tensors of one layer.

    Args:
        name: of the layer in vLLM, for messages.
        layouts: of the matrices that make it up, by their names in the checkpoint, in the order of its parts; None for
            dense ones.
        shape: of the layer.

    Raises:
        ModelError: the matrices do not fill the layer.
    """

    def __init__(self, name: str, layouts: Mapping[str, Layout | None], shape: Shape) -> None:
        self.name, self.shape = name, shape
        self._shards = _filled(name, layouts, shape)
        self._pieces: dict[int, Packed] = {}

    @property
    def arriving(self) -> dict[str, torch.dtype]:
        """The names of all tensors that may arrive, and their dtypes."""
        specs = {suffix: spec for shard in self._shards for suffix, spec in shard.specs.items()}
        return {suffix: spec.dtype or self.shape.dtype for suffix, spec in sorted(specs.items())}

    def take(self, suffix: str, tensor: Tensor, shard_id: ShardId = None) -> None:
        """Receive one tensor; it is copied.

        Args:
            suffix: its name in the layout, such as "values".
            tensor: as stored in the checkpoint: not cut for this rank.
            shard_id: which of the parts it is, as vLLM says it.

        Raises:
            ModelError: no such tensor is expected.
            FormatError: the tensors of the matrix do not match its layout.
            PatternError: the layout cannot be cut for this rank.
            NumericsError: a weight is NaN or infinite.
        """
        parts = self._parts(shard_id)
        shard = next((shard for shard in self._shards if shard.parts == parts), None)
        if shard is None or suffix not in shard.suffixes:
            raise ModelError(
                f"{self.name}: the tensor {suffix!r} arrives for its parts {list(parts)}",
                expected=", ".join(f"{sorted(one.suffixes)} for {list(one.parts)}" for one in self._shards),
                fix="serve the checkpoint as llmprune wrote it",
            )
        shard.arrived[suffix] = tensor.detach().to("cpu", copy=True)
        if set(shard.arrived) == shard.suffixes:
            self._cut(shard)

    def finish(self, device: torch.device) -> list[SparseLinear]:
        """Build what multiplies, on this device: layers whose outputs, one after another, are those of this one.

        Raises:
            CheckpointError: tensors are missing.
            FormatError: tensors are damaged.
            NumericsError: a kernel gives wrong results on this machine.
        """
        for shard in self._shards:
            if not shard.done:
                raise CheckpointError(
                    f"{shard.name}: {', '.join(sorted(shard.suffixes - set(shard.arrived)))} did not arrive",
                    expected="the tensors of every packed layer",
                    fix="download the checkpoint again; packed layers cannot be filled with dummy weights "
                    "(--load-format dummy)",
                )
        return [self._settled(group, device) for group in self._groups()]

    def _cut(self, shard: _Shard) -> None:
        whole = self._whole(shard)
        tensors = {name: _cast(tensor, self.shape.dtype) for name, tensor in whole.tensors.items()}
        whole, shard.arrived, shard.done = Packed(whole.layout, tensors), {}, True
        _require_finite(shard.name, whole)
        first = 0
        for part in shard.parts:
            rows, held = self.shape.outputs[part]
            place = share(rows, held, self.shape.rank, self.shape.ranks)
            columns = share(*self.shape.inputs, self.shape.rank, self.shape.ranks)
            try:
                piece = cut_columns(cut_rows(whole, first + place[0], first + place[1]), *columns)
            except LlmpruneError as error:
                raise error.at(shard.name) from error
            self._pieces[part] = Packed(piece.layout, _owned(piece.tensors, tensors))
            first += rows

    def _whole(self, shard: _Shard) -> Packed:
        """The matrix as the checkpoint has it; what kernels would read without a look is checked."""
        if shard.layout is not None:
            whole = Packed(shard.layout, shard.arrived).require()
            if isinstance(shard.layout, BlockLayout):
                shard.layout.require_places(whole.tensors)
            return whole
        found = tuple(shard.arrived["weight"].shape)
        wanted = _rows(self.shape, shard.parts), self.shape.inputs[0]
        if found != wanted:
            raise _misfit(shard.name, found, self.name, wanted, self.shape.ranks)
        return Packed(DenseLayout(wanted), shard.arrived)

    def _groups(self) -> Iterator[list[Packed]]:
        """The pieces in order, with neighbours of one kind together; they are handed over."""
        group: list[Packed] = []
        for part in sorted(self._pieces):
            piece = self._pieces.pop(part)
            if group and not can_stack(group[-1].layout, piece.layout):
                yield group
                group = []
            group = [*group, piece]
        yield group

    def _settled(self, group: list[Packed], device: torch.device) -> SparseLinear:
        matrix = stack(group)
        group.clear()
        layer = SparseLinear(matrix.layout, bias=False, dtype=self.shape.dtype)
        layer.load_state_dict({name: tensor.to(device) for name, tensor in matrix.tensors.items()}, assign=True)
        del matrix
        choice = layer.settle(served_in(layer.layout, device, self.shape.dtype))
        if choice.form.tested and self_tests_wanted():
            layer.test(self.name)
        measure_alone(layer)
        return layer

    def _parts(self, shard_id: ShardId) -> tuple[int, ...]:
        if shard_id is None:
            return tuple(range(len(self.shape.outputs)))
        if isinstance(shard_id, tuple):
            return shard_id
        return (_LETTERS.index(shard_id) if isinstance(shard_id, str) else shard_id,)


def served_in(layout: Layout, device: torch.device, dtype: torch.dtype) -> Served:
    """How an engine asks for a matrix: 2:4 and blocks packed wherever a kernel has them, others in the fastest form."""
    if not isinstance(layout, NMLayout | BlockLayout):
        return "auto"
    return "auto" if isinstance(choose_form(layout, device, dtype, "packed").form, Unpacked) else "packed"


def choose(layout: Layout, device: torch.device, dtype: torch.dtype) -> Choice:
    """The form in which an engine serves a matrix; see `choose_form`."""
    return choose_form(layout, device, dtype, served_in(layout, device, dtype))


def choose_all(matrices: Mapping[str, Layout], device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """The form in which an engine serves each packed matrix of a checkpoint: as one with its neighbours."""
    groups: list[list[str]] = []
    before = None
    for name in sorted(matrices, key=_place):
        place = _place(name)
        follows = before is not None and before[:2] == place[:2] and before[2] + 1 == place[2]
        if not (follows and can_stack(matrices[groups[-1][-1]], matrices[name])):
            groups.append([])
        groups[-1].append(name)
        before = place
    choices = (choose(stacked([matrices[name] for name in group]), device, dtype) for group in groups)
    return {name: choice for group, choice in zip(groups, choices, strict=True) for name in group}


def _place(name: str) -> tuple[str, str, int]:
    """The module that a matrix is in, the layer of vLLM there, and its part of this layer."""
    parent, _, last = name.rpartition(".")
    fused = next((names for names in _FUSED if last in names), (last,))
    return parent, fused[0], fused.index(last)


def _filled(name: str, layouts: Mapping[str, Layout | None], shape: Shape) -> list[_Shard]:
    """Which parts of the layer each matrix fills: one each, or as many as its rows take."""
    shards, part, count = [], 0, len(shape.outputs)
    for matrix, layout, parts in zip(layouts, layouts.values(), _counts(list(layouts.values()), shape), strict=True):
        filled = range(part, min(part + parts, count))
        wanted = _rows(shape, filled), shape.inputs[0]
        if part + parts > count or (layout is not None and layout.shape != wanted):
            raise _misfit(matrix, layout.shape if layout else None, name, wanted, shape.ranks)
        shards.append(_Shard(matrix, layout, tuple(filled)))
        part += parts
    return shards


def _counts(layouts: list[Layout | None], shape: Shape) -> list[int]:
    """How many parts each matrix fills; what is left is for the only dense one, or else for the last."""
    counts, spare = [1] * len(layouts), len(shape.outputs) - len(layouts)
    if spare <= 0:
        return counts
    elastic = layouts.index(None) if layouts.count(None) == 1 else len(layouts) - 1
    sizes = [whole for whole, _ in shape.outputs]
    for numbers, outputs in ((range(elastic), sizes), (range(len(layouts) - 1, elastic, -1), sizes[::-1])):
        place = 0
        for number in numbers:
            layout = layouts[number]
            while layout is not None and spare and sum(outputs[place : place + counts[number]]) < layout.shape[0]:
                counts[number], spare = counts[number] + 1, spare - 1
            place += counts[number]
    counts[elastic] += spare
    return counts


def _misfit(matrix: str, found: tuple[int, ...] | None, layer: str, wanted: tuple[int, int], ranks: int) -> ModelError:
    what = "dense" if found is None else " x ".join(map(str, found))
    return ModelError(
        f"the checkpoint has {matrix} as {what}; {layer} has room for {wanted[0]} x {wanted[1]}",
        expected="the model that was packed",
        fix="serve config.json and weights from the same folder"
        + ("; some layers of vLLM are wider on several ranks: try one (-tp 1)" if ranks > 1 else ""),
    )


def _rows(shape: Shape, parts: Sequence[int]) -> int:
    return sum(shape.outputs[part][0] for part in parts)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _owned(cut: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a cut, copied where they would keep the memory of the whole."""
    return {
        name: tensor if tensor.numel() == whole[name].numel() else tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in cut.items()
    }


def _require_finite(name: str, packed: Packed) -> None:
    for suffix, tensor in packed.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"{name}.{suffix} has values that are NaN or infinite in {tensor.dtype}",
                expected="finite weights",
                fix="serve it in the checkpoint's own dtype, or pack the dense checkpoint again",
            )
