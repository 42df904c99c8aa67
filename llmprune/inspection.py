"""What zeros a checkpoint holds: counted from its files, whoever pruned it, one tensor in memory at a time.

A pattern is reported only where every group, block or row keeps it, so the report can be checked against what a recipe
asked for, and shows what a checkpoint of unknown origin could run on.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint import read_header, read_json, weight_files
from llmprune.errors import CheckpointError, PatternError
from llmprune.packed import PackedWeight, as_dense, packed_layouts
from llmprune.precision import dtype_name

_EMBEDDINGS = re.compile(r"embed|lm_head|wte|wpe")

_DENSE_BELOW = 0.01
_GROUPS = (2, 4, 8, 16, 32)
_BLOCKS = (16, 32, 64, 128)
# Weights that were zero before pruning make a matrix a little sparser than its pattern.
_SLACK = 0.02
_NEARLY_ALL = 0.99
_NOTABLE = 0.1

# The integers whose lowest value is the bit pattern of -0.0.
_SIGN_VIEWS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}
# Other integers are masks, indices or packed words: a zero there is not a weight that is zero.
_WEIGHT_DTYPES = {*_SIGN_VIEWS, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8}


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a checkpoint.

    Attributes:
        name: its full name in the checkpoint.
        shape: its dimensions as stored.
        dtype: its element type as torch names it, for example "bfloat16".
        elements: number of elements.
        zeros: number of elements that are zero, counted, -0.0 included; 0 where the elements are not weights (packed
            words, indices, masks and scales without a zero).
        negative_zeros: those of `zeros` that are -0.0.
        pattern: what `detect_pattern` says; None for vectors, and where the elements are not weights.
        bytes: size of its data, as stored.
        layout: how it is stored, for example "nm"; the other columns are those of the dense tensor.
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
        """Whether it counts in `Inspection.matrix_sparsity`: a weight with two dimensions, and no embedding."""
        return self.pattern is not None and not _EMBEDDINGS.search(self.name)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The zeros of a checkpoint, tensor by tensor.

    Attributes:
        folder: where it lies.
        rows: one row a tensor, layers in their numerical order.
        bytes_on_disk: size of its safetensors files.
        contradiction: how config.json and the tensors do not fit, where there is a config.json of a causal LM.
    """

    folder: str
    rows: tuple[TensorRow, ...]
    bytes_on_disk: int
    contradiction: str | None = None

    @property
    def parameters(self) -> int:
        """The number of elements stored, of all tensors."""
        return sum(row.elements for row in self.rows)

    @property
    def nonzeros(self) -> int:
        """The number of elements that are not zero, of all tensors."""
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
        """Everything as JSON types: the summary's keys, and the rows under "tensors"."""
        summary = ("folder", "parameters", "nonzeros", "bytes_on_disk", "sparsity", "matrix_sparsity", "contradiction")
        tensors = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        return {**{key: getattr(self, key) for key in summary}, "tensors": tensors}


def inspect_checkpoint(folder: Path) -> Inspection:
    """Count the zeros of every tensor of a checkpoint and find their patterns.

    The matrices of a packed checkpoint are unpacked for it, one by one.

    Args:
        folder: holds safetensors files, with or without an index; config.json says what is packed, and is compared
            with the tensors.

    Raises:
        CheckpointError: there are no safetensors files, one is damaged or missing, or two hold the same tensor.
    """
    files = _files(folder)
    packed = _packed(folder, files)
    parts = {part.key for weight in packed for part in weight.parts.values()}
    rows = {weight.key: replace(_row(weight.key, weight[...]), **_as_stored(weight)) for weight in packed}
    for path in files:
        for row in _rows(path, parts):
            if row.name in rows:
                raise CheckpointError(
                    f"tensor {row.name} is in {path} and in another file of the folder",
                    expected="every tensor in one file",
                    fix="remove the files that belong to another checkpoint",
                )
            rows[row.name] = row
    ordered = sorted(rows.values(), key=lambda row: _numerically(row.name))
    from llmprune.auditing import find_contradiction  # transformers is slow to import

    nbytes = sum(path.stat().st_size for path in files)
    return Inspection(str(folder), tuple(ordered), nbytes, find_contradiction(folder))


def detect_pattern(matrix: Tensor) -> str:
    """Describe the zeros of a weight matrix.

    Looked for in this order: whole rows or columns ("0.25 rows", "0.25 columns", "0.4 rows and columns"), N:M with the
    shortest M ("2:4"), all-zero square blocks of the largest size ("0.5@64x64"), the same count in each row
    ("0.5/row"), and any ("0.5"). Below 1 % zeros it is "dense". N:M and equal counts that lie along the other
    dimension, as in a Conv1D that stores [in, out], read "2:4 along dim 0". Where whole rows or columns hold part of
    the zeros (at least a tenth), their number follows: "2:4, 128 zero rows". Rows and columns are those of the matrix
    as it is stored.

    Args:
        matrix: [out, in], or [..., out, in] for one matrix an expert; -0.0 is a zero.

    Raises:
        PatternError: it has fewer than two dimensions.

    Example:
        >>> detect_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 4.0], [0.0, 5.0, 6.0, 0.0]]))
        '1:2'
    """
    if matrix.dim() < 2:
        raise PatternError(f"a tensor of shape {tuple(matrix.shape)}", expected="a matrix", fix="give a 2-D tensor")
    return _describe(matrix != 0)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(
            f"no folder {folder}", expected="a folder with safetensors files", fix="check the spelling"
        )
    named = sorted(folder.glob("*.safetensors"))
    standard = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return named if named and not standard else weight_files(folder)


def _packed(folder: Path, files: Sequence[Path]) -> list[PackedWeight]:
    if not (folder / "config.json").is_file():
        return []
    layouts = packed_layouts(read_json(folder / "config.json"))
    stored = {stored.key: stored for path in files for stored in read_header(path)} if layouts else {}
    return [weight for weight in as_dense(stored, layouts).values() if isinstance(weight, PackedWeight)]


def _as_stored(weight: PackedWeight) -> dict[str, Any]:
    return {"bytes": weight.packed_bytes, "layout": weight.layout.name}


def _rows(path: Path, parts: Collection[str]) -> Iterator[TensorRow]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) - set(parts):
                yield _row(name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            expected="a complete safetensors file",
            fix="download or copy the file again",
        ) from error


def _row(name: str, tensor: Tensor) -> TensorRow:
    zeros, negative_zeros, pattern = 0, 0, None
    if tensor.dtype in _WEIGHT_DTYPES:
        nonzero = tensor != 0
        zeros = tensor.numel() - int(torch.count_nonzero(nonzero))
        if zeros and (view := _SIGN_VIEWS.get(tensor.dtype)):
            negative_zeros = int(torch.count_nonzero(tensor.view(view) == torch.iinfo(view).min))
        if tensor.dim() >= 2:
            pattern = _describe(nonzero)
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


def _describe(nonzero: Tensor) -> str:
    """Name the pattern of a mask [..., out, in], True where the weight is not zero."""
    if nonzero.numel() == 0:
        return "dense"
    mask = nonzero.reshape(-1, *nonzero.shape[-2:]).contiguous()
    kept = int(torch.count_nonzero(mask))
    zeros = mask.numel() - kept
    if zeros < _DENSE_BELOW * mask.numel():
        return "dense"
    if kept == 0:
        return "1.0"
    along = f" along dim {nonzero.dim() - 2}"
    sparsity = zeros / mask.numel()
    by_row, by_column = _row_counts(mask), _column_counts(mask)
    lines, share, live = _zero_lines(by_row, by_column, zeros)
    if share >= _NEARLY_ALL:
        return f"{_rounded(sparsity)} {lines}"
    found = _groups(mask, kept / live, along) or _blocks(mask, zeros)
    note = _note(by_row, by_column) if share >= _NOTABLE and "@" not in (found or "") else ""
    return (found or _equal_counts(by_row, by_column, along) or _rounded(sparsity)) + note


def _row_counts(mask: Tensor) -> Tensor:
    """Count the True of each row of [matrices, out, in]: [matrices, out]."""
    if mask.shape[2] % 8:
        return mask.view(torch.uint8).sum(2, dtype=torch.int32)
    return _byte_sums(mask, 8).view(*mask.shape[:2], -1).sum(2)


def _column_counts(mask: Tensor) -> Tensor:
    """Count the True of each column of [matrices, out, in]: [matrices, in]."""
    matrices, rows, columns = mask.shape
    # Adding bytes is many times faster than widening them first; 128 of them cannot overflow.
    step = math.gcd(rows, 128)
    bytes_ = mask.view(torch.uint8).view(matrices, rows // step, step, columns)
    return bytes_.sum(2, dtype=torch.uint8).sum(1, dtype=torch.int64)


def _byte_sums(mask: Tensor, width: int) -> Tensor:
    """Add up every `width` (2, 4 or 8) consecutive bools, flat.

    The bytes are read as one integer; times 0x01...01 its top byte is the sum of all of them, far faster than a
    reduction over a dimension of so few.
    """
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    ones = int.from_bytes(b"\1" * width, "little")
    return (mask.view(-1).view(word) * ones) >> (8 * (width - 1))


def _zero_lines(by_row: Tensor, by_column: Tensor, zeros: int) -> tuple[str, float, int]:
    """Whole zero rows and columns of each matrix.

    Returns:
        What to call the lines, the share of all zeros that they hold, and the elements outside zero rows.
    """
    (matrices, rows), columns = by_row.shape, by_column.shape[1]
    dead_rows, dead_columns = (by_row == 0).sum(1), (by_column == 0).sum(1)
    in_rows, in_columns = int(dead_rows.sum()) * columns, int(dead_columns.sum()) * rows
    in_both = int((dead_rows * dead_columns).sum())
    live = matrices * rows * columns - in_rows
    for name, count in (("rows", in_rows), ("columns", in_columns)):
        if count >= _NEARLY_ALL * zeros:
            return name, count / zeros, live
    return "rows and columns", (in_rows + in_columns - in_both) / zeros, live


def _note(by_row: Tensor, by_column: Tensor) -> str:
    counts = {"row": int((by_row == 0).sum()), "column": int((by_column == 0).sum())}
    return "".join(f", {count} zero {line}{'s' * (count > 1)}" for line, count in counts.items() if count)


def _groups(mask: Tensor, density: float, along: str) -> str | None:
    """Find N:M along the input dimension, otherwise along the other; `density` is the fraction kept in live rows."""
    for where, length in (("", mask.shape[2]), (along, mask.shape[1])):
        for of in _GROUPS:
            # No group may keep more than N, so N/M is at least the density; only the next N above can be close to it.
            keep = math.ceil(of * density - 1e-9)
            # A group as long as the row is better called equal counts.
            if length % of or length == of or keep >= of or keep / of - density > _SLACK:
                continue
            if (_most_in_rows(mask, of) if where == "" else _most_in_columns(mask, of)) <= keep:
                return f"{keep}:{of}{where}"
    return None


def _most_in_rows(mask: Tensor, of: int) -> int:
    sums = _byte_sums(mask, min(of, 8))
    return int((sums.view(-1, of // 8).sum(1) if of > 8 else sums).amax())


def _most_in_columns(mask: Tensor, of: int) -> int:
    groups = mask.view(torch.uint8).view(-1, of, mask.shape[2])
    return int(groups.sum(1, dtype=torch.uint8).amax())


def _blocks(mask: Tensor, zeros: int) -> str | None:
    """Find the largest square blocks that hold nearly all zeros of [matrices, out, in]."""
    matrices, rows, columns = mask.shape
    found, tiles, previous = None, mask.view(torch.uint8), 1
    for size in _BLOCKS:
        if rows % size or columns % size:
            break
        step = size // previous
        tiles = tiles.view(-1, step, columns // previous).amax(1).view(-1, step).amax(1)
        tiles = tiles.view(matrices, rows // size, columns // size)
        empty = tiles.numel() - int(torch.count_nonzero(tiles))
        # Blocks inside larger zero blocks are zero too: where a size fails, all larger ones do.
        if empty * size * size < _NEARLY_ALL * zeros:
            break
        found, previous = f"{_rounded(empty / tiles.numel())}@{size}x{size}", size
    return found


def _equal_counts(by_row: Tensor, by_column: Tensor, along: str) -> str | None:
    for counts, length, where in ((by_row, by_column.shape[1], ""), (by_column, by_row.shape[1], along)):
        kept = counts.flatten()
        usual = int(kept.mode().values)
        if len(kept) > 1 and int((kept == usual).sum()) >= _NEARLY_ALL * len(kept):
            return f"{_rounded(1 - usual / length)}/row{where}"
    return None


def _rounded(sparsity: float) -> str:
    return str(round(sparsity, 3))
