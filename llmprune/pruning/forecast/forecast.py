"""What a run would do and need, without running it: the plan, its arithmetic, its memory and its disk space.

The checkpoint's structure determines what happens to each matrix. One layer of every kind is loaded and run on a few
random tokens, which shows which matrices share an input and what fraction of the tokens each expert receives. What is
counted is said in `llmprune.pruning.forecast.work`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmprune.devices import describe_device, resolve_device
from llmprune.measuring.answers import too_large
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import prunable_matrices
from llmprune.models.sizes import ends_bytes
from llmprune.patterns import Unstructured
from llmprune.precision import dtype_name
from llmprune.progress import Progress, Watcher, counted, ignore
from llmprune.pruning.allocating.allocate import require_allocatable
from llmprune.pruning.allocating.cost import allocation_notes
from llmprune.pruning.context import Run
from llmprune.pruning.fitting import find_parts
from llmprune.pruning.forecast.around import measure_around
from llmprune.pruning.forecast.backward import BackwardPlan, plan_backward
from llmprune.pruning.forecast.memory import (
    layer_memory,
    library_bytes,
    matching_memory,
    replacing_memory,
)
from llmprune.pruning.forecast.plan import DryRun, LayerPlan, MatrixPlan, MemoryPlan
from llmprune.pruning.forecast.rates import measure_rates
from llmprune.pruning.forecast.work import WorkCounter
from llmprune.pruning.jobs import Job, plan_jobs, require_packable
from llmprune.pruning.rotation.plan import planned
from llmprune.pruning.rotation.rotating import begin_rotation
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.statistics import ColumnNorm
from llmprune.storage.hub import resolve_model
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.plan import (
    consumer_shapes,
    plan_structures,
    structure_notes,
)
from llmprune.structures.reduction import Reduction
from llmprune.structures.removable import Removable
from llmprune.structures.survey import check_budget
from llmprune.text.loading import check_texts, fits, model_positions, tokenizer_for, whole_size
from llmprune.text.mix import TextMix
from llmprune.units import format_size, quantity

# Samples and length for probing a layer: few tokens, and sizes that hardly any dimension of a model has, so that a
# tensor's shape shows which of its dimensions grow with the batch and with the length.
_SAMPLES, _LENGTH = 2, 61


def dry_run(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    watch: Watcher = ignore,
) -> DryRun:
    """Work out what `prune` would do with a checkpoint, without writing anything.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        recipe: a bundled recipe's name, a YAML file, a mapping or a `Recipe`.
        overrides: changes to the recipe, "key.path=value".
        watch: told about every step.

    Raises:
        LlmpruneError: everything that a run would refuse regardless of the text: the recipe, the model, its tokenizer,
            a pattern that does not fit, an unavailable device, a matrix that is never used; or there is not enough
            memory for one layer.
    """
    run = Run.begin(load_recipe(recipe, overrides), watch)
    with run.watch:
        run.watch(Progress("opening the model", 0, 1, unit="step"))
        folder = resolve_model(model)
        source = run.open(folder)
        tokenizer_for(run.recipe.texts.values(), folder, source.config)
        return _forecast(run, str(model), source)


def _forecast(run: Run, model: str, source: CheckpointSource) -> DryRun:
    run, rotating, left_out = begin_rotation(run, source.folder)
    device = run.device
    settings = run.recipe.fitted(model_positions(source.config), device.type)
    check_texts(settings.texts, source)
    found = Removable.find(source, settings.structures) if settings.structures else None
    reduction = Reduction(found, found.preview()) if found else None
    if found is not None:
        check_budget(found)
    result = source if reduction is None else reduction.result
    jobs = plan_jobs(result, settings)
    require_packable(jobs, source.linear_key, settings.format)
    require_allocatable(settings, result, jobs)
    look = _Look(source, settings, device, reduction)
    backward = plan_backward(source, settings, jobs, look.hidden_bytes)
    look.set_backward(backward)
    kinds = counted(run.watch, "planning the layers", _kinds(source, jobs), "kind")
    layers = tuple(look.plan(indices, jobs) for indices in kinds)
    structures = plan_structures(found)
    hidden = look.hidden_bytes
    sets = settings.hidden_sets
    resident = sets * min(hidden, int(settings.activation_budget))
    largest = max((plan.memory for plan in layers), key=lambda memory: memory.total)
    libraries = library_bytes(device)
    run.watch(Progress("timing this machine", 0, 1, unit="step"))
    rates = measure_rates(device, source.model.dtype)
    turning = None if rotating is None else planned(model, rotating.rotatable, look.tokens, rotating.job)
    around = measure_around(source, settings, device, layers)
    if turning is not None:
        passes = sum(len(plan.indices) * plan.work.forward for plan in layers) / 2
        around = replace(around, rotation=turning.seconds + passes / rates.forward)
    return DryRun(
        model=model,
        recipe=settings.to_dict(),
        device=describe_device(device),
        compute_dtype=dtype_name(source.model.dtype),
        layers_path=source.layers_path,
        tokens=look.tokens,
        layers=layers,
        rates=rates,
        memory=MemoryPlan(
            ends_bytes(source),
            resident,
            look.calls_bytes,
            largest,
            libraries,
            backward.kept,
            backward.peak,
            0 if turning is None else turning.memory_bytes,
        ),
        disk_bytes=_disk_bytes(source, result, found) + (0 if rotating is None else rotating.nbytes),
        spilled_bytes=sets * hidden - resident,
        notes=(
            *_notes(settings, source),
            *(left_out if rotating is None else [rotating.note]),
            *_outside_notes(source, found),
            *(structure_notes(structures, found.spec) if found else ()),
            *([backward.note] if backward.passes else []),
            *allocation_notes(settings, result, jobs, rates.forward),
        ),
        structures=structures,
        around=around,
    )


class _Look:
    """Probes single layers with a few random tokens, and extrapolates to a run over all layers."""

    def __init__(
        self, source: CheckpointSource, recipe: Recipe, device: torch.device, reduction: Reduction | None
    ) -> None:
        self._source, self._recipe, self._device, self._reduction = source, recipe, device, reduction
        self._length = recipe.calibration.tokens
        self._batches = _batch_sizes(recipe)
        self.tokens = (recipe.calibration.sequences + recipe.held_back) * self._length
        vocabulary = source.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        # Two batches, because values that differ between batches are stored for each.
        ids = torch.randint(vocabulary, (2 * _SAMPLES, min(self._length, _LENGTH)), generator=generator)
        self._stream = Stream(source, ids, StreamSettings(device, _SAMPLES))
        self._stream.capture()
        self._seen = ids.numel()
        self._parts = find_parts(source, recipe.reconstruct)
        self._counter = WorkCounter(recipe, reduction, self._parts, max(self._batches) * self._length)

    def set_backward(self, plan: BackwardPlan) -> None:
        """Count the passes over the layers before the first one is pruned."""
        self._counter.backward = plan.passes

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all samples."""
        return 2 * self._stream.hidden[0].nbytes * self.tokens // self._seen

    @property
    def calls_bytes(self) -> int:
        """Bytes that the model passes to its layers; equal tensors are stored once for each batch size."""
        first, second = (
            {id(tensor): tensor for index in range(len(self._source.layers)) for tensor in self._handed(index, batch)}
            for batch in (0, 1)
        )
        samples = self.tokens // self._length
        return sum(
            self._scaled(tensor, sum(self._batches) if key in second else samples) for key, tensor in first.items()
        )

    def plan(self, indices: tuple[int, ...], jobs: Sequence[dict[str, Job]]) -> LayerPlan:
        """Load the first of several equal layers, and plan what will be done to each of them."""
        index = indices[0]
        self._source.load_layer(index, self._device)
        try:
            layer = ResidentLayer(self._stream, index)
            # Column norms if the method needs none: they also count the tokens that an expert receives.
            needs = {name: job.needs or ColumnNorm for name, job in jobs[index].items()}
            groups = layer.observe(needs) if needs else []
            held_back = self._recipe.held_back * self._length
            consumers = consumer_shapes(self._reduction.found, index) if self._reduction else []
            options = self._recipe.statistics
            batch_tokens = max(self._batches) * self._length
            memory = layer_memory(layer, groups, jobs[index], batch_tokens, held_back, consumers, options)
            fitted = jobs[index] or ({} if self._reduction is None else layer.matrices)
            parts = None if self._parts is None else self._parts[index]
            matching = matching_memory(layer, fitted, self._recipe.reconstruct, batch_tokens, parts)
            left = self._left(layer)
            found = None if self._reduction is None else self._reduction.found
            replacing = replacing_memory(layer, found, self._recipe.reconstruct, memory, batch_tokens)
            work = self._counter.count(layer, groups, jobs[index], left, self._shares(layer, groups))
        finally:
            self._source.free_layer(index)
        prefix = layer.name + "."
        matrices = (
            _matrix_plan(name.removeprefix(prefix), shape, jobs[index].get(name)) for name, shape in left.items()
        )
        return LayerPlan(indices, tuple(matrices), work, replace(memory, matching=matching, replacing=replacing))

    def _left(self, layer: ResidentLayer) -> dict[str, tuple[int, int]]:
        """Matrix -> (out, in) after structures are removed from the layer."""
        if self._reduction is None:
            return {name: matrix.shape for name, matrix in layer.matrices.items()}
        return {m.name: m.shape for m in prunable_matrices(self._reduction.result.layers[layer.index], layer.name)}

    def _shares(self, layer: ResidentLayer, groups: Sequence[Group]) -> dict[str, float]:
        """The fraction of the tokens that each matrix receives: 1, except for experts."""
        seen = {
            name: group.statistics.tokens / self._seen
            for group in groups
            for name in group.names
            if group.statistics is not None and layer.matrices[name].routed
        }
        # Experts that stay dense are not observed; they are assumed to receive as many tokens as the others.
        average = sum(seen.values()) / len(seen) if seen else 1.0
        return {name: seen.get(name, average) if m.routed else 1.0 for name, m in layer.matrices.items()}

    def _handed(self, index: int, batch: int) -> list[Tensor]:
        leaves = tree_leaves(self._stream.calls.get(index, batch))
        # Placeholders for the output of a layer that did not run take no memory: their strides are 0.
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and any(leaf.stride())]

    def _scaled(self, tensor: Tensor, samples: int) -> int:
        """Bytes of a tensor that the model passed to a layer, scaled to this many samples of full length."""
        nbytes, few = float(tensor.nbytes), self._seen // (2 * _SAMPLES)
        for dimension, size in enumerate(tensor.shape):
            if dimension == 0 and size == _SAMPLES:
                nbytes *= samples / _SAMPLES
            elif size == few:
                nbytes *= self._length / few
        return round(nbytes)


def _kinds(source: CheckpointSource, jobs: Sequence[dict[str, Job]]) -> list[tuple[int, ...]]:
    """Group the layers by their structure and by what is done to them."""
    kinds: dict[object, list[int]] = {}
    for index, layer in enumerate(source.layers):
        prefix = f"{source.layer_name(index)}."
        parameters = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        plan = tuple((name.removeprefix(prefix), job) for name, job in jobs[index].items())
        kinds.setdefault((parameters, plan), []).append(index)
    return [tuple(indices) for indices in kinds.values()]


def _disk_bytes(source: CheckpointSource, result: CheckpointSource, found: Removable | None) -> int:
    """Bytes of the pruned checkpoint, from the fraction of the parameters that is kept."""
    copied = sum(source.stored[key].nbytes for key in _copied(source, found))
    draft = 0 if found is None or found.draft_head is None else found.draft_head.nbytes
    nbytes = sum(stored.nbytes for stored in source.stored.values()) - copied - draft
    whole, left = (sum(p.numel() for p in checkpoint.model.parameters()) for checkpoint in (source, result))
    return copied + (nbytes if result is source else round(nbytes * left / whole))


def _copied(source: CheckpointSource, found: Removable | None) -> list[str]:
    """The keys of tensors that the model does not read and that are copied as they are."""
    dropped = () if found is None or found.draft_head is None else found.draft_head.keys
    return [key for key in source.ignored_keys() if key not in dropped]


def _outside_notes(source: CheckpointSource, found: Removable | None) -> Iterator[str]:
    """What happens to tensors that transformers does not build."""
    if found is not None and found.draft_head is not None:
        yield str(found.draft_head)
    if copied := _copied(source, found):
        size = format_size(sum(source.stored[key].nbytes for key in copied))
        yield (
            f"Copied as they are, 4 MB at a time: {quantity(len(copied), 'tensor')}, {size}, such as "
            f"{copied[0]}, which transformers does not build."
        )


def _batch_sizes(recipe: Recipe) -> set[int]:
    """The distinct batch sizes that occur; held-back samples have batches of their own."""
    sizes = set()
    for samples in (recipe.calibration.sequences, recipe.held_back):
        sizes |= {min(recipe.batch_size, samples), samples % recipe.batch_size}
    return sizes - {0}


def _matrix_plan(name: str, shape: tuple[int, int], job: Job | None) -> MatrixPlan:
    if job is None:
        return MatrixPlan(name, shape, "dense", None, 0)
    zeros = job.pattern.compared(job.method.scope).zeros(shape)
    return MatrixPlan(name, shape, str(job.pattern), job.method_name, zeros)


def _notes(recipe: Recipe, source: CheckpointSource) -> Iterator[str]:
    yield "A dry run does not read the calibration text, so errors in the text only show up in the real run."
    yield (
        "The time of pruning is a lower bound: matmuls and choosing by scores. Other elementwise "
        "operations, attention, column updates, loading and writing take additional time. The times of sampling and of "
        "perplexity are extrapolated from single steps; sampling leaves out attention to earlier tokens."
    )
    for name, text in recipe.texts.items():
        if isinstance(text, TextMix):
            yield f"The {name} text is a mix of {text.summary}."
    if any(part.source == "self" for text in recipe.texts.values() for part in text.parts):
        size = whole_size(source)
        slow = (
            ""
            if fits(size, resolve_device(recipe.device))
            else ", more than fits: parts of it are loaded again for every token"
        )
        yield f"For self-generated text, the whole dense model is loaded: {format_size(size)}{slow}."
    if recipe.evaluation is not None and (prompts := recipe.evaluation.prompts):
        reason = too_large(source, resolve_device(recipe.device))
        asked = f"left out: {reason}" if reason else "answered by both models, each loaded completely for it"
        yield f"{len(prompts)} prompts (evaluation.prompts) are {asked}."
    if recipe.reconstruct is not None:
        yield "Layers are fitted for as many epochs as allowed; some stop earlier, once validation no longer improves."
    if any(isinstance(pattern, Unstructured) and pattern.over == "layer" for pattern in recipe.patterns):
        yield "If scores are compared over a whole layer, the sparsity of each matrix is the layer's average."
