"""Fragment order: a 2:4 matrix and its activations in the order in which mma.sp.m16n8k32 holds them in registers.

A warp multiplies a tile of 16 rows and 32 inputs, of which 16 are stored, by 8 tokens. Lane 4 g + t holds, as words of
two 16-bit values:

    weights      rows g and g + 8, kept columns 2t, 2t + 1 and 2t + 8, 2t + 9: four words
    activations  token g, inputs 8i + 2t, 8i + 2t + 1 for i = 0..3: four words
    metadata     a word has 16 bits (four groups) of row g and 16 bits of row g + 8; t selects the 16 columns, and lanes
                 with t // 2 = s provide the metadata of a product whose selector is s

Eight such products form a step of 256 inputs, in which each lane reads 128 bits at a time:

    a        int32 [rows / 16, inputs / 256, 8, 32, 4]   product, lane, word
    e        int32 [rows / 16, inputs / 256, 32, 4]      lane, word; word q // 2 with selector q % 2 is product q's
    x        int32 [tokens / 8, inputs / 256, 8, 32, 4]  product, lane, word

Rows, inputs and tokens are padded with zeros; a padding group has the indices 0 and 1, since mma.sp needs two distinct
indices in ascending order. The order is that of the PTX ISA, "Matrix fragments for sparse mma.m16n8k32".
Everything here permutes 16-bit words: without arithmetic, it is exact for any values on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, INPUTS, TOKENS = 16, 256, 8

# Two nibbles 0 | 1 << 2: the first two indices of each group.
_PADDING_META = 0x44


def to_fragments(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a 2:4 matrix from the layout on disk into fragment order.

    Args:
        values: [out, in / 2], bfloat16 or float16; in is a multiple of 8.
        meta: [out, in / 8], uint8, nibbles i0 | i1 << 2 with i0 < i1 (unchecked here: `llmprune.storage.formats` does).

    Returns:
        (a, e) as above, padded; together 0.5625 of the dense bytes if rows and inputs need no padding.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if values.element_size() != 2 or not values.is_floating_point():
        raise ValueError(f"values of {values.dtype}: sparse tensor cores take bfloat16 or float16")
    if meta.dtype != torch.uint8 or values.shape != (len(meta), 4 * meta.shape[1]):
        raise ValueError(
            f"values {list(values.shape)} with meta {list(meta.shape)} of {meta.dtype}; expected [out, in / 2] with "
            "[out, in / 8] of uint8"
        )
    rows, inputs = len(meta), 8 * meta.shape[1]
    tiles, steps = -(-rows // ROWS), -(-inputs // INPUTS)
    more_rows, more_inputs = tiles * ROWS - rows, steps * INPUTS - inputs
    words = F.pad(values.contiguous().view(torch.int16), (0, more_inputs // 2, 0, more_rows)).view(torch.int32)
    halves = F.pad(meta, (0, more_inputs // 8, 0, more_rows), value=_PADDING_META).view(torch.int16)
    # (tile, row half, g, step, product, column half, t) -> (tile, step, product, g, t, column half, row half)
    a = words.view(tiles, 2, 8, steps, 8, 2, 4).permute(0, 3, 4, 2, 6, 5, 1)
    # (tile, row half, g, step, word, selector, 16 columns) -> (tile, step, g, selector, 16 columns, word, row half)
    e = halves.view(tiles, 2, 8, steps, 4, 2, 2).permute(0, 3, 2, 5, 6, 4, 1)
    return a.reshape(tiles, steps, 8, 32, 4), e.contiguous().view(torch.int32).view(tiles, steps, 32, 4)


def from_fragments(
    a: Tensor, e: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Undo `to_fragments`.

    Args:
        a: [tiles, steps, 8, 32, 4], int32.
        e: [tiles, steps, 32, 4], int32.
        out_features: rows without padding.
        in_features: inputs without padding, a multiple of 8.
        dtype: bfloat16 or float16, the original dtype.

    Returns:
        (values, meta) as `to_fragments` takes them, contiguous.

    Raises:
        ValueError: the fragments do not match a matrix of this shape.
    """
    tiles, steps = -(-out_features // ROWS), -(-in_features // INPUTS)
    check_fragments(a, e, out_features, in_features)
    words = a.view(tiles, steps, 8, 8, 4, 2, 2).permute(0, 6, 3, 1, 2, 5, 4).reshape(tiles * ROWS, steps * INPUTS // 4)
    halves = e.contiguous().view(torch.int16).view(tiles, steps, 8, 2, 2, 4, 2).permute(0, 6, 2, 1, 5, 3, 4)
    meta = halves.reshape(tiles * ROWS, steps * INPUTS // 16).view(torch.uint8)
    values = words.view(dtype)[:out_features, : in_features // 2]
    return values.contiguous(), meta[:out_features, : in_features // 8].contiguous()


def check_fragments(a: Tensor, e: Tensor, out_features: int, in_features: int) -> None:
    """Raise `ValueError` unless a and e have the shapes, dtype and memory order of a matrix [out, in]."""
    if in_features % 8:
        raise ValueError(f"{in_features} inputs; expected a multiple of 8")
    grid = (-(-out_features // ROWS), -(-in_features // INPUTS))
    for name, tensor, shape in (("a", a, (*grid, 8, 32, 4)), ("e", e, (*grid, 32, 4))):
        if tensor.shape != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}; a matrix of "
                f"{out_features} x {in_features} (out x in) has {list(shape)} of int32, contiguous"
            )


def activation_fragments_reference(x: Tensor, groups: int) -> Tensor:
    """Bring activations [tokens, in] of a 16-bit dtype into fragment order: [groups, steps, 8, 32, 4]; the definition.

    `groups` is the number of groups of 8 tokens, at least tokens / 8; missing tokens and inputs are zero.
    """
    tokens, inputs = x.shape
    steps = -(-inputs // INPUTS)
    padding = (0, steps * INPUTS - inputs, 0, groups * TOKENS - tokens)
    words = F.pad(x.contiguous().view(torch.int16), padding).view(torch.int32)
    # (group, g, step, product, i, t) -> (group, step, product, g, t, i)
    return words.view(groups, 8, steps, 8, 4, 4).permute(0, 2, 3, 1, 5, 4).reshape(groups, steps, 8, 32, 4)
