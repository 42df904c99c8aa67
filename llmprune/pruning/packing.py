"""Convert a dense checkpoint to a packed one and back, with one shard in memory at a time.

What will be packed is decided first, from the zeros in the weights: a checkpoint that cannot be packed is refused
before anything is written.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import CheckpointError, FormatError, PatternError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.linear_weights import linear_weights
from llmprune.pages import write_report
from llmprune.pages.cards import CARD_NAME, update_card
from llmprune.patterns import NM, Pattern, Unstructured, parse
from llmprune.progress import Progress, Watcher, ignore
from llmprune.storage.companions import ADAPTER_NAMES, CONFIG_NAME, MASKS_NAME, copy_companions
from llmprune.storage.config_files import write_config
from llmprune.storage.detection import detect_pattern
from llmprune.storage.exchange import replacing
from llmprune.storage.files import INDEX_NAME, SINGLE_NAME, Stored, read_index, read_json, write_json, write_shard
from llmprune.storage.folders import (
    RECIPE_NAME,
    SAMPLES_NAME,
    checkpoint_folder,
    expanded,
    require_empty,
    require_free,
    require_other,
    require_space,
    writing_to,
)
from llmprune.storage.formats import GROUP, DenseLayout, Layout, fit_layout, quantised_group
from llmprune.storage.packed_config import (
    Format,
    PackedWeight,
    as_dense,
    layout_name,
    packed_layouts,
    with_packing_record,
    without_packing_record,
)
from llmprune.storage.report import REPORT_NAME, load_report
from llmprune.units import format_size, quantity

# The files that say how llmprune made a checkpoint, and what a recovery has left beside its weights.
_HISTORY = (REPORT_NAME, RECIPE_NAME, SAMPLES_NAME, CARD_NAME, MASKS_NAME, *ADAPTER_NAMES)

_FORMATS = ("auto", "nm", "block", "bitmask")

_OUTSIDE, _NOT_PRUNED = "outside the decoder layers", "not pruned"

# What `detect_pattern` returns if every group or block obeys a pattern; further zeros may follow after a comma.
_GROUPS_OR_BLOCKS = re.compile(r"(\d+:\d+|[\d.]+@\d+x\d+)(?:,.*)?")


@dataclass(frozen=True, slots=True)
class PackRow:
    """One matrix of the dense checkpoint.

    Attributes:
        matrix: its key, for example "model.layers.0.mlp.up_proj.weight".
        layout: "nm", "block", "bitmask", "int8-nm", "int8-bitmask" or "dense".
        dense_bytes: size of the dense tensor.
        packed_bytes: size in the packed checkpoint.
        reason: why it is dense; empty if it is packed.
    """

    matrix: str
    layout: str
    dense_bytes: int
    packed_bytes: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was packed, or unpacked.

    Attributes:
        folder: the checkpoint that was written.
        rows: one per matrix, in the checkpoint's order; from `unpack` only those that were packed.
        dense_checkpoint_bytes: size of all tensors of the dense checkpoint.
        packed_checkpoint_bytes: size of all tensors of the packed one.
    """

    folder: Path
    rows: tuple[PackRow, ...]
    dense_checkpoint_bytes: int
    packed_checkpoint_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Size of the packed matrices when dense."""
        return sum(row.dense_bytes for row in self.rows if row.layout != "dense")

    @property
    def packed_bytes(self) -> int:
        """Size of the packed matrices when packed."""
        return sum(row.packed_bytes for row in self.rows if row.layout != "dense")

    @property
    def ratio(self) -> float:
        """Packed bytes per dense byte of the packed matrices: 0.5625 for 2:4 in bfloat16."""
        return self.packed_bytes / max(1, self.dense_bytes)

    def __repr__(self) -> str:
        packed = sum(row.layout != "dense" for row in self.rows)
        sizes = f"{format_size(self.dense_checkpoint_bytes)} dense, {format_size(self.packed_checkpoint_bytes)} packed"
        return f"PackReport({self.folder}, {quantity(packed, 'matrix', 'matrices')} packed, {sizes})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types: totals, and the rows under "matrices"."""
        totals = ("dense_bytes", "packed_bytes", "ratio", "dense_checkpoint_bytes", "packed_checkpoint_bytes")
        return {
            "folder": str(self.folder),
            **{name: getattr(self, name) for name in totals},
            "matrices": [asdict(row) for row in self.rows],
        }


def pack(
    folder: str | Path,
    output: str | Path | None = None,
    format: Format = "auto",
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> PackReport:
    """Convert a pruned checkpoint to a packed (compressed) one.

    The `Linear` layers inside the decoder layers are packed if that makes them smaller.

    Args:
        folder: a local folder with config.json and safetensors.
        output: another folder, created if it does not exist; default: the name of `folder` with "-packed" appended.
        format: "nm" (N:M), "block", "bitmask" (any zeros), or "auto" for the best one for each matrix.
        overwrite: replace an earlier checkpoint in `output`, once the new one is whole.
        watch: told about every shard.

    Raises:
        PatternError: there is no such format, or it fits no matrix.
        CheckpointError: `folder` is already packed or is damaged, or there is not enough disk space.
        ModelError: `folder` holds no causal LM.
        ResumeError: `output` is not empty, is in use, or is `folder` itself.
    """
    if format not in _FORMATS:
        raise PatternError(f"format {format!r}", expected=", ".join(_FORMATS))
    source = checkpoint_folder(folder)
    target = source.with_name(source.name + "-packed") if output is None else expanded(output)
    config = read_json(source / CONFIG_NAME)
    if packed_layouts(config):
        raise CheckpointError(
            f"{source} is already packed", expected="a dense checkpoint", fix="unpack it first (llmprune unpack)"
        )
    _refuse_occupied(target, source, overwrite)
    checkpoint = CheckpointSource(source)
    stored = read_index(source)
    layouts, rows = _choose_layouts(checkpoint, stored, format, watch)
    if not layouts:
        raise PatternError(
            f"no matrix of {source} can be packed as {format}: {_most_common_reason(rows)}",
            expected="a pruned checkpoint whose pattern suits that format",
            fix="try the format auto; llmprune inspect shows the sparsity and pattern of every matrix",
        )

    def read(key: str) -> dict[str, Tensor]:
        tensor, name = stored[key][...], key.removesuffix(".weight")
        if name not in layouts:
            return {key: tensor}
        return {f"{name}.{suffix}": part for suffix, part in layouts[name].pack(tensor).items()}

    dense = sum(tensor.nbytes for tensor in stored.values())
    saved = sum(row.dense_bytes - row.packed_bytes for row in rows)
    report = PackReport(target, tuple(rows), dense, dense - saved)
    shards = {key: tensor.file.name for key, tensor in stored.items()}
    require_space(target, report.packed_checkpoint_bytes)
    with replacing(target) as new:
        _Writer(source, new, shards, watch).write(read, with_packing_record(config, layouts), "packing")
        _update_history(new, report, report.packed_checkpoint_bytes)
    return report


def unpack(folder: str | Path, output: str | Path, overwrite: bool = False, watch: Watcher = ignore) -> PackReport:
    """Convert a packed checkpoint back to the dense one; the inverse of `pack`.

    The tensors are bit-identical to the dense ones, except for the sign of zeros.

    Args:
        folder: a packed checkpoint.
        output: another folder, created if it does not exist.
        overwrite: replace an earlier checkpoint in `output`, once the new one is whole.
        watch: told about every shard.

    Raises:
        CheckpointError: `folder` is not packed or is damaged, or there is not enough disk space.
        FormatError: the tensors of a packed matrix are damaged.
        ResumeError: `output` is not empty, is in use, or is `folder` itself.
    """
    source, target = checkpoint_folder(folder), expanded(output)
    config = read_json(source / CONFIG_NAME)
    if not (layouts := packed_layouts(config)):
        raise CheckpointError(f"{source} is not packed", expected="a checkpoint that llmprune packed")
    _refuse_occupied(target, source, overwrite)
    stored = read_index(source)
    dense = as_dense(stored, layouts)

    def read(key: str) -> dict[str, Tensor]:
        try:
            return {key: dense[key][...]}
        except FormatError as error:
            raise error.at(key) from error

    rows = [
        PackRow(key, tensor.layout.name, tensor.nbytes, tensor.packed_bytes)
        for key, tensor in dense.items()
        if isinstance(tensor, PackedWeight)
    ]
    after, before = (sum(tensor.nbytes for tensor in tensors.values()) for tensors in (dense, stored))
    report = PackReport(target, tuple(rows), after, before)
    require_space(target, after)
    shards = {key: tensor.file.name for key, tensor in dense.items()}
    with replacing(target) as new:
        _Writer(source, new, shards, watch).write(read, without_packing_record(config), "unpacking")
        _update_history(new, report, report.dense_checkpoint_bytes)
    return report


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes a checkpoint with the same shards as another one.

    Attributes:
        source: the other one.
        target: an empty folder.
        shards: key of each tensor to read from `source` -> name of its shard.
        watch: told about every shard.
    """

    source: Path
    target: Path
    shards: Mapping[str, str]
    watch: Watcher

    def write(self, read: Callable[[str], dict[str, Tensor]], config: Mapping[str, Any], stage: str) -> None:
        """Write everything; `read` returns the tensors to store for a key."""
        names = sorted(set(self.shards.values()))
        weight_map: dict[str, str] = {}
        total = 0
        for done, name in enumerate(names):
            self.watch(Progress(stage, done, len(names), name, unit="file"))
            tensors: dict[str, Tensor] = {}
            for key in (key for key, shard in self.shards.items() if shard == name):
                tensors |= read(key)
            write_shard(self.target / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if names != [SINGLE_NAME]:
            metadata = read_json(self.source / INDEX_NAME).get("metadata") or {}
            index = {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.target / INDEX_NAME, index)
        self._copy_companions()
        write_config(self.target, config)
        self.watch(Progress(stage, len(names), len(names), unit="file"))

    def _copy_companions(self) -> None:
        with writing_to(self.target):
            for left_out in copy_companions(self.source, self.target):
                self.watch(Progress(left_out))
            for name in _HISTORY:
                if (self.source / name).is_file():
                    (self.target / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.source / name, self.target / name)


def _update_history(folder: Path, packed: PackReport, stored_bytes: int) -> None:
    """Make the copied report and card describe this checkpoint."""
    update_card(folder)
    size = {"stored_bytes": stored_bytes, "dense_bytes": packed.dense_checkpoint_bytes}
    try:
        report = load_report(folder)
    except CheckpointError:
        return  # there is none, or the file of this name was written by another program
    replace(report, header={**report.header, "size": size}).save(folder)
    write_report(folder)


def _refuse_occupied(target: Path, source: Path, overwrite: bool) -> None:
    require_other(target, source)
    require_free(target)
    require_empty(target, resume=None, overwrite=overwrite)


def _choose_layouts(
    checkpoint: CheckpointSource, stored: Mapping[str, Stored], wanted: Format, watch: Watcher
) -> tuple[dict[str, Layout], list[PackRow]]:
    """The layouts of the matrices to pack, by the layer's name, and a row for every matrix."""
    layouts, rows = {}, []
    linear, outside = linear_weights(checkpoint), set(checkpoint.end_keys())
    matrices = [tensor for tensor in stored.values() if len(tensor.shape) >= 2]
    for done, tensor in enumerate(matrices):
        watch(Progress("finding patterns", done, len(matrices), tensor.key, unit="matrix"))
        layout: Layout | None = None
        if tensor.key in outside:
            reason = _OUTSIDE
        elif tensor.key not in linear:
            reason = "not the weight of a single prunable Linear"
        elif linear[tensor.key] != tensor.key.removesuffix(".weight"):
            reason = f"stored under a different name than in the model ({linear[tensor.key]})"
        else:
            layout, reason = _choose_layout(tensor[...], wanted)
        if layout is None:
            rows.append(PackRow(tensor.key, DenseLayout.name, tensor.nbytes, tensor.nbytes, reason))
        else:
            layouts[linear[tensor.key]] = layout
            rows.append(PackRow(tensor.key, layout.name, tensor.nbytes, layout.nbytes(tensor.dtype.itemsize)))
    watch(Progress("finding patterns", len(matrices), len(matrices), unit="matrix"))
    return layouts, rows


def _choose_layout(weight: Tensor, wanted: Format) -> tuple[Layout | None, str]:
    """The layout of a weight, or None and the reason."""
    found = detect_pattern(weight)
    if found == "dense":
        return None, _NOT_PRUNED
    pattern = _obeyed(weight, found)
    group = quantised_group(weight)
    names = [layout_name(wanted, pattern, eight_bits=eight) for eight in ((True, False) if group else (False,))]
    names.append("bitmask" if wanted == "auto" else None)
    fitted = [fit_layout(name, weight, pattern, group or GROUP) for name in names if name is not None]
    if not fitted:
        return None, f"its zeros are {found}"
    smaller = [layout for layout in fitted if layout.nbytes(weight.itemsize) < weight.nbytes]
    return (smaller[0], "") if smaller else (None, f"{fitted[0].name} would not be smaller")


def _obeyed(weight: Tensor, found: str) -> Pattern:
    """The pattern that `detect_pattern` describes; also finds 2:4 when `detect_pattern` misses it for extra zeros."""
    if match := _GROUPS_OR_BLOCKS.fullmatch(found):
        return parse(match[1])
    if weight.shape[1] % 4 == 0 and found != "1.0" and int((weight != 0).view(-1, 4).sum(1).amax()) <= 2:
        return NM(2, 4)
    return Unstructured(1 - int(weight.count_nonzero()) / max(1, math.prod(weight.shape)))


def _most_common_reason(rows: list[PackRow]) -> str:
    reasons = [row.reason for row in rows if row.reason not in (_OUTSIDE, _NOT_PRUNED)]
    return max(reasons, key=reasons.count) if reasons else _NOT_PRUNED
