"""Which form will serve each matrix of a checkpoint on a device, why not a faster one, and what that is worth.

Read from config.json, the headers of the weights and bench.json alone: no weight is loaded. `limit` is how many times
fewer bytes of weights a token reads than with dense weights, which is what bounds decode; `gains` is what
`llmprune bench` has measured.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.measuring.bench.machine import device_name
from llmprune.measuring.bench.record import BENCH_NAME, gains, read_results
from llmprune.precision import dtype_name
from llmprune.serving.forms import Choice, Form, choose_form
from llmprune.storage.files import Stored, read_index, read_json
from llmprune.storage.formats import Layout
from llmprune.storage.packed_config import PackedWeight, as_dense, packed_layouts

# Refusals that only say that another layout is meant; and what to say where nothing else is left.
_OTHER_LAYOUTS = ("not 2:4", "not block-sparse")
_NO_KERNEL = {
    "nm": "only 2:4 has a kernel",
    "bitmask": "no kernel gains from zeros that lie anywhere: it is smaller on disk only",
    "dense": "stored as an ordinary weight",
}

_LOOKED_UP = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|embed_positions)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_NUMBERED = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One packed matrix.

    Attributes:
        name: of the linear layer.
        layout: as config.json describes it.
        dtype: of the weights, as torch names it.
        form: what will serve it.
        reason: why not a faster form; empty where there is none.
        refused: (form, reason) of all forms before it.
        dense_bytes: size of the dense matrix.
        packed_bytes: size on disk.
        served_bytes: size in memory, which is what a token reads.
        gains: (tokens, times as fast as the dense product) where it was measured on this device.
    """

    name: str
    layout: dict[str, Any]
    dtype: str
    form: str
    reason: str
    refused: tuple[tuple[str, str], ...]
    dense_bytes: int
    packed_bytes: int
    served_bytes: int
    gains: tuple[tuple[int, float], ...]

    @property
    def limit(self) -> float:
        """By what factor decode can become faster at most."""
        return self.dense_bytes / max(self.served_bytes, 1)


@dataclass(frozen=True, slots=True)
class DenseRow:
    """One matrix that is stored as it is.

    Attributes:
        name: of the tensor.
        shape: its dimensions.
        bytes: its size.
        reason: why it is not packed.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a checkpoint will do on a device.

    Attributes:
        folder: of the checkpoint.
        device: its name.
        packed: a row for each packed matrix.
        dense: a row for each other tensor of two or more dimensions.
        token_bytes: what a decoded token reads of all weights: (with dense weights, as served).
        measured: when this device was measured; None: not yet.
    """

    folder: str
    device: str
    packed: tuple[PackedRow, ...]
    dense: tuple[DenseRow, ...]
    token_bytes: tuple[int, int]
    measured: str | None

    @property
    def limit(self) -> float:
        """By what factor the decode of the whole model can become faster at most."""
        return self.token_bytes[0] / max(self.token_bytes[1], 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        packed = [{**asdict(row), "limit": row.limit} for row in self.packed]
        return {**asdict(self), "packed": packed, "limit": self.limit}


def explain(folder: Path, device: torch.device) -> Explanation:
    """Say what will serve a checkpoint on a device.

    Args:
        folder: a local checkpoint, packed or not.
        device: where it would be loaded.

    Raises:
        CheckpointError: config.json, a header or bench.json cannot be read.
        FormatError: config.json names a layout that cannot be read.
    """
    config = read_json(folder / "config.json")
    layouts = packed_layouts(config)
    tensors = as_dense(read_index(folder), layouts)
    name = device_name(device)
    result = read_results(folder / BENCH_NAME).get(name, {})
    packed = tuple(
        _packed_row(stored, device, result) for stored in tensors.values() if isinstance(stored, PackedWeight)
    )
    others = {key: stored for key, stored in tensors.items() if isinstance(stored, Stored)}
    dense = tuple(_dense_rows(others, packed=bool(packed)))
    read_anyway = _read_by_each_token(others)
    token_bytes = (
        read_anyway + sum(row.dense_bytes for row in packed),
        read_anyway + sum(row.served_bytes for row in packed),
    )
    return Explanation(str(folder), name, packed, dense, token_bytes, result.get("finished"))


def served_bytes(form: Form, layout: Layout, dtype: torch.dtype) -> int:
    """What a form holds of a matrix, in bytes."""
    if form.name == "dense":
        return layout.shape[0] * layout.shape[1] * dtype.itemsize
    specs = layout.tensors().items()
    stored = {suffix: torch.empty(spec.shape, dtype=spec.dtype or dtype, device="meta") for suffix, spec in specs}
    return sum(tensor.nbytes for tensor in form.build(layout, stored).values())


def _packed_row(stored: PackedWeight, device: torch.device, result: Mapping[str, Any]) -> PackedRow:
    layout, name = stored.layout, stored.key.removesuffix(".weight")
    choice = choose_form(layout, device, stored.dtype)
    return PackedRow(
        name=name,
        layout=layout.to_dict(),
        dtype=dtype_name(stored.dtype),
        form=choice.form.name,
        reason=why_not_faster(choice, layout),
        refused=choice.refused,
        dense_bytes=stored.nbytes,
        packed_bytes=stored.packed_bytes,
        served_bytes=served_bytes(choice.form, layout, stored.dtype),
        gains=gains(dict(result), name, layout.to_dict()),
    )


def _dense_rows(tensors: Mapping[str, Stored], *, packed: bool) -> Iterator[DenseRow]:
    for key, stored in tensors.items():
        if len(stored.shape) > 1 and stored.dtype.is_floating_point:
            yield DenseRow(key, stored.shape, stored.nbytes, _dense_reason(key, stored, packed))


def _dense_reason(key: str, stored: Stored, packed: bool) -> str:
    if _LOOKED_UP.search(key):
        return "embeddings are looked up, not multiplied"
    if _HEAD.search(key):
        return "the head is never pruned unless a recipe says so"
    if not _NUMBERED.search(key):
        return "not in a decoder layer"
    if len(stored.shape) > 2:
        return "no linear layer: experts or filters in one tensor"
    if not packed:
        return "the checkpoint is not packed, and zeros in a dense tensor are multiplied like any other number"
    return "not packed: `llmprune inspect` names the pattern of its zeros, if there is one"


def _read_by_each_token(tensors: Mapping[str, Stored]) -> int:
    """Bytes of the tensors that are not packed; of embeddings only where they are the head as well."""
    tied = not any(_HEAD.search(key) for key in tensors)
    return sum(
        stored.nbytes
        for key, stored in tensors.items()
        if not _LOOKED_UP.search(key) or (tied and "pos" not in key and "wpe" not in key)
    )


def why_not_faster(choice: Choice, layout: Layout) -> str:
    """The refusals that concern this layout, joined; empty where the matrix is served by the kernel made for it."""
    if choice.form.name in ("fragments", "blocks"):
        return ""
    own = dict.fromkeys(reason for _, reason in choice.refused if reason not in _OTHER_LAYOUTS)
    return "; ".join(own) or _NO_KERNEL.get(layout.name, "")
