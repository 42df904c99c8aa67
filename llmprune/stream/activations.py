"""What flows between decoder layers: hidden states, in CPU memory up to a budget on disk beyond it, and the rest."""

import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from llmprune.errors import CheckpointError, ModelError


class HiddenStates:
    """One tensor [samples, length, hidden] per batch, replaced in place as the stream moves on.

    Args:
        budget_bytes: what may stay in CPU memory; batches that do not fit live in a temporary folder.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._resident: dict[int, Tensor] = {}
        self._on_disk: set[int] = set()
        self._folder: Path | None = None

    def __len__(self) -> int:
        return len(self._resident) + len(self._on_disk)

    def __getitem__(self, batch: int) -> Tensor:
        if batch in self._resident:
            return self._resident[batch]
        return load_file(self._file(batch))["hidden"]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        hidden = hidden.detach().to("cpu")
        # First come, first kept: every layer visits all batches in order, so no batch is worth more than another, and
        # throwing out the least recent one would always throw out the next to be asked for.
        taken = sum(t.nbytes for key, t in self._resident.items() if key != batch)
        if taken + hidden.nbytes <= self._budget:
            self._resident[batch] = hidden
            self._on_disk.discard(batch)
        else:
            self._resident.pop(batch, None)
            self._write(self._file(batch), hidden)
            self._on_disk.add(batch)

    def copy(self) -> "HiddenStates":
        """The same states under a budget of their own; replacing one in either leaves the other as it is."""
        other = HiddenStates(self._budget)
        for batch in range(len(self)):
            other[batch] = self[batch]
        return other

    @property
    def resident_bytes(self) -> int:
        """Bytes held in memory."""
        return sum(hidden.nbytes for hidden in self._resident.values())

    def _file(self, batch: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="llmprune-hidden-"))
            # Goes with the last reference, or with the process; TemporaryDirectory would warn about that.
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"{batch}.safetensors"

    def _write(self, file: Path, hidden: Tensor) -> None:
        try:
            save_file({"hidden": hidden.contiguous()}, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"hidden states cannot be written to {file.parent}: {error}",
                expected=f"room for what exceeds activation_budget ({self._budget} bytes)",
                fix="raise activation_budget, or set the environment variable TMPDIR to a folder with more space",
            ) from error


@dataclass(frozen=True, slots=True)
class _Link:
    """Stands for what a layer returns, in the recorded call of a later one."""

    layer: int
    leaf: int


class LayerCalls:
    """What the model hands to each decoder layer beside the hidden states, for each batch.

    Most of it is the same for every batch (masks, rotary embeddings): equal tensors are stored once. Some layers return
    more than hidden states, and the model hands that to a later layer; such a value is known when its layer has run.

    Args:
        device: where the layers run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # (Layer, batch) -> arguments, with links in the place of what layers return.
        self._calls: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        # Of the batch at hand: id of an object that the model handed over -> that object, which keeps the id from being
        # used again, and our copy of it.
        self._seen: dict[int, tuple[object, Any]] = {}
        # (Shape, dtype) -> all different tensors of that kind.
        self._known: dict[tuple[object, ...], list[Tensor]] = {}
        # What a layer returns beside hidden states, as zeros without memory, and the form of its output.
        self._returned: list[Any] = []
        self._structure: Any = None
        # Which layer is the last to want what a layer returned; until then it is carried, per batch.
        self._last_use: dict[_Link, int] = {}
        self._carried: dict[tuple[_Link, int], Any] = {}

    def learn(self, output: Any) -> None:
        """Learn from one layer's output what layers return around and beside the hidden states."""
        (_, *beside), self._structure = tree_flatten(output)
        self._returned = [_filled(value, 0) for value in beside]

    def stand_in(self, layer: int, hidden: Tensor) -> Any:
        """What the model gets as output of a layer that did not run: `hidden`, and nothing that it can compute with."""
        beside = [_filled(value, _unusable(value)) for value in self._returned]
        self._seen.update({id(v): (v, _Link(layer, leaf)) for leaf, v in enumerate(beside) if isinstance(v, Tensor)})
        return tree_unflatten([hidden, *beside], self._structure)

    def record(self, layer: int, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember one call; `args` without the hidden states.

        Raises:
            ModelError: the model computes something from what a layer returns beside the hidden states.
        """
        call = tuple(map(self._share, args)), {key: self._share(value) for key, value in kwargs.items()}
        self._calls[layer, batch] = call
        self._last_use.update(dict.fromkeys(_leaves(call, _Link), layer))

    def get(self, layer: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call; zeros stand in for what a layer that has not run yet will return."""
        args, kwargs = self._calls[layer, batch]
        return self._resolve(args, batch), {key: self._resolve(value, batch) for key, value in kwargs.items()}

    def carry(self, layer: int, batch: int, output: Any) -> Tensor:
        """Keep what a later layer wants of a layer's output; returns the hidden states."""
        hidden, *beside = tree_leaves(output)
        for leaf, value in enumerate(beside):
            if (link := _Link(layer, leaf)) in self._last_use:
                self._carried[link, batch] = value.cpu() if isinstance(value, Tensor) else value
        for link in [link for link, last in self._last_use.items() if last <= layer]:
            self._carried.pop((link, batch), None)
        return hidden

    def end_batch(self) -> None:
        """Forget the identities of the objects of the batch that ends."""
        self._seen.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held by the stored tensors."""
        tensors = {id(t): t for t in _leaves((list(self._calls.values()), list(self._carried.values())), Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _resolve(self, value: Any, batch: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._resolve(item, batch) for item in value)
        if isinstance(value, dict) and _leaves(value, _Link):
            return {key: self._resolve(item, batch) for key, item in value.items()}
        if not isinstance(value, _Link):
            return value
        value = self._carried.get((value, batch), self._returned[value.leaf])
        return value.to(self._device) if isinstance(value, Tensor) else value

    def _share(self, value: Any) -> Any:
        """A copy of `value` on the device that has all its equal tensors in common with others."""
        # The layers of one batch are handed the same objects: looking at each once is enough, and what one layer writes
        # into a mapping reaches the later ones.
        if id(value) not in self._seen and isinstance(value, Tensor | dict | list | tuple):
            self._seen[id(value)] = value, self._copy(value)
        return self._seen[id(value)][1] if id(value) in self._seen else value

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._shared_tensor(value)
        if isinstance(value, dict):
            return {key: self._share(item) for key, item in value.items()}
        return tuple(map(self._share, value)) if isinstance(value, tuple) else list(map(self._share, value))

    def _shared_tensor(self, tensor: Tensor) -> Tensor:
        if _leaves(self._returned, Tensor) and _is_unusable(tensor):
            raise ModelError(
                "the model computes something from what a decoder layer returns beside its hidden states",
                expected="layers whose outputs reach later layers unchanged",
                fix="this architecture cannot be streamed layer by layer",
            )
        candidates = self._known.setdefault((tuple(tensor.shape), tensor.dtype), [])
        here = tensor.detach().to(self._device)
        for known in candidates:
            if torch.equal(known, here):
                return known
        candidates.append(here)
        return here


def _leaves(tree: Any, kind: type) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, kind)]


def _filled(value: Any, number: float) -> Any:
    """A tensor of the same form in no memory, every element the same; other things as they are."""
    return value.new_full((), number).expand(value.shape) if isinstance(value, Tensor) else value


def _unusable(value: Any) -> float:
    """A number that gives away whatever is computed from it, as far as the dtype has one."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return 0
    return math.nan if value.is_floating_point() or value.is_complex() else torch.iinfo(value.dtype).min


def _is_unusable(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())
