"""The forms in which a packed matrix can be served, and the choice among them for each device.

A form determines what a layer holds in memory and how it multiplies. The forms are tried in the order of `FORMS`; each
that does not fit gives a reason, which `llmprune explain` shows.

    cusparselt  fragments, and a second copy for prefill with cuSPARSELt; only on request
    fragments   2:4 in the order of the sparse tensor cores (NVIDIA, 8.0 and up): decode reads 0.5625 of the bytes
    portable    2:4 as on disk, expanded inside the kernel: other GPUs
    blocks      block-sparse
    cpu-bitmask unstructured, on a CPU: decode reads 0.5625 of the bytes at 50 % sparsity
    cpu-nm      2:4 on a CPU: decode reads 0.5625 of the bytes
    cpu-int8    both with 8-bit weights: 0.32 of the bytes
    dense       an ordinary weight: if no sparse form is faster
    unpacked    as on disk, unpacked on each call: least memory, and slowest; only on request
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.utils._triton  # not imported by torch itself
from torch import Tensor
from torch.nn import functional as F

from llmprune.kernels import block_linear, nm_linear
from llmprune.kernels.nm_linear.fragments import from_fragments, to_fragments
from llmprune.serving import dense_product
from llmprune.serving.cpu_forms import CPU_FORMS, NOT_TWO_OF_FOUR
from llmprune.storage.formats import BlockLayout, Layout, NMLayout

Served = Literal["auto", "packed", "dense", "cusparselt"]

NOT_A_GPU = "made for a GPU"

# Below this sparsity in blocks a CPU multiplies the dense matrix faster (eval/bench/LOG.md).
CPU_BLOCK_SPARSITY = 0.9

# With smaller blocks or smaller matrices, the dense matmul is faster too (same log).
CPU_BLOCK_SIZE = 32
CPU_BLOCK_WEIGHTS = 1 << 20

# Below this many tokens, users report that the library is slower than the dense matmul (pytorch/pytorch#111339).
CUSPARSELT_TOKENS = 256

_ALGORITHMS: dict[tuple[torch.device, torch.dtype, tuple[int, int]], int] = {}

_HALF = (torch.bfloat16, torch.float16)


class Form(Protocol):
    """How one matrix is held and multiplied; stateless.

    Attributes:
        name: its name in `explain`.
        tested: whether a layer in this form is checked against the dense matmul when it is built.
    """

    name: ClassVar[str]
    tested: ClassVar[bool]

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        """Why this form cannot serve the matrix on this device; None if it can."""

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the tensors on disk to what the layer holds."""

    def restore(self, layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert what the layer holds back to the tensors on disk."""

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """X [..., in] times the transposed matrix, plus the bias [out]: [..., out]."""


class Fragments:
    """2:4 in the operand order of mma.sp, repacked once when the layer is built.

    Holds a, weights' dtype [out/16, in/256, 8, 32, 8], and e, int32 [out/16, in/256, 32, 4].
    """

    name: ClassVar[str] = "fragments"
    tested: ClassVar[bool] = True

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        return _not_two_of_four(layout) or _no_kernel(device, dtype, served) or nm_linear.supported(device)

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = stored["values"]
        nm_linear.reserve(values.device, *layout.shape)
        a, e = to_fragments(values, stored["meta"])
        # Viewed in the weights' dtype, so that the model finds that dtype.
        return {"a": a.view(values.dtype), "e": e}

    def restore(self, layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        a = held["a"]
        values, meta = from_fragments(a.view(torch.int32), held["e"], *layout.shape, a.dtype)
        return {"values": values, "meta": meta}

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_fragments(held["a"], held["e"], x, bias, layout.shape)


class Cusparselt(Fragments):
    """Fragments for decode; for prefill a second copy, compressed by cuSPARSELt: 1.125 times the dense bytes in total.

    Also holds compressed, weights' dtype, flat. The algorithm is searched once for each shape.
    """

    name: ClassVar[str] = "cusparselt"

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        if reason := super().refusal(layout, device, dtype, served):
            return reason
        if not torch.backends.cusparselt.is_available():
            return "this PyTorch has no cuSPARSELt"
        return None if not any(size % 64 for size in layout.shape) else "cuSPARSELt needs multiples of 64"

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**super().build(layout, stored), "compressed": torch._cslt_compress(layout.unpack(stored))}

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        count, compressed = len(tokens), held["compressed"]
        if count < CUSPARSELT_TOKENS:
            return super().multiply(layout, held, x, bias)
        # The library requires multiples of 8.
        tokens = F.pad(tokens, (0, 0, 0, -count % 8))
        key = x.device, x.dtype, layout.shape
        if key not in _ALGORITHMS:
            _ALGORITHMS[key] = int(torch._cslt_sparse_mm_search(compressed, tokens.t(), transpose_result=True))
        y = torch._cslt_sparse_mm(compressed, tokens.t(), bias=bias, transpose_result=True, alg_id=_ALGORITHMS[key])
        return y[:count].view(*x.shape[:-1], layout.shape[0])


class _AsOnDisk:
    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def restore(self, layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(held)


class Portable(_AsOnDisk):
    """2:4 as on disk, with workspace for its kernel."""

    name: ClassVar[str] = "portable"
    tested: ClassVar[bool] = True

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        return _not_two_of_four(layout) or _no_kernel(device, dtype, served)

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nm_linear.reserve(stored["values"].device, *layout.shape, portable=True)
        return dict(stored)

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        return nm_linear.linear_24_portable(x, held["values"], held["meta"], bias)


class BlockForm(_AsOnDisk):
    """Block-sparse as on disk."""

    name: ClassVar[str] = "blocks"
    tested: ClassVar[bool] = True

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        if not isinstance(layout, BlockLayout):
            return "not block-sparse"
        if device.type != "cpu" or served == "dense":
            return _no_kernel(device, dtype, served)
        return _too_dense_for_a_cpu(layout) if served == "auto" else None

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        block_linear.reserve(layout.shape[1], layout.shape[0], stored["values"])
        return dict(stored)

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(layout, BlockLayout)
        return block_linear.block_linear(
            x, held["values"], held["crow"], held["col"], bias, layout.shape[0], layout.per_row
        )


class Dense:
    """An ordinary weight [out, in]."""

    name: ClassVar[str] = "dense"
    tested: ClassVar[bool] = False

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        return "packed weights were requested" if served == "packed" else None

    def build(self, layout: Layout, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": layout.unpack(stored)}

    def restore(self, layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return layout.pack(held["weight"])

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        return dense_product.linear(x, held["weight"], bias)


class Unpacked(_AsOnDisk):
    """As on disk; each call unpacks the matrix and discards it."""

    name: ClassVar[str] = "unpacked"
    tested: ClassVar[bool] = False

    def refusal(self, layout: Layout, device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
        return None

    def multiply(self, layout: Layout, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, layout.unpack(held), bias)


FORMS: tuple[Form, ...] = (Cusparselt(), Fragments(), Portable(), BlockForm(), *CPU_FORMS, Dense(), Unpacked())


@dataclass(frozen=True, slots=True)
class Choice:
    """The form that a matrix gets.

    Attributes:
        form: the first of `FORMS` that does not refuse.
        refused: (form, reason) for each form before it.
    """

    form: Form
    refused: tuple[tuple[str, str], ...]


def choose_form(layout: Layout, device: torch.device, dtype: torch.dtype, served: Served = "auto") -> Choice:
    """Choose the form in which a matrix is served.

    Args:
        layout: of the matrix.
        device: where it will be.
        dtype: of its values.
        served: "auto": the fastest form; "packed": the one with the least memory; "dense": ordinary weights;
            "cusparselt": as auto, with a second copy for prefill.
    """
    refused: list[tuple[str, str]] = []
    for form in FORMS:
        if form.name == Cusparselt.name != served:
            continue
        reason = form.refusal(layout, device, dtype, served)
        if reason is None:
            return Choice(form, tuple(refused))
        refused.append((form.name, reason))
    raise AssertionError("the last form refuses nothing")


def multiply_fragments(a: Tensor, e: Tensor, x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Multiply by fragments in the layout of `Fragments`."""
    return nm_linear.linear_24(x, a.view(torch.int32), e, bias, *shape, a.dtype)


def _not_two_of_four(layout: Layout) -> str | None:
    if isinstance(layout, NMLayout) and (layout.keep, layout.of) == (2, 4):
        return None if layout.shape[1] % 8 == 0 else "the input dimension is not a multiple of 8"
    return NOT_TWO_OF_FOUR


def _too_dense_for_a_cpu(layout: BlockLayout) -> str | None:
    """Why the dense matmul is faster on a CPU; None if it is not."""
    rows, columns = layout.grid
    # Padding, and rounding to whole blocks, may leave slightly more blocks than requested.
    if layout.blocks > 1.02 * (1 - CPU_BLOCK_SPARSITY) * rows * columns:
        return f"a CPU is faster with the dense matrix below {CPU_BLOCK_SPARSITY:.0%} block sparsity"
    if layout.block < CPU_BLOCK_SIZE:
        return f"a CPU is faster with the dense matrix for blocks smaller than {CPU_BLOCK_SIZE}"
    if layout.shape[0] * layout.shape[1] < CPU_BLOCK_WEIGHTS:
        return "a CPU is faster with the dense matrix if it is as small as this one"
    return None


def _no_kernel(device: torch.device, dtype: torch.dtype, served: Served) -> str | None:
    if served == "dense":
        return "dense weights were requested"
    if device.type == "cpu":
        return NOT_A_GPU
    if dtype not in _HALF:
        return f"the kernels support bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        return "Triton is not installed, or does not run on this machine"
    return None if device.type == "cuda" else f"no kernel for {device.type}"
