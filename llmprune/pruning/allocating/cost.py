"""What an allocation costs, before it is made: passes, operations, and the hidden states of its variants."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmprune.models.decoder import prunable_matrices
from llmprune.models.source import Source
from llmprune.pruning.allocating.measuring import aside
from llmprune.pruning.allocating.pool import Pool, find_pool
from llmprune.pruning.jobs import Job
from llmprune.recipe.allocation import Allocation, Alpha, Atp, Search, Sensitivity, Uniform
from llmprune.recipe.recipe import Recipe
from llmprune.units import format_seconds, format_size

# Candidates that are measured together: those of ATP, and of each round of the search.
_SLOPES, _ROUNDS = 6, (7, 3, 6)


@dataclass(frozen=True, slots=True)
class AllocationCost:
    """The cost of an allocation, or of a sensitivity scan.

    Attributes:
        statistics_tokens: of the pass over the calibration text.
        tokens: of each of the other passes.
        passes: over the held-back text.
        variants: hidden states carried at once, beside the dense model's.
        operations: of all matmuls with decoder weights, and of eigenvalues.
        hidden_bytes: of the variants' hidden states.
    """

    statistics_tokens: int
    tokens: int
    passes: int
    variants: int
    operations: float
    hidden_bytes: int

    def sentence(self, rate: float, budget: int) -> str:
        """One line for people, which may follow a colon.

        Args:
            rate: operations per second.
            budget: bytes of hidden states that are kept in memory.
        """
        spilled = max(self.hidden_bytes - budget, 0)
        disk = f", {format_size(spilled)} of them in the temporary folder" if spilled else ""
        return (
            f"one pass over {self.statistics_tokens:,} calibration tokens, then "
            f"{self.passes} over {self.tokens:,} held-back tokens with up to {self.variants:,} variants of the model; "
            f"{self.operations / 1e12:,.2f} TFLOP, at least {format_seconds(self.operations / rate)} s; "
            f"{format_size(self.hidden_bytes)} of hidden states{disk}."
        )


def allocation_cost(source: Source, recipe: Recipe, pool: Pool) -> AllocationCost:
    """The cost of a recipe's allocation, which is not uniform.

    Args:
        source: the model; meta tensors suffice.
        recipe: with the sizes of its texts filled in.
        pool: from `find_pool`.
    """
    rounds = _rounds(recipe.allocation, pool)
    spectra = _eigenvalues(source, pool) if isinstance(recipe.allocation, Alpha) else 0.0
    return _cost(source, recipe, rounds, spectra)


def allocation_notes(recipe: Recipe, source: Source, jobs: Sequence[Mapping[str, Job]], rate: float) -> Iterator[str]:
    """What a forecast says about a recipe's allocation; nothing about uniform.

    Args:
        recipe: with the sizes of its texts filled in.
        source: the model; meta tensors suffice.
        jobs: what the recipe does to the matrices of each layer.
        rate: operations per second of a forward pass.
    """
    if isinstance(recipe.allocation, Uniform):
        return
    yield (
        f"With allocation {recipe.allocation.name} the sparsity of each matrix is decided during the run; the table "
        "has that of uniform. The number of zeros is the same."
    )
    if recipe.structures is None:
        cost = allocation_cost(source, recipe, find_pool(source, jobs))
        yield f"Before the first layer is pruned: {cost.sentence(rate, int(recipe.activation_budget))}"


def scan_cost(source: Source, recipe: Recipe, pool: Pool, levels: int) -> AllocationCost:
    """The cost of a sensitivity scan with so many levels of divergences; the arguments are as for `allocation_cost`."""
    return _cost(source, recipe, [(len(pool.units), _later_layers(pool))] * levels, 0.0)


def _cost(source: Source, recipe: Recipe, rounds: list[tuple[int, float]], more: float) -> AllocationCost:
    """Rounds are (variants, forward passes of the whole model that they amount to)."""
    length = recipe.calibration.tokens
    samples = recipe.calibration.sequences + recipe.held_back
    held_back = aside(samples, recipe.held_back)
    statistics, tokens = max(samples - held_back, 1) * length, held_back * length
    weights = sum(parameter.numel() for layer in source.layers for parameter in layer.parameters())
    head = source.model.get_output_embeddings()
    ends = 0 if head is None else head.weight.numel()
    # The dense model is run once for the statistics and once to advance, and beside the variants in every round.
    forward = 2 * weights * (2 * statistics + sum(1 + whole for _, whole in rounds) * tokens)
    heads = 2 * ends * tokens * sum(1 + variants for variants, _ in rounds)
    variants = max(number for number, _ in rounds)
    width = source.model.config.get_text_config(decoder=True).hidden_size
    hidden = (variants + 1) * tokens * width * source.dtype.itemsize
    return AllocationCost(statistics, tokens, len(rounds), variants, forward + heads + more, hidden)


def _rounds(allocation: Allocation, pool: Pool) -> list[tuple[int, float]]:
    beside: list[tuple[int, float]] = [(2, 2.0)]
    if isinstance(allocation, Search):
        every = [*_ROUNDS, *(allocation.offspring for _ in range(allocation.generations))]
        return [(number, float(number)) for number in every]
    if isinstance(allocation, Atp) and allocation.slope is None:
        return [(_SLOPES, float(_SLOPES))]
    if isinstance(allocation, Sensitivity) and allocation.file is None:
        return [(len(pool.units), _later_layers(pool)), *beside]
    return beside


def _later_layers(pool: Pool) -> float:
    """Whole models that variants amount to which each differ in one unit: the layers from its own to the last."""
    return sum((pool.layers - unit.layer) / pool.layers for unit in pool.units)


def _eigenvalues(source: Source, pool: Pool) -> float:
    """Operations for the eigenvalues of every matrix's smaller Gram."""
    wanted = {place.name for place in pool.places}
    total = 0.0
    for index, layer in enumerate(source.layers):
        for matrix in prunable_matrices(layer, f"{source.layers_path}.{index}"):
            if matrix.name in wanted:
                short, long = sorted(matrix.shape)
                total += 2 * short**2 * long + 4 / 3 * short**3
    return total
