"""A decoder layer for one token in two calls, with its key-value cache between them, instead of thirty of torch.

What lies between the products of a small model costs more time in calls than its weights take to be read.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .library import THREAD_BYTES, TYPES, Library

_address, _size = ctypes.c_void_p, ctypes.c_int64


class Weights(NamedTuple):
    """A linear layer's.

    Attributes:
        matrix: from `pack`, or dense [out, in], contiguous.
        is_packed: which of them.
        bias: [out], of the dtype of tokens, or None.
        shape: (out, in).
    """

    matrix: Tensor
    is_packed: bool
    bias: Tensor | None
    shape: tuple[int, int]


class Norm(NamedTuple):
    """An RMS norm: its weight [features], of the dtype of tokens, and what is added to the mean of squares."""

    weight: Tensor
    eps: float


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, _address if name == "data" else _size) for name in ("data", "bytes", "rows", "columns", "type")),
        ("bias", _address),
    )


class _Sizes(ctypes.Structure):
    """`Layer` of source/layer_sizes.h."""

    _fields_ = (
        *((name, _size) for name in ("hidden", "heads", "shared", "width", "thread_bytes", "type")),
        ("norms", _address * 4),
        ("eps", ctypes.c_float * 4),
        ("parts", _Part * 7),
    )


class TokenLayer:
    """The matrices and norms of a decoder layer, which stay what and where they are.

    Whatever the dtype of tokens, it computes in float32, and rounds what it returns.

    Args:
        loaded: the library.
        weights: of q, k, v, o, gate, up and down.
        norms: before attention, before the MLP, and of the heads of q and k, or None.
        width: of a head.

    Attributes:
        dtype: of tokens, keys and values: that of the norms.
        hidden: features of a token.
        heads: of queries, keys and values.

    Raises:
        ValueError: a tensor is not in float32, 16 bits or packed, is not contiguous, or not on the CPU, or the sizes
            or dtypes do not go together.
    """

    def __init__(self, loaded: Library, weights: Sequence[Weights], norms: Sequence[Norm | None], width: int) -> None:
        self._library, self.hidden, self.width = loaded, weights[0].shape[1], width
        if norms[0] is None or norms[0].weight.dtype not in TYPES:
            raise ValueError("layer: a norm of 16- or 32-bit floats is expected before attention")
        self.dtype = norms[0].weight.dtype
        rows = [one.shape[0] for one in weights[:3]]
        self.heads = [count // width for count in rows]
        self._tensors = [one.matrix for one in weights]
        self._tensors += [one.bias for one in weights if one.bias is not None]
        self._tensors += [norm.weight for norm in norms if norm is not None]
        self._seen = self._states()
        vectors = [(one.bias, one.shape[0]) for one in weights]
        sizes = self.hidden, self.hidden, width, width
        vectors += [(norm and norm.weight, size) for norm, size in zip(norms, sizes, strict=True)]
        for vector, size in vectors:
            if vector is not None:
                self._require(vector, (size,))
        self._sizes = _Sizes(
            hidden=self.hidden, heads=self.heads[0], shared=self.heads[1], width=width, thread_bytes=THREAD_BYTES,
            type=TYPES[self.dtype],
            norms=(_address * 4)(*(norm and norm.weight.data_ptr() for norm in norms)),
            eps=(ctypes.c_float * 4)(*(norm.eps if norm else 0.0 for norm in norms)),
            parts=(_Part * 7)(*map(_part, weights)),
        )  # fmt: skip
        self._at = ctypes.addressof(self._sizes)

    def is_current(self) -> bool:
        """Whether all tensors are where they were, and of the same size."""
        return self._states() == self._seen

    def begin(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of a token, each [1, heads, 1, width].

        Args:
            x: [1, 1, hidden], contiguous, of the layer's dtype, on the CPU, as all others are.
            cos: [1, 1, width], of the token's position.
            sin: [1, 1, width].

        Raises:
            ValueError: a tensor is not as above, or a packed matrix is damaged.
        """
        angles = 1, 1, self.width
        self._require(x, (1, 1, self.hidden))
        self._require(cos, angles)
        self._require(sin, angles)
        qkv = x.new_empty(1, sum(self.heads), 1, self.width)
        self._library.begin_layer(self._at, x, cos, sin, qkv)
        q, k, v = qkv.split_with_sizes(self.heads, 1)
        return q, k, v

    def attend(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """What the layer makes of a token, [1, 1, hidden].

        Args:
            x: as for `begin`.
            q: from `begin`.
            keys: [1, heads, length, width], those of the token last; rows are contiguous.
            values: the same.
            scale: of scores, before the softmax.

        Raises:
            ValueError: as for `begin`.
        """
        self._require(x, (1, 1, self.hidden))
        self._require(q, (1, self.heads[0], 1, self.width))
        if not self.fits(keys, values):
            raise ValueError(f"keys {list(keys.shape)}, values {list(values.shape)}; expected {self.heads[1]} heads")
        y = torch.empty_like(x)
        self._library.end_layer(self._at, x, q, (keys, values), scale, y)
        return y

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values are as `attend` wants them."""
        shape = keys.shape
        return (
            keys.dtype is self.dtype is values.dtype
            and len(shape) == 4
            and (shape[0], shape[1], shape[3]) == (1, self.heads[1], self.width)
            and shape[2] > 0
            and values.shape == shape
            and keys.stride(3) == 1 == values.stride(3)
            and keys.is_cpu
            and values.is_cpu
        )

    def end(self, x: Tensor, attended: Tensor) -> Tensor:
        """The same for what attention has made of the queries: [1, 1, heads, width].

        Raises:
            ValueError: as for `begin`.
        """
        self._require(x, (1, 1, self.hidden))
        self._require(attended, (1, 1, self.heads[0], self.width))
        y = torch.empty_like(x)
        self._library.end_layer(self._at, x, attended, None, 0.0, y)
        return y

    def _require(self, one: Tensor, shape: tuple[int, ...]) -> None:
        if one.shape != shape or one.dtype is not self.dtype or not one.is_cpu or not one.is_contiguous():
            found = f"{list(one.shape)}, {one.dtype} on {one.device}"
            raise ValueError(f"layer: {found}; expected {list(shape)}, contiguous {self.dtype} on the CPU")

    def _states(self) -> list[tuple[int, torch.Size, torch.dtype, bool]]:
        return [(one.data_ptr(), one.shape, one.dtype, one.is_contiguous()) for one in self._tensors]


def _part(weights: Weights) -> _Part:
    matrix = weights.matrix
    if matrix.device.type != "cpu" or not matrix.is_contiguous() or matrix.dtype not in TYPES:
        raise ValueError(f"layer: weights of {matrix.dtype} on {matrix.device}; expected contiguous floats on the CPU")
    if not weights.is_packed and matrix.shape != weights.shape:
        raise ValueError(f"layer: weights {list(matrix.shape)}; expected {list(weights.shape)}")
    # The library compares the sizes with each other, and those of a packed matrix with what it says of itself.
    return _Part(
        matrix.data_ptr(), matrix.nbytes, *weights.shape, -1 if weights.is_packed else TYPES[matrix.dtype],
        None if weights.bias is None else weights.bias.data_ptr(),
    )  # fmt: skip
