"""How a run's time is divided among its stages, from shapes alone: what an estimate of the time left begins with.

The unit is an operation of a forward pass. What else a stage does is worth some of them, as measured on CPUs with
SmolLM2-135M and a Llama of 1.2 billion parameters; whoever uses the shares corrects them by the stages that have ended
(`llmprune.cli.pace`), so only stages that differ from all others have to be about right.
"""

from collections.abc import Mapping, Sequence

import torch

from llmprune.measuring.answers import TOKENS
from llmprune.models.decoder import prunable_matrices
from llmprune.models.sizes import active_experts, flops, layer_size
from llmprune.models.source import Source
from llmprune.pruning.jobs import Job
from llmprune.pruning.rotation.terms import MOST_LINES
from llmprune.recipe.recipe import Recipe
from llmprune.statistics import Gram

# A token that is sampled, in a batch, costs so many in a forward pass: all weights are read for every step.
_DECODING = {"cpu": 6.0, "cuda": 30.0}

# A token of one sequence alone, likewise: what is read for it is not shared by a batch.
_ANSWERING = {"cpu": 10.0, "cuda": 300.0}

# Products of float32 sums, and in float32.
_GRAM, _SOLVING = 2.0, 3.0

# Passes that show the inputs of a layer's matrices one after another, each as far as it has to go.
_TURNS = 2.5

# Log-softmax of two models and their divergence, in float32, compared with the head's matmuls.
_SCORING = 3.0


def expected_shares(
    recipe: Recipe, source: Source, jobs: Sequence[Mapping[str, Job]], device: torch.device
) -> dict[str, float]:
    """What each stage of a run is expected to cost, in the order of the stages.

    Args:
        recipe: with the lengths of its texts resolved.
        source: the dense model.
        jobs: for each layer, what is done to its matrices.
        device: where the run computes.

    Returns:
        Stage, as in `Progress.stage`, -> operations of a forward pass.
    """
    active = active_experts(source.model.config)
    layers = sum(layer_size(layer, flops, active) for layer in source.layers)
    config = source.model.config.get_text_config(decoder=True)
    head = 2.0 * config.hidden_size * config.vocab_size
    sizes = {name: spec.sequences * spec.tokens for name, spec in recipe.texts.items()}
    parts = [part for spec in recipe.texts.values() for part in spec.parts]
    sampled = sum(part.sequences * part.tokens for part in parts if part.source == "self")
    scored = sizes.get("evaluation", 0)
    observed = sizes["calibration"]
    fitted = 0 if recipe.reconstruct is None else 1 + 3 * recipe.reconstruct.epochs
    statistics = recipe.statistics
    shown = (_TURNS if statistics.sequential else 1) * (2 if statistics.alpha else 1) + (statistics.alpha > 0)
    solving = sum(_solving(source, *job, observed) for job in enumerate(jobs))
    surveyed = 0 if recipe.structures is None else 1
    kind = "cpu" if device.type == "cpu" else "cuda"
    prompts = 0 if recipe.evaluation is None else len(recipe.evaluation.prompts)
    costs = {
        "sampling text": _DECODING[kind] * sampled * (layers + head),
        "dense perplexity": scored * layers,
        "statistics": 0.0 if recipe.rotation is None else observed * layers,
        "rotation": _turning(recipe, source, jobs, config.hidden_size),
        "survey": surveyed * observed * layers,
        "pruning": (1 + shown + fitted) * observed * layers + solving,
        "pruned perplexity": scored * layers,
        "perplexity, head": 2 * _SCORING * scored * head,
        "answers": _ANSWERING[kind] * 2 * prompts * TOKENS * (layers + head),
    }
    return {stage: cost for stage, cost in costs.items() if cost}


def _turning(recipe: Recipe, source: Source, jobs: Sequence[Mapping[str, Job]], hidden: int) -> float:
    """The search for a rotation: the products of `llmprune.pruning.rotation.plan`, two inputs a layer."""
    if recipe.rotation is None or recipe.rotation.kind != "learned":
        return 0.0
    elements = 2.0 * hidden**2 * len(source.layers)
    for index, job in enumerate(jobs):
        for matrix in prunable_matrices(source.layers[index], f"{source.layers_path}.{index}"):
            if matrix.name in job and hidden in matrix.shape:
                elements += hidden * min(matrix.shape[matrix.shape[0] == hidden], MOST_LINES)
    return _SOLVING * recipe.rotation.steps * 4 * hidden * elements


def _solving(source: Source, index: int, jobs: Mapping[str, Job], tokens: int) -> float:
    """Statistics and solvers of a layer."""
    # Matrices of one width side by side in a module usually read one input; which do is only known once they ran.
    inputs: dict[tuple[str, int], Job] = {}
    operations = 0.0
    for matrix in prunable_matrices(source.layers[index], f"{source.layers_path}.{index}"):
        job = jobs.get(matrix.name)
        if job is not None:
            inputs.setdefault((matrix.name.rpartition(".")[0], matrix.shape[1]), job)
            operations += _SOLVING * job.work(matrix.shape)
    for (_, width), job in inputs.items():
        operations += _SOLVING * job.shared_work(width)
        operations += _GRAM * 2 * tokens * width**2 * (job.needs is Gram)
    return operations
