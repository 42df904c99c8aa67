"""Measure kernel configurations and record the best, where `llmprune.kernels.configurations` finds them.

A search starts from the present configuration, calculated or recorded earlier, and varies one field after another,
keeping what is faster (coordinate descent): compiling all combinations would take most of the time. A configuration
that computes a wrong result is never kept. The number of tokens from which expanding the dense matrix is faster is
recorded as well.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune.errors import NumericsError
from llmprune.kernels import block_linear, configurations, nm_linear
from llmprune.measuring.bench.products import (
    Product,
    dense_operands,
    is_right,
    random_inputs,
    relative_error,
    served_bytes,
    sparse_candidate,
)
from llmprune.serving.fusion import FragmentFusion
from llmprune.serving.sparse_linear import SparseLinear
from llmprune.storage.files import listed
from llmprune.timing import Effort, time_calls

# Kernels are compiled, and choices recorded, for these numbers of tokens; fewer tokens run with the next higher choice.
DECODE_TOKENS = (8, 16, 32, 64)
BLOCK_TOKENS = (1, 8, 16, 32, 64, 256, 2048)

Values = Mapping[str, Sequence[int]]

# A candidate only counts as faster if it is so by more than the noise, or a search would wander with it.
_MARGIN = 0.99


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome for one operation, shape and number of tokens.

    Attributes:
        op: its name in `configurations`.
        shape: the sizes under which it is recorded.
        choice: the recorded choice.
        seconds: time of the choice.
        before_seconds: time of the previous configuration; infinite if it does not run here, or is wrong.
        tried: number of candidates measured, including the previous configuration.
        refused: those that could not run or were wrong, and why.
    """

    op: str
    shape: dict[str, int]
    choice: dict[str, Any]
    seconds: float
    before_seconds: float
    tried: int
    refused: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        before = self.before_seconds if self.before_seconds < math.inf else None
        return {**asdict(self), "before_seconds": before}


class Kernel(Protocol):
    """One operation, as the search sees it; `values` are the values to try for each field of its configuration."""

    op: ClassVar[str]
    tokens: ClassVar[tuple[int, ...]]
    values: ClassVar[Values]

    def shape(self, tokens: int) -> dict[str, int]:
        """The sizes under which a choice is recorded."""

    def present(self, tokens: int) -> Any:
        """The configuration in use now."""

    def fits(self, configuration: Any, tokens: int) -> bool:
        """Whether the kernel is made for this configuration."""

    def run(self, layer: SparseLinear, x: Tensor, configuration: Any) -> Tensor:
        """Multiply x by one copy of the layer."""

    def expanded(self, layer: SparseLinear, x: Tensor, scratch: Tensor) -> Tensor:
        """The other path of the operation: expand the dense matrix, and multiply with the library."""

    def dispatch(self) -> tuple[dict[str, int], int]:
        """The sizes under which the limit between both paths is recorded, and a limit that is never reached."""


class FragmentsKernel:
    """2:4 on sparse tensor cores; all layers of a fusion in one launch."""

    op: ClassVar[str] = "linear_24"
    tokens: ClassVar[tuple[int, ...]] = DECODE_TOKENS
    values: ClassVar[Values] = {"warps": (2, 4, 8, 16), "row_tiles": (1, 2, 4), "splits": (1, 2, 3, 4, 8)}

    def __init__(self, layer: SparseLinear) -> None:
        self._device = layer.device
        self._out, self._in = layer.fusion.shape if layer.fusion else layer.layout.shape

    def shape(self, tokens: int) -> dict[str, int]:
        return nm_linear.shape_key(self._out, self._in, tokens)

    def present(self, tokens: int) -> Any:
        return nm_linear.decode_configuration(self._device, self._out, self._in, tokens)

    def fits(self, configuration: Any, tokens: int) -> bool:
        from llmprune.kernels.nm_linear.decode import CHOICES, token_groups

        return (configuration.warps, configuration.row_tiles) in CHOICES[token_groups(tokens)]

    def run(self, layer: SparseLinear, x: Tensor, configuration: Any) -> Tensor:
        from llmprune.kernels.nm_linear.decode import linear_24_decode

        return linear_24_decode(x, *_fragments(layer), self._out, configuration)

    def dispatch(self) -> tuple[dict[str, int], int]:
        return {"out_features": self._out, "in_features": self._in}, nm_linear.HIGHEST_DECODE_TOKENS + 1

    def expanded(self, layer: SparseLinear, x: Tensor, scratch: Tensor) -> Tensor:
        from llmprune.kernels.nm_linear.expand import expand_fragments

        a, e, bias = _fragments(layer)
        expand_fragments(a, e, scratch)
        return F.linear(x, scratch, bias)


class PortableKernel:
    """2:4 in the layout on disk."""

    op: ClassVar[str] = "linear_24_portable"
    tokens: ClassVar[tuple[int, ...]] = DECODE_TOKENS
    values: ClassVar[Values] = {
        "rows": (32, 64, 128),
        "columns": (64, 128, 256),
        "splits": (1, 2, 4, 8, 16),
        "warps": (2, 4, 8),
    }

    def __init__(self, layer: SparseLinear) -> None:
        self._device = layer.device
        self._out, self._in = layer.layout.shape

    def shape(self, tokens: int) -> dict[str, int]:
        return nm_linear.shape_key(self._out, self._in, tokens)

    def present(self, tokens: int) -> Any:
        return nm_linear.portable_configuration(self._device, self._out, self._in, tokens)

    def fits(self, configuration: Any, tokens: int) -> bool:
        return configuration.splits * configuration.columns <= self._in

    def run(self, layer: SparseLinear, x: Tensor, configuration: Any) -> Tensor:
        from llmprune.kernels.nm_linear.portable import linear_24_decode_portable

        splits = configuration.splits
        partials = x.new_empty(splits, len(x), self._out, dtype=torch.float32) if splits > 1 else None
        held = layer.held
        return linear_24_decode_portable(x, held["values"], held["meta"], layer.bias, configuration, partials)

    def dispatch(self) -> tuple[dict[str, int], int]:
        return {"out_features": self._out, "in_features": self._in}, nm_linear.HIGHEST_DECODE_TOKENS + 1

    def expanded(self, layer: SparseLinear, x: Tensor, scratch: Tensor) -> Tensor:
        from llmprune.kernels.nm_linear.expand import expand

        expand(layer.held["values"], layer.held["meta"], scratch)
        return F.linear(x, scratch, layer.bias)


class BlockKernel:
    """Stored blocks."""

    op: ClassVar[str] = "block_linear"
    tokens: ClassVar[tuple[int, ...]] = BLOCK_TOKENS
    values: ClassVar[Values] = {
        "splits": (1, 2, 4, 8), "warps": (2, 4, 8), "stages": (2, 3, 4, 5), "step": (32, 64, 128),
        "rows": (16, 32, 64, 128), "tokens": (16, 32, 64, 128, 256), "group": (4, 16, 64),
    }  # fmt: skip

    def __init__(self, layer: SparseLinear) -> None:
        self._values, self._per_row = layer.held["values"], getattr(layer.layout, "per_row", None)
        self._out, self._in = layer.layout.shape

    def shape(self, tokens: int) -> dict[str, int]:
        return block_linear.measured_shape(tokens, self._in, self._out, self._values, self._per_row)

    def present(self, tokens: int) -> Any:
        return block_linear.choose_configuration(tokens, self._in, self._out, self._values, self._per_row)

    def fits(self, configuration: Any, tokens: int) -> bool:
        try:
            configuration.check(self._values.shape[-1])
        except ValueError:
            return False
        # Many tokens keep every multiprocessor busy without splits, whose partial sums would fill the memory.
        return tokens <= block_linear.DECODE_TOKENS or configuration.splits == 1

    def run(self, layer: SparseLinear, x: Tensor, configuration: Any) -> Tensor:
        from llmprune.kernels.block_linear.kernel import block_linear_allocating

        held = layer.held
        indices = held["crow"], held["col"]
        return block_linear_allocating(x, held["values"], indices, layer.bias, self._out, self._per_row, configuration)

    def dispatch(self) -> tuple[dict[str, int], int]:
        return block_linear.dispatch_shape(self._in, self._out, self._values), block_linear.NEVER

    def expanded(self, layer: SparseLinear, x: Tensor, scratch: Tensor) -> Tensor:
        held = layer.held
        block_linear.expand_into(scratch, held["values"], held["crow"], held["col"])
        return F.linear(x, scratch, layer.bias)


KERNELS: dict[str, Callable[[SparseLinear], Kernel]] = {
    "fragments": FragmentsKernel,
    "portable": PortableKernel,
    "blocks": BlockKernel,
}


@torch.inference_mode()
def tune_product(product: Product, effort: Effort) -> Iterator[Tuned]:
    """Search and record the configurations of one product of a model; a CPU has none.

    Args:
        product: of a loaded model.
        effort: for each timing.

    Yields:
        One outcome for each number of tokens, and one for the limit from which the dense matrix is expanded.

    Raises:
        NumericsError: no configuration works.
    """
    if not _has_configurations(product.layers[0].device):
        return
    layers = sparse_candidate(product)
    if layers is None or layers[0].form is None or layers[0].form.name not in KERNELS:
        return
    kernel = KERNELS[layers[0].form.name](layers[0])
    copies = _rotated(layers, effort)
    operands = dense_operands(layers)
    best: dict[int, float] = {}
    for tokens in kernel.tokens:
        tuned = _search(kernel, copies, operands, tokens, effort)
        configurations.record(kernel.op, operands[0].device, tuned.choice, **tuned.shape)
        best[tokens] = tuned.seconds
        yield tuned
    yield _dispatch(kernel, copies, operands[0], best, effort)


def _search(
    kernel: Kernel, copies: Sequence[SparseLinear], operands: tuple[Tensor, Tensor | None], tokens: int, effort: Effort
) -> Tuned:
    x = random_inputs(tokens, operands[0])
    exact = F.linear(x.float(), operands[0].float(), None if operands[1] is None else operands[1].float())
    allowed = relative_error(F.linear(x, *operands), exact)
    refused: list[str] = []
    times: dict[Any, float] = {}

    def timed(configuration: Any) -> float:
        if configuration not in times:
            times[configuration] = math.inf
            if problem := _problem(kernel, copies[0], x, configuration, exact, allowed):
                refused.append(f"{configuration}: {problem}")
            else:
                calls = [_call(kernel, layer, x, configuration) for layer in copies]
                times[configuration] = time_calls(calls, x.device, effort.seconds).median
        return times[configuration]

    present = chosen = kernel.present(tokens)
    timed(present)
    for field in fields(present):
        for value in kernel.values.get(field.name, ()):
            candidate = replace(chosen, **{field.name: value})
            if kernel.fits(candidate, tokens) and timed(candidate) < _MARGIN * timed(chosen):
                chosen = candidate
    if times[chosen] == math.inf:
        raise NumericsError(
            f"{kernel.op} with {tokens} tokens: none of {len(times)} configurations works here: {listed(refused)}",
            expected="a kernel that runs and agrees with the dense matmul",
            fix='serve the model with served="dense", and report the versions of torch, triton and the driver',
        )
    return Tuned(
        kernel.op, kernel.shape(tokens), asdict(chosen), times[chosen], times[present], len(times), tuple(refused)
    )


def _problem(
    kernel: Kernel, layer: SparseLinear, x: Tensor, configuration: Any, exact: Tensor, allowed: float
) -> str | None:
    """Why a configuration cannot be used; None if it can."""
    from triton.errors import TritonError  # type: ignore[import-untyped] # triton has no types

    try:
        error = relative_error(kernel.run(layer, x, configuration), exact)
    except (TritonError, ValueError) as refusal:
        # More shared memory or registers than there are; sizes that the kernel was not made for.
        return f"{type(refusal).__name__}: {refusal}"
    return None if is_right(error, allowed, x.dtype) else f"wrong by {error:.3g}"


def _dispatch(
    kernel: Kernel, copies: Sequence[SparseLinear], weight: Tensor, best: dict[int, float], effort: Effort
) -> Tuned:
    """Record the number of tokens from which expanding the matrix is faster.

    Numbers are tried from high to low, and the first at which the kernel is not slower ends the search: the
    cost of expanding does not fall with the number of tokens as the kernel's does, so it cannot win again below.
    """
    scratch = torch.empty_like(weight)
    shape, limit = kernel.dispatch()
    seconds = dense = 0.0
    for tokens in sorted(best, reverse=True):
        x = random_inputs(tokens, weight)
        calls = [_expanded_call(kernel, layer, x, scratch) for layer in copies]
        expanded = time_calls(calls, weight.device, effort.seconds).median
        if expanded >= _MARGIN * best[tokens]:
            break
        # What was measured for 64 tokens serves 33 to 64, in about the same time.
        limit, seconds, dense = tokens // 2 + 1, expanded, best[tokens]
    op = f"{kernel.op}.dispatch"
    configurations.record(op, weight.device, {"limit": limit}, **shape)
    return Tuned(op, shape, {"limit": limit}, seconds, dense, len(best), ())


def _has_configurations(device: torch.device) -> bool:
    return device.type == "cuda"


def _rotated(layers: tuple[SparseLinear, ...], effort: Effort) -> list[SparseLinear]:
    """Copies of the first layer, including the fusion that it belongs to."""
    count = effort.copies(served_bytes(layers), layers[0].device)
    return [layers[0], *(deepcopy(layers[0]) for _ in range(count - 1))]


def _fragments(layer: SparseLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands a, e and bias of a layer, or of the fusion that it belongs to."""
    if isinstance(layer.fusion, FragmentFusion):
        return layer.fusion.a.view(torch.int32), layer.fusion.e, layer.fusion.bias
    return layer.held["a"].view(torch.int32), layer.held["e"], layer.bias


def _call(kernel: Kernel, layer: SparseLinear, x: Tensor, configuration: Any) -> Callable[[], object]:
    return lambda: kernel.run(layer, x, configuration)


def _expanded_call(kernel: Kernel, layer: SparseLinear, x: Tensor, scratch: Tensor) -> Callable[[], object]:
    return lambda: kernel.expanded(layer, x, scratch)
