"""What is passed between decoder layers: hidden states (in CPU memory up to a budget, then on disk), and the rest."""

import copy
import math
import shutil
import tempfile
import weakref
from collections import UserDict
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
    """One tensor [samples, length, hidden] per batch, replaced in place as the stream advances.

    Args:
        budget_bytes: limit on CPU memory; batches that do not fit are kept in a temporary folder.
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
        # The first batches that fit stay in memory: every layer visits all batches in order, so none is worth more than
        # another, and evicting the least recently used one would always evict the one that is needed next.
        taken = sum(t.nbytes for key, t in self._resident.items() if key != batch)
        if taken + hidden.nbytes <= self._budget:
            self._resident[batch] = hidden
            self._on_disk.discard(batch)
        else:
            self._resident.pop(batch, None)
            self._write(self._file(batch), hidden)
            self._on_disk.add(batch)

    def copy(self) -> "HiddenStates":
        """The same states with a budget of their own; replacing one in either copy does not affect the other."""
        other = HiddenStates(self._budget)
        for batch in sorted({*self._resident, *self._on_disk}):
            other[batch] = self[batch]
        return other

    @property
    def resident_bytes(self) -> int:
        """Bytes held in memory."""
        return sum(hidden.nbytes for hidden in self._resident.values())

    def _file(self, batch: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="llmprune-hidden-"))
            # Removed with the last reference, or at exit; TemporaryDirectory would warn about that.
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"{batch}.safetensors"

    def _write(self, file: Path, hidden: Tensor) -> None:
        try:
            save_file({"hidden": hidden.contiguous()}, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"hidden states cannot be written to {file.parent}: {error}",
                expected=f"disk space for what exceeds activation_budget ({self._budget} bytes)",
                fix="raise activation_budget, or set the environment variable TMPDIR to a folder with more space",
            ) from error


@dataclass(frozen=True, slots=True)
class _Link:
    """A placeholder for what a layer returns, in the recorded call of a later layer."""

    layer: int
    leaf: int


class LayerCalls:
    """What the model passes to each decoder layer in addition to the hidden states, for each batch.

    Most of it is the same for every batch (masks, rotary embeddings): equal tensors are stored once. Some layers return
    more than hidden states, and the model passes that to a later layer; such a value is known once its layer has run.

    Args:
        device: where the layers run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # (Layer, batch) -> arguments, with links in place of what layers return.
        self._calls: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        # For the current batch: id of an object that the model passed -> that object, kept alive so that its id is not
        # reused, and our copy of it.
        self._seen: dict[int, tuple[object, Any]] = {}
        # (Shape, dtype) -> all distinct tensors of that kind.
        self._known: dict[tuple[object, ...], list[Tensor]] = {}
        # What a layer returns besides hidden states, as zeros that take no memory, and the structure of its output.
        self._returned: list[Any] = []
        self._structure: Any = None
        # The last layer that needs what a layer returned; until then it is carried, per batch.
        self._last_use: dict[_Link, int] = {}
        self._carried: dict[tuple[_Link, int], Any] = {}

    def learn(self, output: Any) -> None:
        """Learn from one layer's output what layers return besides the hidden states, and in what structure."""
        (_, *beside), self._structure = tree_flatten(output)
        self._returned = [_filled(value, 0) for value in beside]

    def stand_in(self, layer: int, hidden: Tensor) -> Any:
        """The output that the model gets for a layer that did not run: `hidden`, and values whose use is detectable."""
        beside = [_filled(value, _unusable(value)) for value in self._returned]
        self._seen.update({id(v): (v, _Link(layer, leaf)) for leaf, v in enumerate(beside) if isinstance(v, Tensor)})
        return tree_unflatten([hidden, *beside], self._structure)

    def record(self, layer: int, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record one call; `args` without the hidden states.

        Raises:
            ModelError: the model computes something from what a layer returns besides the hidden states.
        """
        call = tuple(map(self._share, args)), {key: self._share(value) for key, value in kwargs.items()}
        self._calls[layer, batch] = call
        self._last_use.update(dict.fromkeys(_leaves(call, _Link), layer))

    def get(self, layer: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call; zeros replace what a layer that has not run yet will return."""
        args, kwargs = self._calls[layer, batch]
        return self._resolve(args, batch), {key: self._resolve(value, batch) for key, value in kwargs.items()}

    def carry(self, layer: int, batch: int, output: Any) -> Tensor:
        """Keep what a later layer needs of a layer's output; returns the hidden states."""
        hidden, *beside = tree_leaves(output)
        for leaf, value in enumerate(beside):
            if (link := _Link(layer, leaf)) in self._last_use:
                self._carried[link, batch] = value.cpu() if isinstance(value, Tensor) else value
        for link in [link for link, last in self._last_use.items() if last <= layer]:
            self._carried.pop((link, batch), None)
        return hidden

    def fork(self) -> "LayerCalls":
        """The same calls for another model: its layers return other values, and write others into mappings.

        All tensors that are there by now are shared.
        """
        other, copies = copy.copy(self), dict[int, Any]()
        other._calls = {
            key: (_forked(args, copies), _forked(kwargs, copies)) for key, (args, kwargs) in self._calls.items()
        }
        other._carried = dict(self._carried)
        return other

    def end_batch(self) -> None:
        """Forget the identities of the objects of the batch that has ended."""
        self._seen.clear()

    @property
    def linked(self) -> bool:
        """Whether a layer reads what an earlier one returns besides hidden states."""
        return bool(self._last_use)

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
        """A copy of `value` on the device that shares equal tensors with other copies."""
        # All layers of a batch are passed the same objects: copying each once is enough, and what one layer writes into
        # a mapping reaches the later ones.
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
                "the model computes something from what a decoder layer returns besides its hidden states",
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


def _forked(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of nested containers with the same leaves; `copies`, by id, so that what was one mapping stays one."""
    if not isinstance(value, dict | list | tuple | UserDict):
        return value
    if id(value) not in copies:
        if isinstance(value, UserDict):  # in transformers: keys and values that layers share
            copies[id(value)] = copy.copy(value)
        elif isinstance(value, dict):
            copies[id(value)] = {key: _forked(item, copies) for key, item in value.items()}
        else:
            copies[id(value)] = type(value)(_forked(item, copies) for item in value)
    return copies[id(value)]


def _leaves(tree: Any, kind: type) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, kind)]


def _filled(value: Any, number: float) -> Any:
    """A tensor of the same shape filled with one number, taking no memory; other values are returned unchanged."""
    return value.new_full((), number).expand(value.shape) if isinstance(value, Tensor) else value


def _unusable(value: Any) -> float:
    """A number that is recognisable in anything computed from it, as far as the dtype has one."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return 0
    return math.nan if value.is_floating_point() or value.is_complex() else torch.iinfo(value.dtype).min


def _is_unusable(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())
