"""How long a run takes beside its large matmuls: sampling text, measuring perplexity, and choosing zeros by scores.

One decoder layer is timed, as are the head, the draw of a token and some rows of each kind of matrix, with random
inputs of the shapes of the run:

    sampling     for every position: all layers and the head on one token of each sequence of a batch, and a draw
    evaluation   all layers on every token, of the dense and of the pruned model; both heads, and their comparison
    choosing     the lowest scores under each pattern, for the methods that multiply nothing

Left out: attention to the tokens before, in sampling; loading the model; reading texts; a GPU's graphs and clocks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.devices import runs_per_second
from llmprune.methods import METHODS
from llmprune.methods.method import Selection, select
from llmprune.models.sizes import active_experts, flops, layer_size
from llmprune.models.source import Source
from llmprune.patterns import Block, Pattern, parse
from llmprune.pruning.forecast.plan import Around, LayerPlan
from llmprune.recipe.recipe import Recipe
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.variants import kl_divergence
from llmprune.text.generated import SAMPLING_BATCH, draw

# How many tokens of one sequence, positions of the head and rows of its matrix are timed; the rest is extrapolated.
_TOKENS, _POSITIONS, _ROWS = 256, 64, 8192
# How many rows of a matrix are pruned.
_CHOSEN = 1024


def measure_around(source: Source, recipe: Recipe, device: torch.device, layers: Sequence[LayerPlan] = ()) -> Around:
    """Time single steps on this machine, and add up what a run makes of them.

    Args:
        source: the dense model.
        recipe: with the lengths of its texts resolved.
        device: where the run computes.
        layers: what is done to them.

    Returns:
        Seconds; 0 for what the recipe does not do.
    """
    choosing = _choosing_seconds(layers, device)
    sampling = 0.0
    for spec in (part for text in recipe.texts.values() for part in text.parts):
        if spec.source == "self":
            whole, rest = divmod(spec.sequences, SAMPLING_BATCH)
            for batches, size in ((whole, SAMPLING_BATCH), (1, rest)):
                if batches and size:
                    sampling += batches * spec.tokens * _step_seconds(source, size, spec.top_p, device)
    if recipe.evaluation is None:
        return Around(sampling, 0.0, choosing)
    length = min(recipe.evaluation.tokens, _TOKENS)
    tokens = recipe.evaluation.sequences * recipe.evaluation.tokens
    token = 2 * _layers_seconds(source, (1, length), device) / length + _scoring_seconds(source, device)
    return Around(sampling, tokens * token, choosing)


def _choosing_seconds(layers: Sequence[LayerPlan], device: torch.device) -> float:
    """Over all matrices whose method is a score; equal ones are timed once."""
    rows: dict[tuple[str, int], float] = {}
    total = 0.0
    for plan in layers:
        for matrix in plan.matrices:
            method = METHODS.get(matrix.method or "")
            if method is not None and issubclass(method, Selection):
                kind = matrix.pattern, matrix.shape[1]
                if kind not in rows:
                    rows[kind] = _rows_per_second(matrix.shape, parse(matrix.pattern).compared(method.scope), device)
                total += len(plan.indices) * matrix.shape[0] / rows[kind]
    return total


def _rows_per_second(shape: tuple[int, int], pattern: Pattern, device: torch.device) -> float:
    """A score costs about as much as a magnitude times the norm of a column."""
    height = pattern.size[0] if isinstance(pattern, Block) else 1
    rows = max(min(shape[0], _CHOSEN) // height, 1) * height
    weight, norms = torch.randn(rows, shape[1], device=device), torch.rand(shape[1], device=device)
    return rows * runs_per_second(lambda: select(weight, weight.abs() * norms, pattern), device)


def _layers_seconds(source: Source, shape: tuple[int, int], device: torch.device) -> float:
    """One forward pass of tokens [samples, length] through all layers, extrapolated from the first."""
    vocabulary = source.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    stream = Stream(source, ids, StreamSettings(device, len(ids)))
    stream.capture()
    active = active_experts(source.model.config)
    sizes = [layer_size(layer, flops, active) for layer in source.layers]
    source.load_layer(0, device)
    try:
        layer = ResidentLayer(stream, 0)
        with torch.no_grad():
            rate = runs_per_second(lambda: layer.forward(stream.hidden[0], 0), device)
    finally:
        source.free_layer(0)
    return sum(sizes) / max(sizes[0], 1.0) / rate


def _step_seconds(source: Source, batch: int, top_p: float, device: torch.device) -> float:
    """One token more for each sequence of a batch."""
    hidden, head, scale = _head(source, batch, device)
    draws = torch.rand(batch, dtype=torch.float64, device=device)
    vocabulary = round(len(head) * scale)
    # As certain as language models are of text (about 3 nats): how many tokens top_p keeps decides how long a
    # draw takes.
    logits = 4 * torch.randn(batch, vocabulary, device=device)
    with torch.no_grad():
        product = runs_per_second(lambda: F.linear(hidden, head), device)
        drawn = runs_per_second(lambda: draw(logits, draws, 1.0, top_p), device)
    return _layers_seconds(source, (batch, 1), device) + scale / product + 1 / drawn


def _scoring_seconds(source: Source, device: torch.device) -> float:
    """The logits of both models for one position, and all that is computed from them."""
    hidden, head, scale = _head(source, _POSITIONS, device)

    def score() -> None:
        before, after = (F.linear(hidden, head).float().log_softmax(-1) for _ in range(2))
        kl_divergence(before, after)
        for values in (before, after):
            values.max(-1)
            values.argmax(-1)

    with torch.no_grad():
        return scale / runs_per_second(score, device) / _POSITIONS


def _head(source: Source, positions: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Hidden states, part of a head's matrix, and how many times as large the whole one is."""
    config = source.model.config.get_text_config(decoder=True)
    rows = min(config.vocab_size, _ROWS)
    shapes = (positions, config.hidden_size), (rows, config.hidden_size)
    hidden, head = (torch.randn(shape, device=device).to(source.dtype) for shape in shapes)
    return hidden, head, config.vocab_size / rows
