"""Hidden states between decoder layers: in CPU memory up to a budget, on disk beyond it."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class HiddenStates:
    """One tensor [samples, length, hidden] per batch, replaced in place as the stream moves on.

    Args:
        budget_bytes: what may stay in CPU memory; batches that do not fit live in a temporary folder.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._resident: dict[int, Tensor] = {}
        self._on_disk: set[int] = set()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._resident) + len(self._on_disk)

    def __getitem__(self, batch: int) -> Tensor:
        if batch in self._resident:
            return self._resident[batch]
        return load_file(self._file(batch))["hidden"]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        hidden = hidden.detach().to("cpu")
        taken = sum(t.nbytes for key, t in self._resident.items() if key != batch)
        if taken + hidden.nbytes <= self._budget:
            self._resident[batch] = hidden
            self._on_disk.discard(batch)
        else:
            self._resident.pop(batch, None)
            save_file({"hidden": hidden.contiguous()}, self._file(batch))
            self._on_disk.add(batch)

    @property
    def resident_bytes(self) -> int:
        """Bytes held in memory."""
        return sum(hidden.nbytes for hidden in self._resident.values())

    def _file(self, batch: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="llmprune-hidden-")
        return Path(self._folder.name) / f"{batch}.safetensors"


class LayerCalls:
    """The arguments, other than the hidden states, with which the model calls each decoder layer for each batch.

    Most are the same for every batch (masks, rotary embeddings): equal tensors are stored once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: dict[tuple[object, ...], list[Tensor]] = {}

    def record(self, layer: int, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember one call; `args` without the hidden states."""
        self._calls[layer, batch] = self._share(args), self._share(kwargs)

    def get(self, layer: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call."""
        return self._calls[layer, batch]

    def end_batch(self) -> None:
        """Forget the identities of the tensors of the batch that ends."""
        self._moved.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held by the stored tensors."""
        return sum(t.nbytes for tensors in self._known.values() for t in tensors)

    def _share(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._shared_tensor(value)
        if isinstance(value, dict):
            return {key: self._share(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._share(item) for item in value)
        return value

    def _shared_tensor(self, tensor: Tensor) -> Tensor:
        # The layers of one batch are handed the same object; comparing it by value once is enough.
        if id(tensor) in self._moved:
            return self._moved[id(tensor)][1]
        candidates = self._known.setdefault((tuple(tensor.shape), tensor.dtype), [])
        here = tensor.detach().to(self._device)
        for known in candidates:
            if torch.equal(known, here):
                here = known
                break
        else:
            candidates.append(here)
        self._moved[id(tensor)] = tensor, here
        return here
