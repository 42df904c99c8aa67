"""What the backward pass of the dense model costs that some methods and statistics read.

    peak = inputs of all layers (at most half of activation_budget)
         + hidden states in transit (at most the other half) + what is kept (at most activation_budget)
         + max(ends, max over layers of
               (weights + sums of gradients and their squares + gradients + activations))

Activations are of one sample, and count the inputs and outputs of a layer's matrices twice; scores of attention are not
counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmprune.methods import gradient_kind
from llmprune.models.decoder import prunable_matrices
from llmprune.models.sizes import ends_bytes
from llmprune.models.source import Source
from llmprune.pruning.gradients import needs_gradients, needs_importance
from llmprune.pruning.jobs import Job
from llmprune.recipe.recipe import Recipe
from llmprune.units import format_size


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """The pass, before anything is pruned.

    Attributes:
        passes: what it costs, in forward passes over all layers; 0: it is not made.
        kept: bytes that it leaves in memory.
        spilled: bytes that it leaves on disk.
        peak: bytes in memory while it is made.
    """

    passes: int = 0
    kept: int = 0
    spilled: int = 0
    peak: int = 0

    @property
    def note(self) -> str:
        """For people."""
        kept = f"{format_size(self.kept)} in memory" + (
            f" and {format_size(self.spilled)} on disk" if self.spilled else ""
        )
        return (
            "Before the first layer is pruned, a forward and a backward pass of the dense model, sample by sample, "
            f"take about {format_size(self.peak)} and as long as {self.passes} forward passes; they leave {kept}."
        )


def plan_backward(source: Source, recipe: Recipe, jobs: Sequence[Mapping[str, Job]], hidden_bytes: int) -> BackwardPlan:
    """Apply the formula; all zeros if the recipe reads no gradients.

    Args:
        source: the dense model.
        recipe: with the lengths of its texts resolved.
        jobs: for each layer, what is done to its matrices.
        hidden_bytes: hidden states of all calibration sequences at one layer.
    """
    scored = any(needs_gradients(own) for own in jobs)
    weighted = [own for own in jobs if needs_importance(recipe.statistics.loss_weight, own)]
    if not scored and not weighted:
        return BackwardPlan()
    length, budget, largest, gradients = recipe.calibration.tokens, int(recipe.activation_budget), 0, 0
    for index, layer in enumerate(source.layers):
        own = jobs[index] if index < len(jobs) else {}
        matrices = list(prunable_matrices(layer, f"{source.layers_path}.{index}"))
        read = [m for m in matrices if m.name in own and gradient_kind(own[m.name].method) is not None]
        elements = sum(m.shape[0] * m.shape[1] for m in read)
        gradients += 4 * elements
        itemsize = source.dtype.itemsize
        activations = 2 * itemsize * length * sum(sum(m.shape) for m in matrices if not m.routed)
        weights = sum(parameter.numel() for parameter in layer.parameters()) * itemsize
        largest = max(largest, weights + (8 + itemsize) * elements + activations)
    importance = 4 * recipe.calibration.sequences * length * len(weighted)
    kept = min(gradients, budget)
    transit = min(hidden_bytes * len(source.layers), budget // 2) + min(hidden_bytes, budget // 2)
    # The forward pass, the layers run once more, and the gradients of their inputs and, if read, of their weights.
    return BackwardPlan(
        passes=4 if scored else 3,
        kept=kept + importance,
        spilled=gradients - kept,
        peak=transit + kept + importance + max(ends_bytes(source), largest),
    )
