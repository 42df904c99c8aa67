"""What pruning needs to know about the dense model's loss: one backward pass, made before the first layer is pruned.

The pass ends at the first layer that is yet to be pruned, so that a resumed run only repeats what it needs; it is
deterministic, and reads the dense weights.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from llmprune.errors import CalibrationError
from llmprune.methods import gradient_kind, with_gradient
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.models.source import Source
from llmprune.progress import Progress
from llmprune.pruning.context import Run
from llmprune.pruning.jobs import Job
from llmprune.stream.activations import HiddenStates
from llmprune.stream.backward import BackwardStream, LayerGradients
from llmprune.structures.reduction import Reduction
from llmprune.text.tokens import Tokens

# Tokens that matter more for the loss than this fraction of all count like the last of these.
_CLIP_QUANTILE = 0.99


@dataclass(slots=True)
class DenseGradients:
    """What the backward pass has left.

    Attributes:
        importance: layer -> weight of each token in its statistics, float32 [samples, length].
        kept: the gradients of matrices, float32 [out, in], in memory up to a budget and on disk beyond it.
        places: matrix name -> its number in `kept`.
    """

    importance: dict[int, Tensor] = field(default_factory=dict)
    kept: HiddenStates = field(default_factory=lambda: HiddenStates(0))
    places: dict[str, int] = field(default_factory=dict)

    def bound(self, jobs: Mapping[str, Job]) -> dict[str, Job]:
        """The same jobs, with methods that read the gradients of their matrices."""
        return {
            name: replace(job, method=with_gradient(job.method, partial(self._read, name)))
            if gradient_kind(job.method) is not None
            else job
            for name, job in jobs.items()
        }

    def keep(self, name: str, gradient: Tensor) -> None:
        """Keep the gradient of one matrix."""
        self.places[name] = len(self.places)
        self.kept[self.places[name]] = gradient.float().contiguous()

    def _read(self, name: str) -> Tensor:
        return self.kept[self.places[name]]


def needs_gradients(jobs: Mapping[str, Job]) -> bool:
    """Whether a method of a layer reads gradients of its matrices."""
    return any(gradient_kind(job.method) is not None for job in jobs.values())


def needs_importance(loss_weight: str, jobs: Mapping[str, Job]) -> bool:
    """Whether a layer's statistics are weighted by the loss; `loss_weight` as in the recipe."""
    return loss_weight != "none" and any(job.needs is not None for job in jobs.values())


def dense_gradients(
    run: Run,
    source: Source,
    jobs: Sequence[Mapping[str, Job]],
    tokens: Tokens,
    done: Collection[str] = (),
    reduction: Reduction | None = None,
) -> DenseGradients:
    """Make the backward pass that a run needs; none, if neither methods nor statistics read gradients.

    Args:
        run: its context.
        source: the dense model.
        jobs: for each layer of the result, what is done to its matrices.
        tokens: the calibration text, validation sequences last.
        done: names of layers of the result that are not pruned in this run.
        reduction: which layers are left, and under which numbers; None: all.

    Raises:
        CalibrationError: sequences of one token have no loss.
        ModelError: layers pass more than hidden states to one another.
        NumericsError: an activation or a gradient is not finite.
    """
    found = DenseGradients(kept=HiddenStates(run.settings.activation_budget))
    numbers = {index: index for index in range(len(jobs))} if reduction is None else reduction.numbers
    left = {index: jobs[n] for index, n in numbers.items() if f"{source.layers_path}.{n}" not in done}
    scored = {index: _scored(source, index, own) for index, own in left.items() if needs_gradients(own)}
    weighted = [index for index, own in left.items() if needs_importance(run.recipe.statistics.loss_weight, own)]
    if not scored and not weighted:
        return found
    if tokens.ids.shape[1] < 2:
        raise CalibrationError(
            "the gradients of the loss need sequences of at least two tokens", fix="raise calibration.length"
        )

    def watch(what: str, done: int, total: int) -> None:
        run.watch(Progress(f"gradients, {what}", done, total, unit="sample" if what == "head" else "layer"))

    names = {index: sorted({matrix.parameter for matrix, _ in own}) for index, own in scored.items()}
    stream = BackwardStream(source, tokens.ids, run.settings, names, run.stages, watch, weighted)
    for layer in stream:
        for matrix, job in scored.get(layer.index, ()):
            found.keep(matrix.name, _gradient(layer, matrix, job))
        if layer.token_squares is not None:
            found.importance[layer.index] = importance(layer.token_squares)
    return found


def importance(squares: Tensor) -> Tensor:
    """Weights of tokens [samples, length] from mean squared gradients: clipped at the 99th percentile, 1 on average."""
    ranked = squares.flatten().sort().values
    clipped = squares.clamp(max=ranked[int(_CLIP_QUANTILE * (len(ranked) - 1))])
    mean = clipped.double().mean()
    return (clipped.double() / mean).float() if float(mean) > 0 else torch.ones_like(squares)


def _scored(source: Source, index: int, jobs: Mapping[str, Job]) -> list[tuple[Matrix, Job]]:
    matrices = prunable_matrices(source.layers[index], f"{source.layers_path}.{index}")
    return [(m, jobs[m.name]) for m in matrices if m.name in jobs and gradient_kind(jobs[m.name].method) is not None]


def _gradient(layer: LayerGradients, matrix: Matrix, job: Job) -> Tensor:
    both = layer.gradients[matrix.parameter]
    return matrix.view(both.mean if gradient_kind(job.method) == "mean" else both.mean_square)
