"""The sparsity of a checkpoint, counted from its files, whoever pruned it; one tensor is in memory at a time.

A pattern is reported only if every group, block or row obeys it, so the report can be checked against the recipe, and
shows which kernels could run a checkpoint of unknown origin.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.errors import CheckpointError
from llmprune.precision import dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.storage.companions import MASKS_NAME
from llmprune.storage.detection import describe_mask
from llmprune.storage.files import PICKLES, read_header, read_json, weight_files
from llmprune.storage.packed_config import PackedWeight, as_dense, packed_layouts
from llmprune.storage.state_dict import read_state_dict
from llmprune.storage.torch_prune import MASK, ORIGINAL, masked_keys, merged

_EMBEDDINGS = re.compile(r"embed|lm_head|wte|wpe")

# The integers whose lowest value is the bit pattern of -0.0.
_SIGN_VIEWS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}
# Other integers are masks, indices or packed words: a zero among them is not a zero weight.
_WEIGHT_DTYPES = {*_SIGN_VIEWS, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8}


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a checkpoint.

    Attributes:
        name: its full name in the checkpoint.
        shape: its dimensions as stored.
        dtype: its element type as torch names it, for example "bfloat16".
        elements: number of elements.
        zeros: number of zero elements, counted, including -0.0; 0 if the elements are not weights (packed words,
            indices, masks and scales without a zero).
        negative_zeros: how many of `zeros` are -0.0.
        pattern: as `detect_pattern` reports it; None for vectors, and if the elements are not weights.
        bytes: size of its data, as stored.
        layout: how it is stored, for example "nm"; the other fields are those of the dense tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    zeros: int
    negative_zeros: int
    pattern: str | None
    bytes: int
    layout: str = "dense"

    @property
    def sparsity(self) -> float:
        """The fraction of elements that are zero, in [0, 1]."""
        return self.zeros / max(self.elements, 1)

    @property
    def is_matrix(self) -> bool:
        """Whether it counts towards `Inspection.matrix_sparsity`: a weight with two dimensions, not an embedding."""
        return self.pattern is not None and not _EMBEDDINGS.search(self.name)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The zeros of a checkpoint, tensor by tensor.

    Attributes:
        folder: of the checkpoint; or its only file.
        rows: one per tensor, layers in numerical order.
        bytes_on_disk: size of its files of weights.
        contradiction: how config.json and the tensors disagree, if there is a config.json of a causal LM; else None.
        masks: of how many matrices a file of `llmprune.keep_zeros` in the folder says what was pruned; None: there is
            none.
    """

    folder: str
    rows: tuple[TensorRow, ...]
    bytes_on_disk: int
    contradiction: str | None = None
    masks: int | None = None

    @property
    def parameters(self) -> int:
        """The number of elements in all tensors."""
        return sum(row.elements for row in self.rows)

    @property
    def nonzeros(self) -> int:
        """The number of non-zero elements in all tensors."""
        return self.parameters - sum(row.zeros for row in self.rows)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the whole checkpoint, in [0, 1]."""
        return (self.parameters - self.nonzeros) / max(self.parameters, 1)

    @property
    def matrix_sparsity(self) -> float:
        """The fraction of zeros in the matrices, embeddings and lm_head excluded, in [0, 1]."""
        matrices = [row for row in self.rows if row.is_matrix]
        return sum(row.zeros for row in matrices) / max(sum(row.elements for row in matrices), 1)

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON types: the summary's keys, and the rows as "tensors"."""
        summary = (
            "folder", "parameters", "nonzeros", "bytes_on_disk", "sparsity", "matrix_sparsity", "contradiction",
            "masks",
        )  # fmt: skip
        tensors = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        return {**{key: getattr(self, key) for key in summary}, "tensors": tensors}


def inspect_checkpoint(folder: Path, watch: Watcher = ignore, stage: str = "counting zeros") -> Inspection:
    """Count the zeros of every tensor of a checkpoint, or of a state dict, and find their patterns.

    The matrices of a packed checkpoint are unpacked one at a time; `weight_orig` and `weight_mask` of a model pruned by
    torch.nn.utils.prune are counted as the weight that is their product.

    Args:
        folder: has safetensors files, with or without an index; config.json says what is packed, and is compared with
            the tensors. Or one file: safetensors, or a state dict that torch.save wrote, of which no code runs.
        watch: told about every tensor.
        stage: what it is told that is done to them.

    Raises:
        CheckpointError: there are no safetensors files, one is damaged or missing, or two contain the same tensor; the
            file is no state dict.
    """
    if folder.suffix in PICKLES and not folder.is_dir():
        return Inspection(str(folder), _ordered(_state_rows(folder)), folder.stat().st_size)
    files = _files(folder)
    packed = _packed(folder, files)
    rows, halves = _masked(files)
    parts = {part.key for weight in packed for part in weight.parts.values()} | halves
    total = len(packed) + sum(len(_names(path) - parts) for path in files)
    for number, (path, row) in enumerate(_counted(packed, files, parts), start=1):
        watch(Progress(stage, number, total, unit="tensor"))
        if row.name in rows:
            raise CheckpointError(
                f"tensor {row.name} is in {path} and in another file of the folder",
                expected="every tensor in only one file",
                fix="remove the files that belong to another checkpoint",
            )
        rows[row.name] = row
    from llmprune.models.checkpoint_source import find_contradiction  # transformers is slow to import

    nbytes = sum(path.stat().st_size for path in files)
    contradiction = None if folder.is_file() else find_contradiction(folder)
    masks = len(_names(folder / MASKS_NAME)) if (folder / MASKS_NAME).is_file() else None
    return Inspection(str(folder), _ordered(rows), nbytes, contradiction, masks)


def _files(folder: Path) -> list[Path]:
    if folder.suffix == ".safetensors" and folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file of another kind" if folder.exists() else f"no folder {folder}",
            expected=f"a folder with safetensors files, or a file named *.safetensors, *{', *'.join(PICKLES)}",
            fix="check the spelling",
        )
    found = (file for file in folder.glob("*.safetensors") if file.is_file())  # reading a pipe would hang
    named = sorted(file for file in found if file.name != MASKS_NAME)
    standard = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return named if named and not standard else weight_files(folder)


def _packed(folder: Path, files: Sequence[Path]) -> list[PackedWeight]:
    if not (folder / "config.json").is_file():
        return []
    layouts = packed_layouts(read_json(folder / "config.json"))
    stored = {stored.key: stored for path in files for stored in read_header(path)} if layouts else {}
    return [weight for weight in as_dense(stored, layouts).values() if isinstance(weight, PackedWeight)]


def _masked(files: Sequence[Path]) -> tuple[dict[str, TensorRow], set[str]]:
    """The rows of tensors that are stored as an original and a mask, and the names of these."""
    rows: dict[str, TensorRow] = {}
    parts: set[str] = set()
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for path in files:
            stack.enter_context(_readable(path))
            file = stack.enter_context(safe_open(path, framework="pt"))
            places |= dict.fromkeys(file.keys(), file)
        for key in masked_keys(places):
            halves = [f"{key}{ORIGINAL}", f"{key}{MASK}"]
            rows[key] = _masked_row(key, *(places[half].get_tensor(half) for half in halves))
            parts |= {*halves}
    return rows, parts


def _masked_row(key: str, original: Tensor, mask: Tensor) -> TensorRow:
    row = _row(key, merged(key, original, mask))
    return replace(row, bytes=original.nbytes + mask.nbytes, layout="torch-prune")


def _state_rows(file: Path) -> dict[str, TensorRow]:
    """The rows of a state dict, an original and its mask being one."""
    state = read_state_dict(file)
    plain = masked_keys(state)
    with _readable(file):
        rows = {key: _masked_row(key, state.pop(f"{key}{ORIGINAL}"), state.pop(f"{key}{MASK}")) for key in plain}
        return rows | {name: _row(name, tensor) for name, tensor in state.items()}


def _ordered(rows: Mapping[str, TensorRow]) -> tuple[TensorRow, ...]:
    return tuple(sorted(rows.values(), key=lambda row: _numerically(row.name)))


def _as_stored(weight: PackedWeight) -> dict[str, Any]:
    return {"bytes": weight.packed_bytes, "layout": weight.layout.name}


def _counted(
    packed: Sequence[PackedWeight], files: Sequence[Path], parts: Collection[str]
) -> Iterator[tuple[Path, TensorRow]]:
    """The rows of packed matrices, and of all tensors that are no parts of others, with the file of each."""
    for weight in packed:
        yield next(iter(weight.parts.values())).file, replace(_row(weight.key, weight[...]), **_as_stored(weight))
    for path in files:
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in set(file.keys()) - set(parts):
                yield path, _row(name, file.get_tensor(name))


def _names(path: Path) -> set[str]:
    with _readable(path), safe_open(path, framework="pt") as file:
        return set(file.keys())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            expected="a complete safetensors file",
            fix="download or copy the file again",
        ) from error
    except RuntimeError as error:  # torch maps a file as memory that can be written
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            expected="a file that fits into the memory of this machine",
            fix="inspect it on a machine with more memory, or save the model in smaller shards",
        ) from error


def _row(name: str, tensor: Tensor) -> TensorRow:
    zeros, negative_zeros, pattern = 0, 0, None
    if tensor.dtype in _WEIGHT_DTYPES:
        nonzero = tensor != 0
        zeros = tensor.numel() - int(torch.count_nonzero(nonzero))
        if zeros and (view := _SIGN_VIEWS.get(tensor.dtype)):
            negative_zeros = int(torch.count_nonzero(tensor.view(view) == torch.iinfo(view).min))
        if tensor.dim() >= 2:
            pattern = describe_mask(nonzero)
    return TensorRow(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        elements=tensor.numel(),
        zeros=zeros,
        negative_zeros=negative_zeros,
        pattern=pattern,
        bytes=tensor.numel() * tensor.element_size(),
    )


def _numerically(name: str) -> list[str | int]:
    # The pieces alternate between text and digits, so text is never compared with a number.
    return [int(piece) if index % 2 else piece for index, piece in enumerate(re.split(r"(\d+)", name))]
