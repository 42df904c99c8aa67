"""The decoder layer that is on the device: observe its inputs, replace its matrices, run it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.errors import NumericsError
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.precision import dtype_name, float32_products
from llmprune.statistics import ColumnNorm, Gram, check_finite
from llmprune.stream.activations import HiddenStates
from llmprune.stream.observation import HELD_BACK_ROWS, EveryMatrixSeenError, Group, Observer
from llmprune.stream.shards import collect
from llmprune.stream.weighting import TokenWeight

if TYPE_CHECKING:
    from llmprune.stream.stream import Stream

Needs = Mapping[str, type[ColumnNorm] | type[Gram] | None]
DenseRows = Callable[[int], Mapping[str, Sequence[Tensor]]]


class ResidentLayer:
    """One decoder layer on the device.

    Attributes:
        name: dotted name in the model, for example "model.layers.3".
        index: its position in the stream.
        module: the layer itself.
        matrices: name -> its prunable matrices.
        replaced: the parameters in which a matrix was replaced.
        skipped: whether the next layer gets this one's inputs, as if this layer were removed.
    """

    def __init__(self, stream: "Stream", index: int) -> None:
        self.stream, self.index = stream, index
        self.replaced: set[str] = set()
        self.skipped = False
        self.become(stream.source.layers[index], f"{stream.source.layers_path}.{index}")

    def become(self, module: nn.Module, name: str) -> None:
        """Use another module, already on the device, as this layer from now on; its creator must free it.

        Args:
            module: takes the same arguments, and its parameters have the same names.
            name: dotted name of the layer.
        """
        self.module, self.name = module, name
        self.matrices: dict[str, Matrix] = {m.name: m for m in prunable_matrices(module, name)}
        self._parameters = dict(module.named_parameters())

    def observe(
        self,
        needs: Needs,
        token_weight: TokenWeight = "none",
        batches: int | None = None,
        importance: Tensor | None = None,
        dense: DenseRows | None = None,
        *,
        everywhere: bool = False,
    ) -> list[Group]:
        """Run the layer over all batches and collect statistics.

        Where several processes share the run, each group has an owner, which gets its sums.

        Args:
            needs: matrix name -> the statistics it needs; matrices left out are not watched.
            token_weight: how tokens are weighed in the statistics, see `statistics.TokenWeighting`.
            importance: weight of each token [samples, length] for the loss; None: all count the same.
            batches: run only this many, to see which matrices share an input; None: all.
            dense: gives the inputs in the dense model for a batch (`paired.dense_rows`), of which Grams then collect
                the differences; None: they do not.
            everywhere: every process gets the sums, not only the owner.

        Returns:
            The groups of matrices that share an input, in the order in which the layer uses them.

        Raises:
            NumericsError: an activation is NaN or infinite; names the matrix.
            ModelError: a matrix was not used in any matmul.
        """
        watched, stages = [self.matrices[name] for name in needs], self.stream.stages
        ranks = self.stream.settings.ranks
        observer = Observer(self._parameters, watched, needs, stages, token_weight)
        observer.rows_kept = -(-HELD_BACK_ROWS // ranks.size)
        with torch.no_grad(), self.stream.stages("forward"):
            for batch in self.stream.told_batches():
                if batches is not None and batch >= batches:
                    break
                observer.keep_rows = batch >= self.stream.statistics_batches
                if importance is not None:
                    first, samples = batch * self.stream.settings.batch_size, len(self.stream.batches[batch])
                    observer.importance = importance[first : first + samples].flatten()
                if dense is not None and not observer.keep_rows:
                    observer.dense = dense(batch)
                with contextlib.suppress(EveryMatrixSeenError), observer:
                    self.forward(self.stream.hidden[batch], batch)
                observer.end_batch()
        if ranks.size > 1:
            with stages("merge"):
                collect(observer, ranks, self.matrices, everywhere=everywhere)
        observer.finish()
        for group in observer.groups:
            if group.statistics is not None and (everywhere or group.owner == ranks.rank):
                self._check(group.statistics.squares, f"the input of {', '.join(group.names)}")
        return observer.groups

    def weight(self, name: str) -> Tensor:
        """The matrix as float32 [out, in], a copy.

        Raises:
            NumericsError: it holds NaN or infinity.
        """
        # A copy already, unless the layer is float32.
        weight = self._view(name).float()
        self._check(weight, f"the weight of {name}")
        return weight.clone() if weight.data_ptr() == self._view(name).data_ptr() else weight

    def replace(self, name: str, weight: Tensor) -> None:
        """Replace a matrix by another [out, in], rounded to the dtype in which it will be stored.

        Raises:
            NumericsError: a rounded value is NaN or infinite.
        """
        parameter = self.matrices[name].parameter
        # Rounded now, not on writing: later layers must be calibrated on the weights that will be loaded.
        rounded = weight.to(self.stream.source.stored_dtype(self.index, parameter))
        check_finite(rounded, f"{name}, pruned and stored in {dtype_name(rounded.dtype)},")
        with torch.no_grad():
            self._view(name).copy_(rounded)
        self.replaced.add(parameter)

    def receive(self, name: str, owner: int) -> None:
        """Take over a matrix that another process has replaced by `replace`; all call this, and the owner gives it."""
        view, ranks = self._view(name), self.stream.settings.ranks
        sent = view.contiguous()
        ranks.send(sent, owner)
        if ranks.rank != owner:
            with torch.no_grad():
                view.copy_(sent)
        self.replaced.add(self.matrices[name].parameter)

    def count_zeros(self, name: str) -> int:
        """The number of zeros currently in the matrix."""
        view = self._view(name)
        return view.numel() - int(view.count_nonzero())

    def output_error(self, group: Group, name: str, original: Tensor) -> float | None:
        """Relative output error ||(W - V) X||^2 / ||W X||^2, W the original [out, in], V the current matrix.

        X are the held-back rows. Without them the Gram of the statistics is used; None if there is neither.
        """
        difference = original - self._view(name).float()
        rows = torch.cat(group.held_back) if group.held_back else None
        if rows is not None:
            # Three digits of the ratio are enough, so bfloat16 will do.
            with float32_products("bf16" if rows.dtype == torch.bfloat16 else "ieee"):
                lost = (rows.float() @ difference.T).square().sum()
                total = (rows.float() @ original.T).square().sum()
        elif isinstance(group.statistics, Gram) and group.statistics.tokens:
            gram = group.statistics.products
            lost = ((difference @ gram) * difference).sum()
            total = ((original @ gram) * original).sum()
        else:
            return None
        # A total that is NaN is no 0: the ratio is NaN, too, and refused.
        return 0.0 if float(total) <= 0 else float(lost / total)

    def advance(self, states: HiddenStates | None = None) -> None:
        """Run the layer in its current state; its outputs replace its inputs.

        Args:
            states: hidden states other than the stream's own, for a model that differs in some earlier layer.
        """
        hidden = self.stream.hidden if states is None else states
        with torch.no_grad(), self.stream.stages("forward"):
            for batch in self.stream.told_batches():
                output = self.stream.calls.carry(self.index, batch, self.forward(hidden[batch], batch))
                self._check(output, f"the output of {self.name}")
                hidden[batch] = output

    def forward(self, hidden: Tensor, batch: int) -> Any:
        """Call the layer with hidden states [samples, length, hidden] and what the model passes to it in this batch."""
        args, kwargs = self.stream.calls.get(self.index, batch)
        return self.module(hidden.to(self.stream.settings.device), *args, **kwargs)

    def _view(self, name: str) -> Tensor:
        matrix = self.matrices[name]
        return matrix.view(self._parameters[matrix.parameter].detach())

    def _check(self, values: Tensor, what: str) -> None:
        try:
            check_finite(values, what)
        except NumericsError as error:
            # If a parameter is the cause, naming the activation in which it first shows would mislead.
            for name, parameter in self._parameters.items():
                check_finite(parameter, f"{self.name}: the parameter {name}")
            raise error.at(self.name) from None
