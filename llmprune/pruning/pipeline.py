"""Prune a model by a recipe: the whole run, from text to report."""

import datetime
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from llmprune import __version__
from llmprune.devices import PeakWatch, describe_device, resolve_device
from llmprune.errors import RecipeError, ResumeError
from llmprune.measuring.extent import measure_extent
from llmprune.measuring.layer_speed import compare_speed
from llmprune.measuring.perplexity import compare_perplexity, run_stream
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint
from llmprune.models.sizes import ends_bytes
from llmprune.models.source import ModelSource, Source
from llmprune.pages import write_report
from llmprune.precision import computed_in, dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.card import write_card
from llmprune.pruning.dense_pass import DensePass
from llmprune.pruning.forecast.memory import LayerMemory, layer_memory, predict_peak, pruning_needs
from llmprune.pruning.jobs import plan_jobs
from llmprune.pruning.saving import evaluating, save_dense, save_pruned, take_over
from llmprune.pruning.solving import Job, solve_layer
from llmprune.pruning.writing import Writer
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.storage.files import write_text
from llmprune.storage.folders import (
    RECIPE_NAME,
    expanded,
    locked,
    require_empty,
    require_free,
    require_other,
    require_space,
)
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.output import OutputFolder
from llmprune.storage.report import REPORT_NAME, MatrixRow, Report, StructureRow, load_report
from llmprune.stream.guard import MemoryGuard, sampling_needs
from llmprune.stream.stream import ResidentLayer, Stream, StreamSettings
from llmprune.structures.decisions import Decisions
from llmprune.structures.describe.audit import audit_checkpoint
from llmprune.structures.plan import consumer_shapes
from llmprune.structures.reduction import Reduction
from llmprune.structures.removable import Removable
from llmprune.structures.remove.cuts import Cut
from llmprune.structures.survey import check_budget, decide
from llmprune.text.loading import model_positions, tokenizer_for
from llmprune.text.tokens import Tokenizer, Tokens
from llmprune.timing import Stages


def prune(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> Report:
    """Prune a causal LM one decoder layer at a time.

    Args:
        model: a hub id, a local checkpoint folder or "testbed", which are read layer by layer and never changed; or a
            model in memory, which is pruned in place.
        recipe: a bundled recipe's name, a YAML file, a mapping or a `Recipe`.
        output: folder for the pruned checkpoint; optional for a model in memory.
        overrides: changes to the recipe, "key.path=value".
        tokenizer: of a model in memory; default: the one it was loaded with. A checkpoint brings its own.
        resume: continue an interrupted run in `output`.
        overwrite: replace a checkpoint that is in `output`.
        watch: told about every step.

    Returns:
        The report; it is also written into `output`.

    Raises:
        LlmpruneError: one of its kinds for everything that a user can mend; see `llmprune.errors`.

    Example:
        >>> prune("testbed", "demo", "out/demo").sparsity  # doctest: +SKIP
        0.5
    """
    settings = load_recipe(recipe, overrides)
    run = Run(settings, watch)
    if not isinstance(model, PreTrainedModel):
        if output is None:
            raise RecipeError(f"no output folder for {model}", fix='pass one, for example output="pruned"')
        folder = resolve_model(model)
        with run.guard:
            return run.from_checkpoint(str(model), folder, expanded(output), resume=resume, overwrite=overwrite)
    if resume:
        raise ResumeError("a model in memory cannot be resumed", fix="save it and pass the folder")
    tokenizer = tokenizer or tokenizer_for(settings.texts.values(), model.config._name_or_path, model.config)
    with run.guard:
        return run.in_memory(model, None if output is None else expanded(output), tokenizer, overwrite=overwrite)


class Run:
    """One run: the recipe, what all its parts share, and what runs before it have made of the dense model."""

    def __init__(self, recipe: Recipe, watch: Watcher = ignore, dense: DensePass | None = None) -> None:
        self.recipe = recipe
        self.device = resolve_device(recipe.device)
        self.stages = Stages()
        self.dense = dense or DensePass()
        self.started = time.perf_counter()
        self.memories: list[LayerMemory] = []
        self.errors: list[float] = []
        self.held_by_stream = 0, 0
        self.reduction: Reduction | None = None
        self.structures: list[StructureRow] = []
        self.settings = StreamSettings(self.device, recipe.batch_size, recipe.held_back, int(recipe.activation_budget))
        self.guard = self.watch = MemoryGuard(self.settings, watch)

    def from_checkpoint(self, name: str, folder: Path, output: Path, *, resume: bool, overwrite: bool) -> Report:
        """Prune a checkpoint folder into another one."""
        require_other(output, folder)
        require_free(output)
        require_empty(output, resume=resume, overwrite=overwrite)
        source = self.open(folder)
        self.recipe = self.recipe.fitted(model_positions(source.config))
        if self.recipe.structures is not None:
            found = Removable.find(source, self.recipe.structures)
            # Whatever will be decided, there must be a config that says so many.
            self.reduction = Reduction(found, found.preview())
            check_budget(found)
        jobs = plan_jobs(self._result(source), self.recipe)
        require_space(output, sum(stored.nbytes for stored in source.stored.values()))
        tokenizer = tokenizer_for(self.recipe.texts.values(), folder, source.config)
        texts = self._texts(source, jobs, tokenizer)
        keys = {
            "recipe": self.recipe.to_dict() | {"description": ""},
            "tokens": {text: tokens.digest for text, tokens in texts.items()},
            "source": checkpoint_digest(folder),
            "version": versions(),
            "device": describe_device(self.device),
            "compute_dtype": dtype_name(source.dtype),
        }
        with locked(output):
            target = OutputFolder.open(output, keys, resume=resume, overwrite=overwrite)
            self.guard.resumable = True
            if target.complete and (output / REPORT_NAME).exists():
                return load_report(output)
            return self._into(target, name, source, texts)

    def _into(self, target: OutputFolder, name: str, source: CheckpointSource, texts: Mapping[str, Tokens]) -> Report:
        """Do what is left to do in an output folder that was opened."""
        write_text(target.path / RECIPE_NAME, self.recipe.to_yaml())
        dense = self.dense.final_states(source, texts, self.settings, self.watch, self.stages)
        if self.reduction is not None:
            self._decide(self.reduction.found, target, texts["calibration"])
        result = self._result(source)
        jobs = plan_jobs(result, self.recipe)
        for layer in target.layers.values():
            result.overlay(target.path / layer["shard"], target.layouts_of(layer))
        with PeakWatch(self.device) as memory:
            dense_layers = source if self.reduction is None else self.reduction.source
            rows = self.prune_layers(dense_layers, jobs, texts["calibration"], target, memory)
        with self.stages("write"):
            Writer(source, self.reduction, target, self.recipe.format).finish()
        if self.reduction is not None:
            # What was written is what is measured; reading it checks it.
            result = self._audited(target.path)
        # First, so that the report's seconds hold it.
        smaller = self._smaller(source, result, target, texts["calibration"])
        report = self._report(name, target.keys, result, texts, rows, dense, memory)
        report.header.update(smaller)
        report.save(target.path)
        write_card(target.path, name, self.recipe, report)
        write_report(target.path)
        target.close()
        return report

    def in_memory(
        self, model: PreTrainedModel, output: Path | None, tokenizer: Tokenizer, *, overwrite: bool
    ) -> Report:
        """Prune a model in place, and save it if there is an output folder."""
        if self.recipe.structures is not None:
            return self._shrink(model, output, tokenizer, overwrite=overwrite)
        if output is not None:
            require_other(output, model.config._name_or_path)
            require_free(output)
            require_empty(output, resume=False, overwrite=overwrite)
            require_space(output, sum(parameter.nbytes for parameter in model.parameters()))
        self.recipe = self.recipe.fitted(model_positions(model.config))
        source = ModelSource(model, self.recipe.decoder_layers, self._compute_dtype(model))
        jobs = plan_jobs(source, self.recipe)
        name = model.config._name_or_path or type(model).__name__
        keys = {
            "version": versions(),
            "device": describe_device(self.device),
            "compute_dtype": dtype_name(source.dtype),
        }
        with evaluating(model):
            texts = self._texts(source, jobs, tokenizer)
            dense = self.dense.final_states(source, texts, self.settings, self.watch, self.stages)
            with PeakWatch(self.device) as memory:
                rows = self.prune_layers(source, jobs, texts["calibration"], None, memory)
            report = self._report(name, keys, source, texts, rows, dense, memory)
        if output is not None:
            save_pruned(model, tokenizer, output, self.recipe, report, overwrite=overwrite)
        return report

    def _shrink(self, model: PreTrainedModel, output: Path | None, tokenizer: Tokenizer, *, overwrite: bool) -> Report:
        """Prune a copy on the disk, because modules cannot change their size, and take over what came out."""
        self._compute_dtype(model)
        if output is not None:
            require_other(output, model.config._name_or_path)
        name = model.config._name_or_path or type(model).__name__
        with tempfile.TemporaryDirectory(prefix="llmprune-model-") as staging:
            dense = Path(staging) / "dense"
            save_dense(model, tokenizer, dense)
            folder = output or Path(staging) / "pruned"
            report = self.from_checkpoint(name, dense, folder, resume=False, overwrite=overwrite)
            take_over(model, folder)
        return report

    def _result(self, source: CheckpointSource) -> CheckpointSource:
        """Where the pruned layers are read from: the source itself, unless they have another size."""
        return source if self.reduction is None else self.reduction.result

    def _decide(self, found: Removable, target: OutputFolder, tokens: Tokens) -> None:
        """Decide what is removed, or read what an interrupted run has decided."""
        if target.decisions is None:
            with self.stages("survey"):
                target.decide(decide(found, tokens.ids, self.settings, self.stages, self.watch).to_dict())
        assert target.decisions is not None
        self.reduction = Reduction(found, Decisions.from_dict(target.decisions))

    def _smaller(
        self, source: CheckpointSource, result: CheckpointSource, target: OutputFolder, tokens: Tokens
    ) -> dict[str, Any]:
        """What the report says of a model that became smaller, beside the dense one."""
        if self.reduction is None:
            return {}
        self.watch(Progress("speed"))
        with self.stages("speed"):
            speeds = compare_speed(source, result, tokens.ids[:1], self.device)
        both = ("dense", "pruned")
        return {
            "decisions": target.decisions,
            "extent": {
                name: measure_extent(model).to_dict() for name, model in zip(both, (source, result), strict=True)
            },
            "speed": {name: asdict(speed) for name, speed in zip(both, speeds, strict=True)},
        }

    def _audited(self, folder: Path) -> CheckpointSource:
        """Open the checkpoint that was written, and check its config and its tensors against each other."""
        source = self.open(folder)
        with self.stages("audit"):
            audit_checkpoint(source)
        return source

    def open(self, folder: Path) -> CheckpointSource:
        """Open a checkpoint as this recipe computes it."""
        return open_checkpoint(folder, self.device, self.recipe.compute_dtype, self.recipe.decoder_layers)

    def _texts(self, source: Source, jobs: Sequence[dict[str, Job]], tokenizer: Tokenizer) -> dict[str, Tokens]:
        specs = self.recipe.texts
        self.watch(Progress("calibration text"))
        if any(spec.source == "self" for spec in specs.values()):
            self.guard.expected = lambda: sampling_needs(source)
        with self.stages("text"):
            texts = self.dense.texts(specs, source, tokenizer, self.device)
        self.guard.expected = lambda: pruning_needs(source, jobs, texts, self.settings)
        return texts

    def prune_layers(
        self,
        source: Source,
        jobs: Sequence[dict[str, Job]],
        tokens: Tokens,
        target: OutputFolder | None,
        memory: PeakWatch,
    ) -> tuple[MatrixRow, ...]:
        """Stream the layers, prune each, and commit it where there is a target; returns the report rows."""
        rows: list[MatrixRow] = []
        reduction = self.reduction
        stream = Stream(source, tokens.ids, self.settings, self.stages)
        for layer in stream:
            number = layer.index if reduction is None else reduction.numbers.get(layer.index)
            if number is None:
                layer.skipped = True
                continue
            name = f"{source.layers_path}.{number}"
            if target is not None and name in target.layers:
                self._tell(layer, "replaying")
                if reduction is not None:
                    reduction.replay(layer)
                new, removed = target.rows_of(name), target.structures_of(name)
            else:
                new, removed = self._prune_layer(layer, jobs[number], stream, memory, target)
            rows += new
            self.structures += removed
            self.errors += [error for error in (r.error for rs in (removed, new) for r in rs) if error is not None]
            self._tell(layer, "advancing")
        if reduction is not None:
            reduction.free()
        self.held_by_stream = stream.hidden.resident_bytes, stream.calls.nbytes
        self.watch(Progress("pruning", len(source.layers), len(source.layers), "", self._mean_error()))
        return tuple(rows)

    def _prune_layer(
        self,
        layer: ResidentLayer,
        jobs: dict[str, Job],
        stream: Stream,
        memory: PeakWatch,
        target: OutputFolder | None,
    ) -> tuple[list[MatrixRow], list[StructureRow]]:
        cuts: list[Cut] = []
        removed: list[StructureRow] = []
        batch_tokens = stream.batches[0].numel()
        held_back = self.recipe.held_back * stream.batches[0].shape[1]
        min_tokens, tell = self.recipe.experts.min_tokens, self._teller(layer)
        if self.reduction is not None:
            consumers = consumer_shapes(self.reduction.found, layer.index)
            self.memories.append(layer_memory(layer, [], {}, batch_tokens, held_back, consumers))
            cuts, removed = self.reduction.reduce(layer, min_tokens, tell)
        tell("statistics")
        groups = layer.observe({name: job.method.needs for name, job in jobs.items()}) if jobs else []
        self.memories.append(layer_memory(layer, groups, jobs, batch_tokens, held_back))
        rows = solve_layer(layer, groups, jobs, min_tokens, self.stages, tell)
        peak = memory.read()
        rows = [replace(row, peak_bytes=peak) for row in rows]
        removed = [replace(row, peak_bytes=peak) for row in removed]
        if target is not None:
            self._commit(layer, stream.source, target, rows, jobs, cuts, removed)
        return rows, removed

    def _commit(
        self,
        layer: ResidentLayer,
        source: Source,
        target: OutputFolder,
        rows: Sequence[MatrixRow],
        jobs: Mapping[str, Job],
        cuts: Sequence[Cut],
        removed: Sequence[StructureRow],
    ) -> None:
        self._tell(layer, "writing")
        writer = Writer(source, self.reduction, target, self.recipe.format)
        with self.stages("write"):
            writer.commit(layer, rows, jobs, cuts, removed)

    def _report(
        self,
        name: str,
        keys: Mapping[str, Any],
        source: Source,
        texts: Mapping[str, Tokens],
        rows: tuple[MatrixRow, ...],
        dense: Stream | None,
        memory: PeakWatch,
    ) -> Report:
        evaluation, stage = None, "pruned perplexity"
        if dense is not None:
            with self.stages(stage):
                pruned = run_stream(source, texts["evaluation"].ids, self.settings, self.watch, stage)
                evaluation = compare_perplexity(dense, pruned, texts["evaluation"]).to_dict()
        header = {
            "model": name,
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **keys,
            "recipe": self.recipe.to_dict(),
            "texts": {text: tokens.description | {"digest": tokens.digest} for text, tokens in texts.items()},
            "seconds": {"total": time.perf_counter() - self.started, **self.stages.seconds},
            "memory": {
                "predicted_bytes": predict_peak(ends_bytes(source), *self.held_by_stream, self.memories),
                "measured_bytes": memory.peak - memory.baseline,
                "baseline_bytes": memory.baseline,
            },
            "size": source.sizes() if isinstance(source, CheckpointSource) else None,
            "evaluation": evaluation,
        }
        return Report(rows, header, tuple(self.structures))

    def _compute_dtype(self, model: PreTrainedModel) -> torch.dtype:
        """The dtype in which the layers of a model in memory are computed."""
        wanted = self.recipe.compute_dtype
        if wanted == "auto":
            return computed_in(model.dtype, self.device)
        if wanted not in ("float32", dtype_name(model.dtype)):
            raise RecipeError(
                f"compute_dtype: {wanted} for a model in memory in {dtype_name(model.dtype)}",
                expected="auto, float32, or the dtype that it has",
                fix="load the model in this dtype, or prune its folder",
            )
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype

    def _tell(self, layer: ResidentLayer, step: str) -> None:
        self.watch(Progress("pruning", layer.index, len(layer.stream.source.layers), step, self._mean_error()))

    def _teller(self, layer: ResidentLayer) -> Callable[[str], None]:
        return lambda step: self._tell(layer, step)

    def _mean_error(self) -> float | None:
        return sum(self.errors) / len(self.errors) if self.errors else None


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    return {"llmprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
