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
from llmprune.storage.formats.parts import Packed, can_stack, cut_columns, cut_rows, share, stack

# How vLLM names the parts of a fused layer: by number, q, k and v by letter, several as a tuple, and all as None.
ShardId = str | int | tuple[int, ...] | None

_LETTERS = ("q", "k", "v")


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
        whole = _packed(shard).require()
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


def _filled(name: str, layouts: Mapping[str, Layout | None], shape: Shape) -> list[_Shard]:
    """Which parts of the layer each matrix fills: one each, or as many as its rows take."""
    shards, part, count = [], 0, len(shape.outputs)
    for number, (matrix, layout) in enumerate(layouts.items()):
        last = part + 1
        if number + 1 == len(layouts):
            last = count
        elif layout is not None and len(layouts) < count:
            while last < count and _rows(shape, range(part, last)) < layout.shape[0]:
                last += 1
        wanted = _rows(shape, range(part, last)), shape.inputs[0]
        if part >= count or (layout is not None and layout.shape != wanted):
            found = f"{layout.shape[0]} x {layout.shape[1]}" if layout else "dense"
            raise ModelError(
                f"config.json packs {matrix} as {found}; {name} has room for {wanted[0]} x {wanted[1]}",
                expected="the model that was packed",
                fix="serve config.json and weights from the same folder",
            )
        shards.append(_Shard(matrix, layout, tuple(range(part, last))))
        part = last
    return shards


def _rows(shape: Shape, parts: Sequence[int]) -> int:
    return sum(shape.outputs[part][0] for part in parts)


def _packed(shard: _Shard) -> Packed:
    if shard.layout is not None:
        return Packed(shard.layout, shard.arrived)
    rows, columns = shard.arrived["weight"].shape
    return Packed(DenseLayout((rows, columns)), shard.arrived)


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
