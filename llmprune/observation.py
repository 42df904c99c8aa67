"""Watch a decoder layer's matrix products and collect what its matrices read.

Weights are recognised by their storage, whichever operation reads them (Linear, Conv1D, `x @ w.T`, fused experts), and
matrices that read the same tensor form a group with one set of statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmprune.decoder import Matrix
from llmprune.errors import ModelError
from llmprune.statistics import ColumnNorm, Gram
from llmprune.timing import Stages

_MATMULS = {
    torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__,
}  # fmt: skip

# Rows of held-back inputs kept per group to measure the output error: plenty for a ratio of norms.
HELD_BACK_ROWS = 1024


class EveryMatrixSeenError(Exception):
    """Stops a forward whose remaining products nobody needs."""


@dataclass
class Group:
    """Matrices that read the same input.

    Attributes:
        names: matrices, in the order in which the layer uses them; the first one's calls feed the statistics.
        statistics: sums over the input rows, or None if no method needs any.
        held_back: input rows [rows, in] that the statistics did not see.
    """

    names: list[str]
    statistics: ColumnNorm | Gram | None
    held_back: list[Tensor] = field(default_factory=list)


class Observer(TorchFunctionMode):
    """Collects statistics while a decoder layer runs under it.

    Args:
        parameters: parameter name -> tensor, of the layer that will run.
        matrices: the matrices to watch.
        needs: matrix name -> the statistics to collect.
        stages: where the time of the sums is booked.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        matrices: Sequence[Matrix],
        needs: Mapping[str, type[ColumnNorm] | type[Gram] | None],
        stages: Stages,
    ) -> None:
        super().__init__()
        self._places = {_address(matrix.view(parameters[matrix.parameter])): matrix for matrix in matrices}
        self._fused: dict[int, list[Matrix]] = {}
        for matrix in matrices:
            if matrix.expert is not None:
                self._fused.setdefault(parameters[matrix.parameter].data_ptr(), []).append(matrix)
        self._needs, self._stages = needs, stages
        self._device = next(iter(parameters.values())).device
        self._group_of: dict[str, Group] = {}
        self._inputs: dict[tuple[object, ...], tuple[Tensor, Group]] = {}
        self._calls_in_batch: dict[str, int] = {}
        self._stoppable = False
        self.keep_rows = False
        self.groups: list[Group] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at matrix products on their way through."""
        kwargs = kwargs or {}
        if func is F.linear:
            self._see(args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"], linear=True)
        elif func is torch.addmm:
            self._see(args[1], args[2], linear=False)
        elif func in _MATMULS and isinstance(args[1] if len(args) > 1 else None, Tensor):
            self._see(args[0], args[1], linear=False)
        if self._stoppable and len(self._calls_in_batch) == len(self._needs):
            raise EveryMatrixSeenError
        return func(*args, **kwargs)

    def end_batch(self) -> None:
        """Close a batch; the tensors seen in it may be freed."""
        # When a full forward used each matrix exactly once, later ones may stop at the last of them.
        counts = self._calls_in_batch
        self._stoppable = len(counts) == len(self._needs) and set(counts.values()) == {1}
        self._calls_in_batch = {}
        self._inputs.clear()

    def finish(self) -> None:
        """Give every matrix a group; fused experts that no token reached get empty statistics.

        Raises:
            ModelError: an ordinary matrix took part in no matrix product.
        """
        for matrix in self._places.values():
            if matrix.name in self._group_of:
                continue
            if matrix.expert is None and ".experts." not in matrix.name:
                raise ModelError(
                    f"{matrix.name} took part in no matrix product during calibration",
                    expected="a weight that multiplies the layer's activations",
                    fix=f'leave it dense: exclude: ["{matrix.name}"]',
                )
            self._new_group(matrix)

    def _see(self, x: Tensor, weight: Tensor, *, linear: bool) -> None:
        if weight.dim() == 3 and weight.data_ptr() in self._fused and x.dim() == 3:
            for matrix, rows in zip(self._fused[weight.data_ptr()], x, strict=True):
                self._take(matrix, rows, weight.shape[-1] if linear else weight.shape[-2])
            return
        matrix = self._places.get(_address(weight))
        if matrix is not None:
            self._take(matrix, x, weight.shape[-1] if linear else weight.shape[-2])

    def _take(self, matrix: Matrix, x: Tensor, width: int) -> None:
        if width != matrix.shape[1]:
            raise ModelError(
                f"{matrix.name} multiplies inputs of width {width}, but its input dimension was taken for {matrix.shape[1]}",
                fix="the layout of this class is unknown: report it, and exclude the matrix meanwhile",
            )
        self._calls_in_batch[matrix.name] = self._calls_in_batch.get(matrix.name, 0) + 1
        group = self._group_of.get(matrix.name) or self._join(matrix, x)
        if group.names[0] == matrix.name and x.numel():
            with self._stages("gram"):
                rows = x.detach().reshape(-1, width)
                if self.keep_rows:
                    self._keep(group, rows)
                elif group.statistics is not None:
                    group.statistics.update(rows)

    def _join(self, matrix: Matrix, x: Tensor) -> Group:
        # The input is kept alive until the batch ends, so its address cannot be handed to another tensor meanwhile.
        key = (x.data_ptr(), x.shape[-1], x.numel(), x._version)
        if key in self._inputs and self._needs_same(matrix, self._inputs[key][1]):
            group = self._inputs[key][1]
            group.names.append(matrix.name)
        else:
            group = self._new_group(matrix)
            self._inputs[key] = x, group
        self._group_of[matrix.name] = group
        return group

    def _needs_same(self, matrix: Matrix, group: Group) -> bool:
        # A Gram holds the column norms too; the other way round the matrix gets statistics of its own.
        need = self._needs[matrix.name]
        return need is None or isinstance(group.statistics, need) or isinstance(group.statistics, Gram)

    def _new_group(self, matrix: Matrix) -> Group:
        need = self._needs[matrix.name]
        group = Group([matrix.name], None if need is None else need.empty(matrix.shape[1], self._device))
        self._group_of[matrix.name] = group
        self.groups.append(group)
        return group

    def _keep(self, group: Group, rows: Tensor) -> None:
        room = HELD_BACK_ROWS - sum(len(kept) for kept in group.held_back)
        if room > 0:
            step = max(len(rows) // room, 1)
            group.held_back.append(rows[::step][:room].clone())


def _address(weight: Tensor) -> tuple[int, int]:
    """Where a matrix begins in memory, and its size; the same for the matrix and its transpose."""
    return weight.data_ptr(), weight.numel()
