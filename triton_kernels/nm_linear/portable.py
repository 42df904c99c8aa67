"""y = x @ W.T + bias for a few tokens, from the disk layout of 2:4 weights, using only `tl.dot`.

For GPUs without `mma.sp` (other vendors, compute capability below 8.0). Weights are read as 0.5625 of the dense bytes
and expanded to dense tiles in registers. Long inner dimensions are split over the grid; each split writes its float32
sums, and a second kernel adds them in a fixed order, so that the result is bit-identical every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..splits import add_splits
from .expand import spread

HIGHEST_SPLITS = 64

# Programs per multiprocessor that the default splits aim for: enough to keep loads in flight while some wait.
_PROGRAMS_PER_SM = 4
_ROWS = 64


@dataclass(frozen=True, slots=True)
class PortableConfiguration:
    """How the kernel divides the work; all but `splits` are powers of two.

    Attributes:
        rows: output features per program, at least 16.
        columns: input features per step, at least 32.
        splits: programs that share the input features of a row; with more than one, partial sums are needed.
        warps: warps per program.
    """

    rows: int = _ROWS
    columns: int = 128
    splits: int = 1
    warps: int = 4

    def __post_init__(self) -> None:
        sizes = (self.rows, self.columns, self.warps)
        powers = all(size > 0 and size & (size - 1) == 0 for size in sizes)
        if not powers or self.rows < 16 or self.columns < 32 or self.splits not in range(1, HIGHEST_SPLITS + 1):
            raise ValueError(
                f"{self}: expected powers of two, rows >= 16, columns >= 32, splits in [1, {HIGHEST_SPLITS}]"
            )


def choose_default(out_features: int, in_features: int, tokens: int, sm_count: int) -> PortableConfiguration:
    """Split the input features until the GPU is full, but leave at least four steps to each split."""
    # Three stages of 128 columns and 64 tokens need 70 KiB of shared memory; AMD's GPUs have 64 KiB.
    columns = 128 if tokens <= 32 else 64
    wanted = triton.cdiv(_PROGRAMS_PER_SM * sm_count, triton.cdiv(out_features, _ROWS))
    splits = max(1, min(wanted, in_features // (4 * columns), 16))
    return PortableConfiguration(columns=columns, splits=splits)


@triton.jit(do_not_specialize=["tokens"])
def _portable_kernel(
    x, values, meta, bias, y, tokens, rows, bytes_per_row, bytes_per_split,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """`y` holds [splits, tokens, rows] float32 sums, or with one split the result itself.

    Everything is counted in bytes of meta: one describes 64 bits of values and eight columns of x.
    """
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, 8 * BYTES)
    stop = tl.minimum((split + 1) * bytes_per_split, bytes_per_row)
    weights = row.to(tl.int64)[:, None] * bytes_per_row + byte[None, :]
    inputs = token[:, None] * (8 * bytes_per_row) + column[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(split * bytes_per_split, stop, BYTES):
        present = (row < rows)[:, None] & (start + byte < stop)[None, :]
        pairs = tl.load(values + weights + start, mask=present, other=0)
        nibbles = tl.load(meta + weights + start, mask=present, other=0).to(tl.int64)
        given = (token < tokens)[:, None] & (8 * start + column < 8 * stop)[None, :]
        activations = tl.load(x + inputs + 8 * start, mask=given, other=0.0)
        tile = _dense_tile(pairs, nibbles, ROWS, BYTES).to(x.dtype.element_ty, bitcast=True)
        total = tl.dot(tile, tl.trans(activations), total)
    place = (split * tokens + token).to(tl.int64)[None, :] * rows + row[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < tokens)[None, :] & (row < rows)[:, None])


@triton.jit
def _dense_tile(pairs, nibbles, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Expand to dense int16 [ROWS, 8 BYTES]; each word of `pairs` and byte of `nibbles` holds two groups."""
    words = tl.join(spread(pairs, nibbles), spread(pairs >> 32, nibbles >> 4))
    halves = tl.join(words.to(tl.int32), (words >> 32).to(tl.int32))
    return tl.join(halves.to(tl.int16), (halves >> 16).to(tl.int16)).reshape(ROWS, 8 * BYTES)


def workspace_bytes(tokens: int, out_features: int, configuration: PortableConfiguration) -> int:
    """The bytes of the splits' partial sums."""
    return 4 * configuration.splits * tokens * out_features if configuration.splits > 1 else 0


def linear_24_decode_portable(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    configuration: PortableConfiguration,
    workspace: Tensor | None = None,
) -> Tensor:
    """Multiply up to 64 tokens by a 2:4 matrix in the layout on disk.

    Args:
        x: [tokens, in_features], bfloat16 or float16, contiguous; 1 to 64 tokens.
        values: [out_features, in_features / 2], the dtype of x, contiguous.
        meta: [out_features, in_features / 8], uint8, contiguous.
        bias: [out_features], or None.
        configuration: any; it affects the speed and, through its splits, the order of the float32 sums.
        workspace: float32, contiguous, of at least `workspace_bytes`, overwritten; needed with more than one split.

    Returns:
        [tokens, out_features] in the dtype of x.
    """
    tokens, rows = len(x), len(meta)
    y = x.new_empty(tokens, rows)
    split = configuration.splits > 1
    bytes_per_step = configuration.columns // 8
    steps = triton.cdiv(meta.shape[1], bytes_per_step)
    _portable_kernel[(triton.cdiv(rows, configuration.rows), configuration.splits)](
        x, values.view(torch.int64), meta, None if split else bias, workspace if split else y,
        tokens, rows, meta.shape[1], triton.cdiv(steps, configuration.splits) * bytes_per_step,
        TOKENS=max(16, triton.next_power_of_2(tokens)), ROWS=configuration.rows, BYTES=bytes_per_step,
        num_warps=configuration.warps,
    )  # fmt: skip
    if split:
        add_splits(workspace, bias, y, configuration.splits)
    return y
