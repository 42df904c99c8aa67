"""Remove groups from a decoder layer: physically, or as zeros with the same effect at full size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.errors import ModelError, PatternError
from llmprune.structures.find.discovery import Structure


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The groups to remove from one structure.

    Attributes:
        structure: one that is not refused.
        removed: distinct groups in [0, structure.groups), not all of them, and equally many from each partition.

    Raises:
        ModelError: the structure is refused.
        PatternError: the groups are out of range, repeated, all of them, or unevenly spread over the partitions.
    """

    structure: Structure
    removed: tuple[int, ...]

    def __post_init__(self) -> None:
        structure = self.structure
        if structure.refusal is not None:
            raise ModelError(
                f"groups of {structure.consumer} cannot be removed: {structure.refusal}",
                fix="leave this structure out of the recipe",
            )
        known = set(range(structure.groups))
        if len(set(self.removed)) < len(self.removed) or not set(self.removed) < known:
            raise PatternError(
                f"{len(self.removed)} groups of {structure.consumer} are to be removed: {list(self.removed)[:8]}",
                expected=f"distinct numbers below {structure.groups}, and not all of them",
            )
        length = structure.groups // structure.partitions
        counts = {sum(group // length == run for group in self.removed) for run in range(structure.partitions)}
        if len(counts) > 1:
            raise PatternError(
                f"{min(counts)} to {max(counts)} of each {length} groups of {structure.consumer} are to be removed",
                expected=f"the same number of each {length} consecutive groups, which share a KV head",
            )

    @property
    def kept(self) -> int:
        """How many groups are kept."""
        return self.structure.groups - len(self.removed)


def shrink(tensors: Mapping[str, Tensor], cuts: Sequence[Cut]) -> dict[str, Tensor]:
    """Remove groups from the tensors of one decoder layer.

    Args:
        tensors: name inside the layer -> tensor at full size, parameters and saved buffers.
        cuts: of this layer; their indices refer to the full size, so all are applied at once.

    Returns:
        All tensors; those that shrink are new, the others are the same objects.

    Raises:
        ModelError: a tensor that must shrink is missing or too small.
    """
    result = dict(tensors)
    for (name, dim), gone in removed_indices(cuts).items():
        if name not in result or result[name].shape[dim] <= max(gone):
            shape = list(result[name].shape) if name in result else "no tensor"
            raise ModelError(f"{name}: {shape}, but index {max(gone)} of its dimension {dim} is to be removed")
        kept = torch.ones(result[name].shape[dim], dtype=torch.bool)
        kept[list(gone)] = False
        index = kept.nonzero().view(-1).to(result[name].device)
        result[name] = result[name].index_select(dim, index)
    return result


def removed_indices(cuts: Iterable[Cut]) -> dict[tuple[str, int], set[int]]:
    """(Tensor name, dimension) -> the indices to remove."""
    gone: dict[tuple[str, int], set[int]] = {}
    for cut in cuts:
        for part in cut.structure.slices:
            gone.setdefault((part.name, part.dim), set()).update(part.index[list(cut.removed)].flatten().tolist())
    return {key: indices for key, indices in gone.items() if indices}


def mask(layer: nn.Module, cut: Cut) -> None:
    """Zero, in place, everything that belongs to the removed groups; the layer then computes what the shrunk one will.

    For experts this only holds inside `routed_without`: zeros do not stop tokens from being routed to an expert.

    Args:
        layer: the decoder layer at full size.
        cut: what to remove.
    """
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        for (name, dim), gone in removed_indices([cut]).items():
            state[name].index_fill_(dim, torch.tensor(sorted(gone), device=state[name].device), 0)


@contextmanager
def routed_without(layer: nn.Module, cut: Cut) -> Iterator[None]:
    """Let a layer at full size route its tokens as if the removed experts did not exist.

    Args:
        layer: a decoder layer in memory.
        cut: of a structure of kind "experts".
    """
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    own = [part for part in cut.structure.slices if part.index.shape[1] == 1 and part.dim == 0]
    gone = list(cut.removed)
    weights = {state[part.name].data_ptr() for part in own if state[part.name].dim() == 2}
    # A bias that is used only for selecting experts takes part in no matmul.
    biases = {part.name: state[part.name].detach().clone() for part in own if state[part.name].dim() == 1}
    with torch.no_grad():
        for name in biases:
            state[name][gone] = -torch.inf
    try:
        with _Without(weights, gone):
            yield
    finally:
        with torch.no_grad():
            for name, before in biases.items():
                state[name].copy_(before)


class _Without(TorchFunctionMode):
    """Gives the removed experts a router score of -inf."""

    def __init__(self, weights: set[int], gone: list[int]) -> None:
        super().__init__()
        self._weights, self._gone = weights, gone

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self._weights:
            result = result.clone()
            result[..., self._gone] = -torch.inf
        return result
