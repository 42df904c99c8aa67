"""Drive a stream through all decoder layers: prune each, or replay what an interrupted run has committed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmprune.devices import PeakWatch, warm_up
from llmprune.errors import ModelError
from llmprune.models.sizes import ends_bytes
from llmprune.models.source import Source
from llmprune.progress import Progress
from llmprune.pruning.context import Run
from llmprune.pruning.fitting import Fitting
from llmprune.pruning.forecast.memory import (
    LayerMemory,
    layer_memory,
    library_bytes,
    matching_memory,
    predict_peak,
    replacing_memory,
)
from llmprune.pruning.gradients import DenseGradients
from llmprune.pruning.jobs import Job
from llmprune.pruning.quantising import quantise_fitted
from llmprune.pruning.solving import solve_in_turn, solve_layer
from llmprune.pruning.targets import Targets, advance_removed
from llmprune.pruning.writing import Writer
from llmprune.storage.output import OutputFolder
from llmprune.storage.report import MatchRow, MatrixRow, StructureRow
from llmprune.stream.activations import HiddenStates
from llmprune.stream.observation import Group
from llmprune.stream.paired import frozen
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.structures.plan import consumer_shapes
from llmprune.structures.reduction import Reduction
from llmprune.structures.remove.cuts import Cut
from llmprune.text.tokens import Tokens


@dataclass(frozen=True, slots=True)
class PrunedLayers:
    """The results of all layers.

    Attributes:
        rows: one per pruned matrix, in the order of the layers.
        structures: one per structure from which groups were removed.
        matches: one per layer that was fitted as a whole.
        memory: predicted, measured, baseline and resident bytes, as in the report.
        sizes: of the layers that were pruned in this run, what the prediction is based on.
    """

    rows: tuple[MatrixRow, ...]
    structures: tuple[StructureRow, ...]
    matches: tuple[MatchRow, ...]
    memory: dict[str, int]
    sizes: tuple[LayerMemory, ...]


class LayerDriver:
    """Prunes the layers of one run.

    Args:
        run: its context.
        source: the streamed layers, at full size.
        jobs: for each layer of the result, what is done to its matrices.
        tokens: the calibration text.
        writer: commits layers; None: the model is in memory, and stays there.
        reduction: removes structures from the layers first; None: no structures are removed.
        dense: opens the dense model again, where layers that are fitted may have been committed before.
        gradients: of the dense model, if methods or statistics read them.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        jobs: Sequence[dict[str, Job]],
        tokens: Tokens,
        writer: Writer | None = None,
        reduction: Reduction | None = None,
        dense: Callable[[], Source] | None = None,
        gradients: DenseGradients | None = None,
    ) -> None:
        self._gradients = gradients or DenseGradients()
        self._run, self._source, self._jobs, self._writer, self._reduction = run, source, jobs, writer, reduction
        self._stream = Stream(source, tokens.ids, run.shared, run.stages)
        self._memories: list[LayerMemory] = []
        self._rows: list[MatrixRow] = []
        self._structures: list[StructureRow] = []
        self._matches: list[MatchRow] = []
        options, self._alpha = run.recipe.reconstruct, run.recipe.statistics.alpha
        target = None if options is None else options.target
        self._targets = Targets(target, self._stream, dense, paired=self._alpha > 0)
        self._fitting = None if options is None else Fitting(options, self._targets, self._stream)
        self._place, self._step = 0, "embeddings"
        self._stream.tell = lambda words: self._report(f"{self._step}, {words}")

    def drive(self) -> PrunedLayers:
        """Stream the layers, prune each, and commit it if there is a target.

        Raises:
            NumericsError: a value is not finite, or a Gram matrix is not positive definite with any damping.
        """
        self._report(self._step)
        if self._run.device.type == "cpu":
            # Libraries keep some memory from their first products on: it is no part of what the layers take.
            warm_up(self._source.dtype)
        with PeakWatch(self._run.device) as memory:
            self._stream.memory = memory
            for layer in self._stream:
                number = layer.index if self._reduction is None else self._reduction.numbers.get(layer.index)
                if number is None:
                    self._targets.follow(layer, dense=True)
                    layer.skipped = True
                    continue
                name = f"{self._source.layers_path}.{number}"
                if self._writer is not None and name in self._writer.target.layers:
                    self._replay(layer, self._writer.target, name)
                else:
                    self._prune(layer, self._jobs[number])
                self._tell(layer, "advancing")
            if self._reduction is not None:
                self._reduction.free()
        layers = len(self._source.layers)
        self._place = layers
        self._report("")
        return PrunedLayers(
            tuple(self._rows),
            tuple(self._structures),
            tuple(self._matches),
            self._measured(memory),
            tuple(self._memories),
        )

    def _replay(self, layer: ResidentLayer, target: OutputFolder, name: str) -> None:
        """Reuse what an interrupted run has committed."""
        self._tell(layer, "replaying")
        self._targets.follow(layer, dense=self._reduction is not None)
        if self._reduction is not None:
            self._reduction.replay(layer)
        committed = target.layers[name]
        self._rows += committed.rows
        self._structures += committed.structures
        self._matches += committed.matches

    def _prune(self, layer: ResidentLayer, jobs: dict[str, Job]) -> None:
        stream, recipe = self._stream, self._run.recipe
        jobs = self._gradients.bound(jobs)
        batch_tokens = stream.batches[0].numel()
        held_back = recipe.held_back * stream.batches[0].shape[1]

        def tell(step: str) -> None:
            self._tell(layer, step)

        after = self._ahead(layer)
        # The dense layer runs once more after its matrices have been compared, if they are.
        dense = frozen(layer) if self._alpha and jobs else None
        states = None
        if dense is None:
            if recipe.hidden_sets > 1:
                tell("dense outputs")
            states = self._prepare(layer, after)
        matches = self._replace(layer, after, states, tell)
        cuts: list[Cut] = []
        removed: list[StructureRow] = []
        if self._reduction is not None:
            consumers = consumer_shapes(self._reduction.found, layer.index)
            sizes = layer_memory(layer, [], {}, batch_tokens, held_back, consumers)
            if after:
                replacing = replacing_memory(layer, self._reduction.found, recipe.reconstruct, sizes, batch_tokens)
                sizes = replace(sizes, replacing=replacing)
            self._memories.append(sizes)
            cuts, removed = self._reduction.reduce(layer, recipe.experts.min_tokens, tell)
        fitted = self._fitted(layer, jobs)
        rows = self._solve(layer, jobs, fitted, tell, dense)
        if dense is not None:
            tell("dense outputs")
            states, dense = self._prepare(dense, after), None
        # What is excluded as a whole stays as it is, down to its norms.
        if self._fitting is not None and states is not None and fitted:
            matches += self._fitting.match(layer, states, fitted, tell)
            # A trained weight may round to zero.
            rows = [replace(row, zeros=layer.count_zeros(row.name)) for row in rows]
        weight, least = recipe.statistics.token_weight, recipe.experts.min_tokens
        rows = quantise_fitted(layer, jobs, rows, weight, least, tell)
        if self._writer is not None:
            tell("writing")
            with self._run.stages("write"):
                self._writer.commit(layer, rows, jobs, cuts, removed, matches)
        self._matches += matches
        self._rows += rows
        self._structures += removed

    def _prepare(self, layer: ResidentLayer, removed: Sequence[int]) -> tuple[HiddenStates, HiddenStates] | None:
        """Run a layer that is dense yet; what to run the pruned one on, and what it should return, if it is fitted."""
        return (self._targets if self._fitting is None else self._fitting).prepare(layer, removed)

    def _ahead(self, layer: ResidentLayer) -> tuple[int, ...]:
        """The removed layers directly after a kept one, whose outputs it should give; as far as they can be run now."""
        if self._reduction is None:
            return ()
        # What layers pass each other is known as each has run: those ahead would read, and then drop, too much of it.
        linked = self._stream.calls.linked
        if linked and self._reduction.replaces:
            raise ModelError(
                f"{layer.name} cannot stand for removed layers: layers pass each other more than hidden states",
                expected="layers that pass each other only hidden states",
                fix="leave replace out of structures.depth",
            )
        return () if linked else self._reduction.removed_after(layer.index)

    def _replace(
        self,
        layer: ResidentLayer,
        removed: Sequence[int],
        states: tuple[HiddenStates, HiddenStates] | None,
        tell: Callable[[str], None],
    ) -> list[MatchRow]:
        """Let a dense layer stand for the removed ones after it, before anything is removed from itself."""
        if not removed or self._reduction is None or not self._reduction.replaces:
            return []
        tell(f"replacing {len(removed)} removed layers")
        if states is None:
            states = self._stream.hidden, self._stream.hidden.copy()
            layer.advance(states[1])
            advance_removed(self._stream, removed, states[1])
        return [self._reduction.replace(layer, *states)]

    def _fitted(self, layer: ResidentLayer, jobs: Collection[str]) -> Collection[str]:
        """The matrices that may be trained: those with a job; of a layer that only lost structures, all."""
        return jobs or (() if self._reduction is None else layer.matrices)

    def _solve(
        self,
        layer: ResidentLayer,
        jobs: dict[str, Job],
        fitted: Collection[str],
        tell: Callable[[str], None],
        dense: ResidentLayer | None,
    ) -> list[MatrixRow]:
        """Collect statistics and prune the matrices, all of them at once or in turn; `dense` stays as it is."""
        recipe, stream = self._run.recipe, self._stream
        weight, least = recipe.statistics.token_weight, recipe.experts.min_tokens
        batch_tokens = stream.batches[0].numel()
        held_back = recipe.held_back * stream.batches[0].shape[1]
        importance = self._gradients.importance.get(layer.index)
        paired = None if dense is None else partial(self._targets.rows, dense)
        groups: list[Group] | None = None  # in turn: the formula for all inputs at once is an upper bound
        if not recipe.statistics.sequential:
            tell("statistics")
            needs = {name: job.needs for name, job in jobs.items()}
            compared = None if paired is None else paired(jobs)
            groups = layer.observe(needs, weight, importance=importance, dense=compared) if jobs else []
        parts = None if self._fitting is None else self._fitting.parts(layer.index)
        memory = layer_memory(layer, groups, jobs, batch_tokens, held_back, options=recipe.statistics)
        matching = matching_memory(layer, fitted, recipe.reconstruct, batch_tokens, parts)
        self._memories.append(replace(memory, matching=matching))
        if groups is None:
            given = weight, least, self._run.stages, tell, importance, paired, self._alpha
            return solve_in_turn(layer, jobs, *given) if jobs else []
        return solve_layer(layer, groups, jobs, least, self._run.stages, tell, self._alpha)

    def _measured(self, memory: PeakWatch) -> dict[str, int]:
        held = self._run.recipe.hidden_sets * self._stream.hidden.resident_bytes, self._stream.calls.nbytes
        return {
            "predicted_bytes": predict_peak(
                ends_bytes(self._source), *held, self._memories, library_bytes(self._run.device)
            ),
            "measured_bytes": memory.peak - memory.baseline,
            "baseline_bytes": memory.baseline,
            "resident_bytes": memory.resident,
        }

    def _tell(self, layer: ResidentLayer, step: str) -> None:
        self._place, self._step = layer.index, step
        self._report(step)

    def _report(self, step: str) -> None:
        self._run.watch(Progress("pruning", self._place, len(self._source.layers), step, self._mean_error()))

    def _mean_error(self) -> float | None:
        """The mean relative output error of all rows so far; None before the first that has one."""
        errors = [row.error for rows in (self._structures, self._rows) for row in rows if row.error is not None]
        return sum(errors) / len(errors) if errors else None
