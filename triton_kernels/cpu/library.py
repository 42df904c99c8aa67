"""The functions of the compiled library, over the addresses of tensors."""

import contextlib
import ctypes
import mmap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {"bitmask": 0, "nm": 1}
_KIND_NAMES = tuple(KINDS)
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Columns of int8 weights whose products are added up as integers (source/matrix.h): groups that share a peak are whole
# ones of these, or a row.
FOLD = 128

# Of stored weights: int8 ones have peaks, of one of the types above.
STORED = {**TYPES, torch.int8: 3}
_DTYPES = tuple(STORED)

# The instruction sets by number; the rest of this module passes the number.
LEVELS = ("none", "AVX2", "AVX-512 with BF16")

# What `sweep` and `choose` take at most.
MOST_COLUMNS, MOST_GROUP = 256, 32

# One thread for each of these bytes: below, waking another one costs more than it reads.
THREAD_BYTES = 128 << 10

# Pages of this size are asked for where a matrix fills some of them.
_HUGE_PAGE = 2 << 20

_REFUSALS = {
    1: "a shape, a type or a number of matrices that does not go together",
    2: "a packed matrix that is damaged",
    3: "a tensor whose address is not aligned",
    4: "not enough memory",
    5: "no kernels for this processor",
}
_CORRUPT = 2

_address, _size, _number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "source": (ctypes.c_char_p, ()),
    "level": (_number, ()),
    "bytes": (_size, (_address,)),
    "pack": (_number, (*[_address] * 5, _number)),
    "unpack": (_number, (_address, _size, *[_address] * 3, _number)),
    "scratch": (_size, (_address, _size, _number, _size, _number)),
    "describe": (_number, (_address, _size, _address)),
    "multiply": (
        _number,
        (_address, _address, _size, _number, _address, _size, _size, *[_address] * 2, _size, _address, *[_number] * 2),
    ),
    "rows": (_number, (_address, _number, _size, _size, _address, _size, _address, _address, _number)),
    "layer_begin": (_number, (*[_address] * 5, *[_number] * 2)),
    "layer_end": (_number, (*[_address] * 5, _size, _address, ctypes.c_float, _address, *[_number] * 2)),
    "expand": (_number, (_address, *[_size] * 3, _address, _size, *[_number] * 2)),
    "sweep": (_number, (*[_address] * 5, *[_size] * 4, _number, _number)),
    "choose": (_number, (_address, *[_size] * 3, _address, _number)),
    "gram": (_number, (_address, _size, _size, _address, _address, _number, _number)),
    "gram_scratch": (_size, (_size, _size)),
    "stream": (ctypes.c_float, (_address, _size, _number)),
}


class CorruptMatrixError(ValueError):
    """The packed tensors contradict each other."""


class Described(NamedTuple):
    """A packed matrix.

    Attributes:
        kind: a key of `KINDS`.
        stored: the dtype of the stored weights.
        shape: (out, in).
        nonzeros: stored weights of a bitmask; 0 for 2:4.
        group: columns of int8 weights that share a peak; 0 for others.
        dtype: of the dense weights: that of the peaks, or of the stored weights.
    """

    kind: str
    stored: torch.dtype
    shape: tuple[int, int]
    nonzeros: int
    group: int
    dtype: torch.dtype

    @property
    def sizes(self) -> ctypes.Array[ctypes.c_int64]:
        """As the library takes them."""
        peaks = TYPES[self.dtype] if self.stored is torch.int8 else 0
        return (_size * 7)(KINDS[self.kind], STORED[self.stored], *self.shape, self.nonzeros, self.group, peaks)


class Library:
    """The functions of the compiled library; tensors are contiguous, on the CPU, and of the sizes that are named.

    Args:
        path: of the shared library.

    Attributes:
        level: the best instruction set of this processor that torch uses as well, as an index of `LEVELS`.
    """

    def __init__(self, path: Path) -> None:
        for openmp in sorted(Path(torch.__file__).parent.glob("lib/lib[gi]*omp*.so*")):
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)  # loaded already; its threads become visible
        shared = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(shared, f"llmprune_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)
        self.source: str = shared.llmprune_source().decode()
        # Whoever limits torch to AVX2 means all of the process.
        limited = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        self.level: int = min(shared.llmprune_level(), 1 if limited else 2)

    def pack(self, found: Described, bits: Tensor, values: Tensor, peaks: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Pack the tensors on disk.

        Args:
            found: what they are.
            bits: uint8, the mask or the meta.
            values: the stored weights.
            peaks: of int8 weights, [out, groups]; None for others.
            dtype: to view the result in; its size divides 64.

        Raises:
            CorruptMatrixError: mask or meta is not as its layout says.
            ValueError: there is no such matrix, or a tensor has another size.
        """
        bits, values = bits.contiguous(), values.contiguous()
        size = self.size(found)
        if size < 0:
            raise ValueError(f"no {found.kind} matrix of {found.shape} with {found.nonzeros} stored weights")
        (rows, columns), groups = found.shape, -(-found.shape[1] // found.group) if found.group else 0
        stored = found.nonzeros if found.kind == "bitmask" else rows * columns // 2
        sizes = bits.numel(), values.numel(), 0 if peaks is None else peaks.numel()
        if bits.dtype != torch.uint8 or sizes != (rows * -(-columns // 8), stored, rows * groups):
            shown = f"{sizes[0]} x {bits.dtype}, {sizes[1]} weights and {sizes[2]} peaks"
            raise ValueError(f"{shown} for a {found.kind} matrix of {found.shape} with {stored} stored weights")
        peaks = None if peaks is None else peaks.contiguous()
        packed, described = new_memory(size), found.sizes
        addresses = ctypes.addressof(described), bits.data_ptr(), values.data_ptr(), _pointer(peaks), packed.data_ptr()
        self._require(self._pack(*addresses, self.threads(size)))
        return packed.view(dtype)

    def size(self, found: Described) -> int:
        """Bytes of a packed matrix; negative if there is no such matrix."""
        sizes = found.sizes
        return int(self._bytes(ctypes.addressof(sizes)))

    def describe(self, packed: Tensor) -> Described:
        """What a packed matrix is, whatever dtype it is viewed in."""
        sizes = (_size * 7)()
        self._require(self._describe(packed.data_ptr(), packed.nbytes, ctypes.addressof(sizes)))
        kind, stored, rows, columns, nonzeros, group, peaks = sizes
        dtype = _DTYPES[peaks] if group else _DTYPES[stored]
        return Described(_KIND_NAMES[kind], _DTYPES[stored], (rows, columns), nonzeros, group, dtype)

    def shape(self, packed: Tensor) -> tuple[int, int]:
        """Rows and columns of a packed matrix: less work than `describe`, for each product."""
        sizes = (_size * 7)()
        if result := self._describe(packed.data_ptr(), packed.nbytes, ctypes.addressof(sizes)):
            self._require(result)
        return sizes[2], sizes[3]

    def unpack(self, packed: Tensor, bits: Tensor, values: Tensor, peaks: Tensor | None) -> None:
        """Write the tensors on disk; `bits` is zero before."""
        threads = self.threads(packed.nbytes)
        addresses = bits.data_ptr(), values.data_ptr(), _pointer(peaks)
        self._require(self._unpack(packed.data_ptr(), packed.nbytes, *addresses, threads))

    def multiply(
        self, packed: list[Tensor], x: Tensor, bias: Tensor | None, y: Tensor, level: int | None = None
    ) -> None:
        """Write x times the transposed matrices, plus the bias, to y.

        Args:
            packed: matrices of the same layout, type and columns.
            x: [tokens, in], bfloat16, float16 or float32.
            bias: [out] of all matrices, of x's dtype, or None.
            y: [tokens, out] of all matrices, of x's dtype; overwritten.
            level: the instruction set; None: the best.
        """
        level = self.level if level is None else level
        count, kind, tokens = len(packed), TYPES[x.dtype], len(x)
        addresses, sizes = (_address * count)(), (_size * count)()
        for place, matrix in enumerate(packed):
            addresses[place], sizes[place] = matrix.data_ptr(), matrix.nbytes
        needed = self._scratch(addresses[0], sizes[0], kind, tokens, level)
        if needed < 0:
            self._require(-needed)
        scratch = torch.empty(needed, dtype=torch.uint8, device=x.device) if needed else None
        if scratch is None and x.data_ptr() % 16:
            x = x.clone()
        result = self._multiply(
            addresses, sizes, count, kind, x.data_ptr(), tokens, x.shape[1], _pointer(bias), y.data_ptr(), y.shape[1],
            _pointer(scratch), level, self.threads(sum(sizes)),
        )  # fmt: skip
        if result:
            self._require(result)

    def multiply_rows(self, weight: Tensor, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write x times the transposed dense weight, plus the bias, to y.

        Args:
            weight: [out, in], bfloat16 or float16.
            x: [tokens, in], float32.
            bias: [out], float32, or None.
            y: [tokens, out], float32; overwritten.
        """
        (rows, columns), tokens = weight.shape, len(x)
        pointers = weight.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr()
        threads = self.threads(weight.nbytes)
        sizes = TYPES[weight.dtype], rows, columns
        self._require(self._rows(pointers[0], *sizes, pointers[1], tokens, *pointers[2:], threads))

    def begin_layer(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor) -> None:
        """Write the queries, keys and values of one token, which are turned by its position.

        All tensors are of the dtype of the layer's tokens.

        Args:
            layer: address of a `layers.TokenLayer`'s sizes and addresses.
            x: [1, 1, hidden].
            cos: [1, 1, width].
            sin: [1, 1, width].
            qkv: [1, heads of q, k and v, 1, width]; overwritten.
        """
        pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), qkv.data_ptr()
        if result := self._layer_begin(layer, *pointers, self.level, torch.get_num_threads()):
            self._require(result)

    def end_layer(
        self, layer: int, x: Tensor, q: Tensor, cached: tuple[Tensor, Tensor] | None, scale: float, y: Tensor
    ) -> None:
        """Write what a layer makes of one token, from its queries or from what attention has made of them.

        All tensors are of the dtype of the layer's tokens.

        Args:
            layer: address of a `layers.TokenLayer`'s sizes and addresses.
            x: [1, 1, hidden], its input.
            q: [1, heads, 1, width]: queries, or without `cached` what attention has made.
            cached: keys and values [1, heads of k, length, width], rows contiguous.
            scale: of scores.
            y: [1, 1, hidden]; overwritten.
        """
        keys = values = strides = None
        length = 0
        if cached is not None:
            length, (_, *of_keys, _), (_, *of_values, _) = cached[0].shape[2], cached[0].stride(), cached[1].stride()
            strides = (_size * 4)(*of_keys, *of_values)
            keys, values = cached[0].data_ptr(), cached[1].data_ptr()
        result = self._layer_end(
            layer, x.data_ptr(), q.data_ptr(), keys, values, length, strides, scale, y.data_ptr(), self.level,
            torch.get_num_threads(),
        )  # fmt: skip
        if result:
            self._require(result)

    def expand(self, packed: Tensor, rows: range, dense: Tensor, level: int | None = None) -> None:
        """Write rows of the dense matrix.

        Args:
            packed: the matrix.
            rows: they begin and end at multiples of 16, or at the end.
            dense: [rows, in], of the stored type; overwritten.
            level: the instruction set; None: the best.
        """
        level = self.level if level is None else level
        pointers, threads = (packed.data_ptr(), dense.data_ptr()), self.threads(dense.nbytes)
        self._require(
            self._expand(pointers[0], packed.nbytes, rows.start, rows.stop, pointers[1], dense.nbytes, level, threads)
        )

    def sweep(
        self,
        sums: Tensor,
        original: Tensor,
        upper: Tensor,
        importance: Tensor,
        keep: Tensor,
        group: tuple[int, int] | None,
        level: int | None = None,
    ) -> None:
        """Decide the columns of a block one after another: `kernels.obs_sweep.sweep_block`.

        Args:
            sums: [columns, rows], float32; at most `MOST_COLUMNS` columns.
            original: [columns, rows], float32.
            upper: [columns, columns], float32.
            importance: [columns], float32.
            keep: [columns, rows], bool.
            group: (N, M), M at most `MOST_GROUP`, or None.
            level: the instruction set; None: the best.
        """
        columns, rows = sums.shape
        operands = (sums, original, upper, importance, keep)
        wanted = ((columns, rows), (columns, rows), (columns, columns), (columns,), (columns, rows))
        dtypes = [one.dtype for one in operands]
        shapes = [tuple(one.shape) for one in operands if one.is_contiguous()]
        if shapes != list(wanted) or dtypes != [*[torch.float32] * 4, torch.bool]:
            found = f"{[list(one.shape) for one in operands]}, {dtypes}"
            raise ValueError(f"shapes {found}; expected {wanted}, float32 and for the mask bool, contiguous")
        result = self._sweep(
            *(tensor.data_ptr() for tensor in operands), columns, rows, *(group or (0, 0)),
            self.level if level is None else level, self.threads(columns * sums.nbytes),
        )  # fmt: skip
        self._require(result)

    def choose(self, scores: Tensor, keep: int) -> Tensor:
        """True for the `keep` highest of each group; of equal ones the last.

        Args:
            scores: [groups, of], float32, contiguous, no NaN; `of` at most `MOST_GROUP`.
            keep: at most `of`.

        Returns:
            [groups, of], bool.

        Raises:
            ValueError: the scores are of another dtype or layout, or the numbers do not go together.
        """
        if scores.dtype != torch.float32 or not scores.is_contiguous():
            raise ValueError(f"{scores.dtype} scores; expected contiguous float32")
        stays = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
        pointers, threads = (scores.data_ptr(), stays.data_ptr()), self.threads(scores.nbytes)
        self._require(self._choose(pointers[0], len(scores), int(keep), scores.shape[1], pointers[1], threads))
        return stays

    def add_gram(self, total: Tensor, x: Tensor) -> None:
        """Add the lower triangle of x^T x to `total` [width, width], float32; x is [tokens, width], bfloat16."""
        tokens, width = x.shape
        if (total.dtype, x.dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(f"sums of {total.dtype} for inputs of {x.dtype}; expected float32 for bfloat16")
        if total.shape != (width, width) or not (total.is_contiguous() and x.is_contiguous()):
            raise ValueError(f"sums of shape {list(total.shape)} for inputs of width {width}; expected both contiguous")
        scratch = torch.empty(self._gram_scratch(tokens, width), dtype=torch.uint8, device="cpu")
        pointers = total.data_ptr(), scratch.data_ptr()
        self._require(self._gram(x.data_ptr(), tokens, width, *pointers, self.level, self.threads(width * x.nbytes)))

    def stream(self, floats: Tensor) -> float:
        """Read memory as fast as possible: the sum of float32 numbers."""
        return float(self._stream(floats.data_ptr(), floats.numel(), torch.get_num_threads()))

    def threads(self, nbytes: int) -> int:
        """How many threads read this many bytes: torch's, or fewer where that would cost more than it saves."""
        return min(torch.get_num_threads(), 1 + nbytes // THREAD_BYTES)

    def _require(self, result: int) -> None:
        if result:
            error = CorruptMatrixError if result == _CORRUPT else ValueError
            raise error(f"the CPU kernels were given {_REFUSALS[result]}")


def new_memory(size: int) -> Tensor:
    """Bytes on the CPU, in huge pages if they are many: a look-up for each 4 KB costs a fifth of one token's time.

    They are aligned and never touched before, since the system gives few huge pages or none otherwise.
    """
    if size < 2 * _HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a system without them: only slower
        pages.madvise(mmap.MADV_HUGEPAGE, first, size // _HUGE_PAGE * _HUGE_PAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=first)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
