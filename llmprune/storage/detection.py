"""Detect the pattern of a matrix's zeros: one is reported only if every group, block or row obeys it."""

import math

import torch
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.units import quantity

_DENSE_BELOW = 0.01
_GROUPS = (2, 4, 8, 16, 32)
_BLOCKS = (16, 32, 64, 128)

# Weights that were already zero before pruning make a matrix slightly sparser than its pattern.
_SLACK = 0.02
_NEARLY_ALL = 0.99
_NOTABLE = 0.1


def detect_pattern(matrix: Tensor) -> str:
    """Describe the zeros of a weight matrix.

    Patterns are tried in this order: whole rows or columns ("0.25 rows", "0.25 columns", "0.4 rows and columns"), N:M
    with the shortest M ("2:4"), all-zero square blocks of the largest size ("0.5@64x64"), the same count in each row
    ("0.5/row"), and no structure ("0.5"). Below 1 % zeros the matrix is "dense". N:M and equal counts along the other
    dimension, as in a Conv1D that stores [in, out], are reported as "2:4 along dim 0". If whole rows or columns hold
    at least a tenth of the zeros, their number is appended: "2:4, 128 zero rows". Rows and columns are those of the
    matrix as it is stored.

    Args:
        matrix: [out, in], or [..., out, in] with one matrix per expert; -0.0 counts as zero.

    Raises:
        PatternError: the tensor has fewer than two dimensions.

    Example:
        >>> detect_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 4.0], [0.0, 5.0, 6.0, 0.0]]))
        '1:2'
    """
    if matrix.dim() < 2:
        raise PatternError(f"a tensor of shape {tuple(matrix.shape)}", expected="a matrix", fix="give a 2-D tensor")
    return describe_mask(matrix != 0)


def describe_mask(nonzero: Tensor) -> str:
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
    # Adding bytes is many times faster than widening them first, and sums of up to 128 ones fit into a byte.
    step = math.gcd(rows, 128)
    bytes_ = mask.view(torch.uint8).view(matrices, rows // step, step, columns)
    return bytes_.sum(2, dtype=torch.uint8).sum(1, dtype=torch.int64)


def _byte_sums(mask: Tensor, width: int) -> Tensor:
    """Add up every `width` (2, 4 or 8) consecutive bools, flat.

    The bytes are read as one integer and multiplied by 0x01...01: the top byte of the product is the sum of all bytes.
    That is far faster than a reduction over such a short dimension.
    """
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    ones = int.from_bytes(b"\1" * width, "little")
    return (mask.view(-1).view(word) * ones) >> (8 * (width - 1))


def _zero_lines(by_row: Tensor, by_column: Tensor, zeros: int) -> tuple[str, float, int]:
    """Whole zero rows and columns of each matrix.

    Returns:
        The name of the lines, the fraction of all zeros that they hold, and the number of elements outside zero rows.
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
    return "".join(f", {quantity(count, f'zero {line}')}" for line, count in counts.items() if count)


def _groups(mask: Tensor, density: float, along: str) -> str | None:
    """Find N:M along the input dimension, otherwise along the other one; `density` is the fraction kept in live rows.

    Zero rows are left out of the density: they obey every N:M, and would make N look smaller than it is.
    """
    for where, length in (("", mask.shape[2]), (along, mask.shape[1])):
        for of in _GROUPS:
            # No group keeps more than N, so N/M is at least the density, and only the smallest such N can be close to
            # it: one N to test for each M.
            keep = math.ceil(of * density - 1e-9)
            # A group as long as the row is reported as equal counts instead.
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
    """Find the largest square blocks that hold nearly all zeros of [matrices, out, in].

    Each size is reduced from the one before, so that the mask itself is read only once.
    """
    matrices, rows, columns = mask.shape
    found, tiles, previous = None, mask.view(torch.uint8), 1
    for size in _BLOCKS:
        if rows % size or columns % size:
            break
        step = size // previous
        tiles = tiles.view(-1, step, columns // previous).amax(1).view(-1, step).amax(1)
        tiles = tiles.view(matrices, rows // size, columns // size)
        empty = tiles.numel() - int(torch.count_nonzero(tiles))
        # Blocks inside larger zero blocks are zero too: if a size fails, so do all larger ones.
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
