"""Which kernel runs each weight matrix of a checkpoint on a device, why no faster one does, and what it can gain.

Only config.json, the headers of the weights and bench.json are read: no weight is loaded. `limit` is the maximum
speed-up of decode, which is bound by the bytes of weights that a token reads: those of the dense weights divided by
those as served. `gains` are the speed-ups that `llmprune bench` has measured.
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
from llmprune.serving.cpu_forms import NOT_A_CPU, NOT_INT8, NOT_TWO_OF_FOUR, NOT_UNSTRUCTURED
from llmprune.serving.forms import NOT_A_GPU, Choice, Form, choose_form
from llmprune.storage.files import Stored, read_index, read_json
from llmprune.storage.formats import Layout
from llmprune.storage.packed_config import PackedWeight, as_dense, is_uneven, packed_layouts
from llmprune.vllm_plugin.assembly import choose_all

# Refusals that only say that a kernel is for another layout or kind of device, and what to say if no other is left.
_OTHERS = (NOT_TWO_OF_FOUR, NOT_UNSTRUCTURED, NOT_INT8, "not block-sparse", NOT_A_CPU, NOT_A_GPU)
_NO_KERNEL = {
    "nm": "only 2:4 has a kernel",
    "bitmask": "no GPU kernel gains from unstructured zeros: there it only saves disk space",
    "int8-nm": "only a CPU has a kernel for 8-bit weights; elsewhere they only save disk space",
    "int8-bitmask": "only a CPU has a kernel for 8-bit weights; elsewhere they only save disk space",
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
        form: the form in which it will be served, which decides the kernel.
        reason: why no faster form; empty if there is none.
        refused: (form, reason) of all forms that would have been preferred.
        dense_bytes: size of the dense matrix.
        packed_bytes: size on disk.
        served_bytes: size in memory, which is what a token reads.
        gains: (tokens, speed-up over the dense matmul) as measured on this device.
        vllm: the form in which the plug-in for vLLM serves it.
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
    vllm: str

    @property
    def limit(self) -> float:
        """The maximum speed-up of decode."""
        return self.dense_bytes / max(self.served_bytes, 1)


@dataclass(frozen=True, slots=True)
class DenseRow:
    """One matrix that is stored dense.

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
    """How a checkpoint will be served on a device.

    Attributes:
        folder: of the checkpoint.
        device: its name.
        packed: one row per packed matrix.
        dense: one row per other tensor of two or more dimensions.
        token_bytes: bytes of all weights that a decoded token reads: (with dense weights, as served).
        measured: when this device was measured; None: not yet.
        uneven: whether decoder layers differ in size or lack a block.
    """

    folder: str
    device: str
    packed: tuple[PackedRow, ...]
    dense: tuple[DenseRow, ...]
    token_bytes: tuple[int, int]
    measured: str | None
    uneven: bool

    @property
    def limit(self) -> float:
        """The maximum speed-up of decode of the whole model."""
        return self.token_bytes[0] / max(self.token_bytes[1], 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        packed = [{**asdict(row), "limit": row.limit} for row in self.packed]
        return {**asdict(self), "packed": packed, "limit": self.limit}


def explain(folder: Path, device: torch.device) -> Explanation:
    """Determine which kernel runs each matrix of a checkpoint on a device.

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
    weights = [stored for stored in tensors.values() if isinstance(stored, PackedWeight)]
    in_vllm: dict[str, Choice] = {}
    for dtype in {stored.dtype for stored in weights}:
        in_vllm |= choose_all({_name(one): one.layout for one in weights if one.dtype == dtype}, device, dtype)
    packed = tuple(_packed_row(stored, device, result, in_vllm[_name(stored)]) for stored in weights)
    others = {key: stored for key, stored in tensors.items() if isinstance(stored, Stored)}
    dense = tuple(_dense_rows(others, packed=bool(packed)))
    read_anyway = _read_by_each_token(others)
    token_bytes = (
        read_anyway + sum(row.dense_bytes for row in packed),
        read_anyway + sum(row.served_bytes for row in packed),
    )
    return Explanation(str(folder), name, packed, dense, token_bytes, result.get("finished"), is_uneven(config))


def served_bytes(form: Form, layout: Layout, dtype: torch.dtype) -> int:
    """The size of a matrix in memory when served in a form, in bytes."""
    if form.name == "dense":
        return layout.shape[0] * layout.shape[1] * dtype.itemsize
    specs = layout.tensors().items()
    stored = {suffix: torch.empty(spec.shape, dtype=spec.dtype or dtype, device="meta") for suffix, spec in specs}
    return sum(tensor.nbytes for tensor in form.build(layout, stored).values())


def _name(stored: PackedWeight) -> str:
    return stored.key.removesuffix(".weight")


def _packed_row(stored: PackedWeight, device: torch.device, result: Mapping[str, Any], in_vllm: Choice) -> PackedRow:
    layout, name = stored.layout, _name(stored)
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
        vllm=in_vllm.form.name,
    )


def _dense_rows(tensors: Mapping[str, Stored], *, packed: bool) -> Iterator[DenseRow]:
    for key, stored in tensors.items():
        if len(stored.shape) > 1 and stored.dtype.is_floating_point:
            yield DenseRow(key, stored.shape, stored.nbytes, _dense_reason(key, stored, packed))


def _dense_reason(key: str, stored: Stored, packed: bool) -> str:
    if _LOOKED_UP.search(key):
        return "embeddings are looked up, not multiplied"
    if _HEAD.search(key):
        return "the LM head is never pruned"
    if not _NUMBERED.search(key):
        return "not in a decoder layer"
    if len(stored.shape) > 2:
        return "not a linear layer: experts or filters in one tensor"
    if not packed:
        return "the checkpoint is not packed, and zeros in a dense tensor are multiplied like any other number"
    return "not packed: `llmprune inspect` shows whether its zeros have a pattern"


def _read_by_each_token(tensors: Mapping[str, Stored]) -> int:
    """Bytes of the tensors that are not packed; embeddings count only if they are tied to the LM head."""
    tied = not any(_HEAD.search(key) for key in tensors)
    return sum(
        stored.nbytes
        for key, stored in tensors.items()
        if not _LOOKED_UP.search(key) or (tied and "pos" not in key and "wpe" not in key)
    )


def why_not_faster(choice: Choice, layout: Layout) -> str:
    """The refusals that concern this layout, joined; empty if the matrix is served by the kernel made for it."""
    if choice.form.name in ("fragments", "blocks", "cpu-bitmask", "cpu-nm", "cpu-int8"):
        return ""
    own = dict.fromkeys(reason for _, reason in choice.refused if reason not in _OTHERS)
    return "; ".join(own) or _NO_KERNEL.get(layout.name, "")
