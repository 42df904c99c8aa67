"""The definition of the 2:4 linear, in plain torch, over the layout on disk.

`values` [out, in / 2] holds the two kept weights of every four along the input dimension. `meta` uint8 [out, in / 8]
holds a nibble i0 | i1 << 2 per group of four, the lower nibble first: their indices in the group, i0 < i1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_24_reference(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x by the transpose of a 2:4 matrix, and add the bias.

    Args:
        x: [..., in], floating point.
        values: [out, in / 2], the dtype of x.
        meta: [out, in / 8], uint8.
        bias: [out], floating point.

    Returns:
        [..., out] in the dtype of x; sums are in float32, or in float64 if x is float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dense_24_reference(values, meta).to(wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def dense_24_reference(values: Tensor, meta: Tensor) -> Tensor:
    """Expand to the dense matrix: [out, in] in the dtype of the values."""
    rows, half = values.shape
    nibbles = torch.stack((meta & 15, meta >> 4), -1).reshape(rows, half // 2)
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    groups = values.new_zeros(rows, half // 2, 4).scatter_(-1, places, values.view(rows, half // 2, 2))
    return groups.view(rows, 2 * half)
