"""Observe a decoder layer's matmuls and collect statistics of the inputs of its matrices.

Weights are recognised by their storage, whichever operation reads them (Linear, Conv1D, `x @ w.T`, `w @ x`, fused
experts), and matrices that read the same tensor form a group with one set of statistics.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmprune.errors import ModelError
from llmprune.models.decoder import Matrix
from llmprune.patterns import keep_highest
from llmprune.statistics import ColumnNorm, Gram, mix
from llmprune.stream.weighting import TokenWeight, TokenWeighting
from llmprune.timing import Stages

# Functions that multiply two of their arguments -> index of the first of the two.
PRODUCTS = {
    torch.matmul: 0, torch.Tensor.matmul: 0, torch.Tensor.__matmul__: 0, torch.mm: 0, torch.Tensor.mm: 0,
    torch.bmm: 0, torch.Tensor.bmm: 0, torch.addmm: 1, torch.baddbmm: 1, torch.Tensor.baddbmm: 1,
}  # fmt: skip

# Rows of held-back inputs kept per group to measure the relative output error: plenty for a ratio of norms.
HELD_BACK_ROWS = 1024


class EveryMatrixSeenError(Exception):
    """Stops a forward pass once its remaining matmuls are not needed."""


@dataclass
class Group:
    """Matrices that read the same input.

    Attributes:
        names: matrices, in the order in which the layer uses them; the statistics come from the first one's calls.
        statistics: sums over the input rows; None if no method needs any.
        held_back: input rows [rows, in] that are excluded from the statistics.
        energies: mean square of each row that entered the statistics, before it was weighed.
        weighting: how rows are weighed.
        weighted: the same sums with each token weighted by its importance for the loss, until `finish` mixes them in.
        owner: the process that has the sums and solves, where several share the run.
    """

    names: list[str]
    statistics: ColumnNorm | Gram | None
    held_back: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    weighting: TokenWeighting = field(default_factory=TokenWeighting)
    weighted: ColumnNorm | Gram | None = None
    owner: int = 0

    @property
    def top_tokens(self) -> float | None:
        """The share of all squared activations that the largest 1 % of the tokens have, in [0, 1]; None without any."""
        if not self.energies:
            return None
        energies = torch.cat(self.energies).double()[None]
        largest = keep_highest(energies, energies.shape[1] - max(energies.shape[1] // 100, 1))
        total = float(energies.sum())
        return float(energies[largest].sum()) / total if total > 0 else 0.0


class Observer(TorchFunctionMode):
    """Collects statistics while a decoder layer runs inside it.

    Args:
        parameters: parameter name -> tensor, of the layer that will run.
        matrices: the matrices to observe.
        needs: matrix name -> the statistics to collect.
        stages: stopwatch, to which the time for the sums is added.
        token_weight: how tokens are weighed in the statistics.

    Attributes:
        importance: for each token of the current batch, its weight for the loss (`gradients.importance`), [tokens];
            the statistics become mixtures. None before the first batch: they do not. Routed experts, whose inputs are
            some of the tokens in an order of the model's own, keep the plain ones.
        dense: for the current batch, matrix name -> its inputs in the dense model, a tensor of rows for each of its
            matmuls; the Grams of these matrices then collect the inputs' errors (`Gram.errors`).
    """

    importance: Tensor | None = None
    dense: Mapping[str, Sequence[Tensor]] = MappingProxyType({})

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        matrices: Sequence[Matrix],
        needs: Mapping[str, type[ColumnNorm] | type[Gram] | None],
        stages: Stages,
        token_weight: TokenWeight = "none",
    ) -> None:
        super().__init__()
        self._token_weight: TokenWeight = token_weight
        # A weight is recognised by its memory address, however the layer's code accesses it: through a module, a
        # transpose or a slice. Module hooks would miss every matmul outside a module.
        views = [(matrix, matrix.view(parameters[matrix.parameter])) for matrix in matrices]
        self._places = {_address(view): (matrix, view.stride()) for matrix, view in views}
        # If all experts are multiplied at once, the weight is the whole parameter.
        self._fused: dict[tuple[int, int], list[tuple[Matrix, tuple[int, ...]]]] = {}
        for matrix, view in views:
            if matrix.expert is not None:
                self._fused.setdefault(_address(parameters[matrix.parameter]), []).append((matrix, view.stride()))
        self._needs, self._stages = needs, stages
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self.device = next(iter(parameters.values())).device
        self._group_of: dict[str, Group] = {}
        # For the current batch: tensors that were read, kept alive, with their groups; and each matrix's matmul count.
        self._inputs: dict[tuple[object, ...], tuple[Tensor, Group]] = {}
        self._calls_in_batch: dict[str, int] = {}
        self._stoppable = False
        self.keep_rows, self.rows_kept = False, HELD_BACK_ROWS
        self.groups: list[Group] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Inspect matmuls as they are called."""
        kwargs = kwargs or {}
        if func is F.linear:
            self._see(args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"])
        elif func in PRODUCTS:
            left, right = (*args, None, None)[PRODUCTS[func] :][:2]
            if isinstance(left, Tensor) and isinstance(right, Tensor) and min(left.dim(), right.dim()) > 1:
                # x @ w.T is linear(x, w); in w @ x the inputs are columns.
                self._see(left, right.mT)
                self._see(right.mT, left)
        if self._stoppable and len(self._calls_in_batch) == len(self._needs):
            raise EveryMatrixSeenError
        return func(*args, **kwargs)

    def end_batch(self) -> None:
        """End a batch; the tensors seen in it may be freed."""
        # If a full forward pass used each matrix exactly once, later passes may stop at the last of them.
        counts = self._calls_in_batch
        self._stoppable = len(counts) == len(self._needs) and set(counts.values()) == {1}
        self._calls_in_batch = {}
        self._inputs.clear()
        self.dense = MappingProxyType({})

    def regroup(self, groups: Sequence[Sequence[str]]) -> None:
        """Group matrices as given, in this order; those not seen here get empty statistics.

        Raises:
            ModelError: some of them share their inputs here, and not there.
        """
        found: list[Group] = []
        for names in groups:
            seen = {id(self._group_of[name]): self._group_of[name] for name in names if name in self._group_of}
            if len(seen) > 1 or any(name not in names for group in seen.values() for name in group.names):
                raise ModelError(
                    f"{', '.join(names)} read the same input for some of the texts only",
                    expected="matrices that share their inputs always or never, where several processes prune",
                    fix=f"prune in one process, or leave them dense: {_exclude(*(self._matrices[n] for n in names))}",
                )
            group = next(iter(seen.values()), None) or self._new_group(self._matrices[names[0]])
            group.names[:] = names
            self._group_of.update(dict.fromkeys(names, group))
            found.append(group)
        self.groups = found

    def finish(self) -> None:
        """Give every matrix a group; experts that received no token get empty statistics.

        Raises:
            ModelError: a matrix that belongs to no expert was not used in any matmul.
        """
        unused = [matrix for matrix, _ in self._places.values() if matrix.name not in self._group_of]
        if ordinary := [matrix for matrix in unused if matrix.kind is None]:
            raise ModelError(
                f"{ordinary[0].name} was not used in any matmul during calibration"
                + (f" (and {len(ordinary) - 1} more in its layer)" if ordinary[1:] else ""),
                expected="weights that multiply the layer's activations",
                fix=f"leave them dense: {_exclude(*ordinary)}",
            )
        for matrix in unused:
            self._new_group(matrix)
        for group in self.groups:
            if group.statistics is not None and group.weighted is not None:
                mix(group.statistics, group.weighted)
            group.weighted = None

    def _see(self, x: Tensor, weight: Tensor) -> None:
        """Inspect a matmul of inputs [..., in] and a weight [..., out, in]."""
        address = _address(weight)
        if address in self._places:
            self._take(*self._places[address], x, weight)
            return
        for matrix, stride in self._fused.get(address, ()):
            rows = x[matrix.expert].reshape(-1, x.shape[-1])
            # Tokens routed to other experts may be present as rows of zeros.
            sent = rows.any(-1)
            self._take(matrix, stride, rows if bool(sent.all()) else rows[sent], weight)

    def _take(self, matrix: Matrix, stride: tuple[int, ...], x: Tensor, weight: Tensor) -> None:
        if weight.shape[-2:] != matrix.shape or (weight.stride()[-2:] != stride and min(matrix.shape) > 1):
            raise ModelError(
                f"the layout of {matrix.name} is unknown: expected to be {matrix.shape} (out, in) with strides "
                f"{stride}, it is multiplied as {tuple(weight.shape[-2:])} with strides {weight.stride()[-2:]}",
                fix=f"report it, and leave such matrices dense until it is fixed: {_exclude(matrix)}",
            )
        self._calls_in_batch[matrix.name] = self._calls_in_batch.get(matrix.name, 0) + 1
        if not x.numel():
            return
        # A matrix joins a group at its first matmul and stays in it: the layer's code decides which inputs are shared.
        group = self._group_of.get(matrix.name) or self._join(matrix, x)
        if group.names[0] == matrix.name:
            with self._stages("gram"):
                rows = x.detach().reshape(-1, x.shape[-1])
                if self.keep_rows:
                    self._keep(group, rows)
                elif group.statistics is not None:
                    energies = rows.float().square().mean(-1)
                    group.energies.append(energies)
                    first = x.shape[-2] if x.dim() > 2 else len(rows)
                    error = self._error(matrix, rows)
                    if error is not None:
                        error = group.weighting(error, energies, first)
                    rows = group.weighting(rows, energies, first)
                    _add(group.statistics, rows, error)
                    if group.weighted is not None:
                        error = None if error is None else self._by_importance(matrix, error)
                        _add(group.weighted, self._by_importance(matrix, rows), error)

    def _error(self, matrix: Matrix, rows: Tensor) -> Tensor | None:
        """What the dense model has in place of these rows, minus them, in their dtype; None if it is not known."""
        if matrix.name not in self.dense:
            return None
        dense = self.dense[matrix.name][self._calls_in_batch[matrix.name] - 1]
        if dense.shape != rows.shape:
            raise ModelError(
                f"{matrix.name} has {len(rows)} inputs in a batch, and {len(dense)} in the dense model",
                expected="the same tokens in both models, where statistics.alpha is above 0",
                fix=f"set statistics.alpha: 0, or leave such matrices dense: {_exclude(matrix)}",
            )
        return (dense.float() - rows.float()).to(rows.dtype)

    def _join(self, matrix: Matrix, x: Tensor) -> Group:
        # The input is kept alive until the batch ends, so that its address is not reused by another tensor.
        key = (x.data_ptr(), x._version, _rows_layout(x))
        if key in self._inputs and self._needs_same(matrix, self._inputs[key][1]):
            group = self._inputs[key][1]
            group.names.append(matrix.name)
        else:
            group = self._new_group(matrix)
            self._inputs[key] = x, group
        self._group_of[matrix.name] = group
        return group

    def _needs_same(self, matrix: Matrix, group: Group) -> bool:
        # A Gram contains the column norms too; in the reverse case the matrix gets statistics of its own.
        need = self._needs[matrix.name]
        return need is None or isinstance(group.statistics, (need, Gram) if need is ColumnNorm else need)

    def _new_group(self, matrix: Matrix) -> Group:
        need = self._needs[matrix.name]
        statistics = None if need is None else need.empty(matrix.shape[1], self.device)
        group = Group([matrix.name], statistics, weighting=TokenWeighting(self._token_weight))
        if need is not None and self.importance is not None and not matrix.routed:
            group.weighted = need.empty(matrix.shape[1], self.device)
        self._group_of[matrix.name] = group
        self.groups.append(group)
        return group

    def _by_importance(self, matrix: Matrix, rows: Tensor) -> Tensor:
        assert self.importance is not None
        if len(rows) != len(self.importance):
            raise ModelError(
                f"{matrix.name} has {len(rows)} inputs for the {len(self.importance)} tokens of a batch",
                expected="one input for each token, where statistics.loss_weight is tokens",
                fix=f"set statistics.loss_weight: none, or leave such matrices dense: {_exclude(matrix)}",
            )
        return (rows.float() * self.importance.to(rows.device).sqrt()[:, None]).to(rows.dtype)

    def _keep(self, group: Group, rows: Tensor) -> None:
        room = self.rows_kept - sum(len(kept) for kept in group.held_back)
        if room > 0:
            # Spread over the batch, since neighbouring tokens are similar.
            step = max(len(rows) // room, 1)
            group.held_back.append(rows[::step][:room].clone())


class InputRecorder(Observer):
    """Keeps the inputs of matrices while a decoder layer runs inside it.

    Attributes:
        rows: for the current batch, matrix name -> the input rows of each of its matmuls, views of the layer's tensors.
    """

    rows: dict[str, list[Tensor]]

    def _take(self, matrix: Matrix, stride: tuple[int, ...], x: Tensor, weight: Tensor) -> None:
        self._calls_in_batch[matrix.name] = self._calls_in_batch.get(matrix.name, 0) + 1
        self.rows.setdefault(matrix.name, []).append(x.detach().reshape(-1, x.shape[-1]))


def _add(statistics: ColumnNorm | Gram, rows: Tensor, error: Tensor | None) -> None:
    """Add rows to statistics, and to those of the inputs' errors if they are known."""
    statistics.update(rows)
    if error is not None and isinstance(statistics, Gram):
        statistics.add_errors(error, rows)


def _address(weight: Tensor) -> tuple[int, int]:
    """The memory address of a matrix and its number of elements; the same for the matrix and its transpose."""
    return weight.data_ptr(), weight.numel()


def _rows_layout(x: Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes and strides of x [..., in], dimensions merged where possible: equal for all shapes of the same rows."""
    merged = [(x.shape[-1], x.stride(-1))]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        inner_size, inner_stride = merged[-1]
        if len(merged) > 1 and stride == inner_size * inner_stride:
            merged[-1] = size * inner_size, inner_stride
        elif size > 1:
            merged.append((size, stride))
    return tuple(merged)


def _exclude(*matrices: Matrix) -> str:
    """The line of a recipe that leaves these matrices, and their counterparts in other layers, dense."""
    globs = ["*" + re.split(r"\.\d+(?=\.)", matrix.kind or matrix.name, maxsplit=1)[-1] for matrix in matrices]
    return f"exclude: {json.dumps(list(dict.fromkeys(globs)))}"
