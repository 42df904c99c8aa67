"""Prune a model by a recipe: the whole run, from text to report."""

import contextlib
import datetime
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from llmprune.calibration import TextSpec, Tokenizer, Tokens
from llmprune.card import write_card
from llmprune.checkpoint import Stored, read_header, write_text
from llmprune.devices import describe_device, resolve_device
from llmprune.errors import PatternError, RecipeError, ResumeError
from llmprune.hub import checkpoint_digest, resolve_model
from llmprune.memory import LayerMemory, PeakWatch, ends_bytes, layer_memory, predict_peak
from llmprune.output import (
    OutputFolder,
    expanded,
    locked,
    remove_checkpoint,
    require_empty,
    require_free,
    require_other,
    require_space,
    writing_to,
)
from llmprune.packed import pack_matrices
from llmprune.packing import pack
from llmprune.perplexity import compare_perplexity, run_stream
from llmprune.planning import plan_jobs
from llmprune.progress import Progress, Watcher, ignore
from llmprune.recipe import Recipe, load_recipe
from llmprune.report import REPORT_NAME, MatrixRow, Report, load_report
from llmprune.shortage import MemoryGuard, pruning_needs, sampling_needs
from llmprune.skeleton import quiet_transformers
from llmprune.solving import Job, solve_layer
from llmprune.source import CheckpointSource, ModelSource, Source, positive_zeros
from llmprune.stream import ResidentLayer, Stream, StreamSettings
from llmprune.texts import load_texts, load_tokenizer
from llmprune.timing import Stages
from llmprune.version import __version__

RECIPE_NAME = "recipe.yaml"


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
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    with run.guard:
        return run.in_memory(model, None if output is None else expanded(output), tokenizer, overwrite=overwrite)


class Run:
    """One run: the recipe, and what all its parts share."""

    def __init__(self, recipe: Recipe, watch: Watcher = ignore) -> None:
        self.recipe = recipe
        self.device = resolve_device(recipe.device)
        self.stages = Stages()
        self.started = time.perf_counter()
        self.memories: list[LayerMemory] = []
        self.errors: list[float] = []
        self.held_by_stream = 0, 0
        self.settings = StreamSettings(self.device, recipe.batch_size, recipe.held_back, int(recipe.activation_budget))
        self.guard = self.watch = MemoryGuard(self.settings, watch)

    def from_checkpoint(self, name: str, folder: Path, output: Path, *, resume: bool, overwrite: bool) -> Report:
        """Prune a checkpoint folder into another one."""
        require_other(output, folder)
        require_free(output)
        require_empty(output, resume=resume, overwrite=overwrite)
        source = self.open(folder)
        jobs = plan_jobs(source, self.recipe)
        require_space(output, sum(stored.nbytes for stored in source.stored.values()))
        texts = self._texts(source, jobs, folder, load_tokenizer(folder))
        keys = {
            "recipe": self.recipe.to_dict() | {"description": ""},
            "tokens": {text: tokens.digest for text, tokens in texts.items()},
            "source": checkpoint_digest(folder),
            "version": versions(),
            "device": describe_device(self.device),
        }
        with locked(output):
            target = OutputFolder.open(output, keys, resume=resume, overwrite=overwrite)
            self.guard.resumable = True
            if target.complete and (output / REPORT_NAME).exists():
                return load_report(output)
            return self._into(target, name, source, jobs, texts)

    def _into(
        self,
        target: OutputFolder,
        name: str,
        source: CheckpointSource,
        jobs: Sequence[dict[str, Job]],
        texts: Mapping[str, Tokens],
    ) -> Report:
        """Do what is left to do in an output folder that was opened."""
        write_text(target.path / RECIPE_NAME, self.recipe.to_yaml())
        dense = self._final_states(source, texts, "dense perplexity")
        for layer in target.layers.values():
            source.overlay(target.path / layer["shard"], target.layouts_of(layer))
        with PeakWatch(self.device) as memory:
            rows = self.prune_layers(source, jobs, texts["calibration"], target, memory)
        with self.stages("write"):
            target.finish(source.folder, self.write_ends(source, target))
        report = self._report(name, target.keys, source, texts, rows, dense, memory)
        report.save(target.path)
        write_card(target.path, name, self.recipe, report)
        target.close()
        return report

    def in_memory(
        self, model: PreTrainedModel, output: Path | None, tokenizer: Tokenizer, *, overwrite: bool
    ) -> Report:
        """Prune a model in place, and save it if there is an output folder."""
        if output is not None:
            require_other(output, model.config._name_or_path)
            require_free(output)
            require_empty(output, resume=False, overwrite=overwrite)
            require_space(output, sum(parameter.nbytes for parameter in model.parameters()))
        self._require_dtype(model)
        source = ModelSource(model, self.recipe.decoder_layers)
        jobs = plan_jobs(source, self.recipe)
        name = model.config._name_or_path or type(model).__name__
        keys = {"version": versions(), "device": describe_device(self.device)}
        with evaluating(model):
            texts = self._texts(source, jobs, model, tokenizer)
            dense = self._final_states(source, texts, "dense perplexity")
            with PeakWatch(self.device) as memory:
                rows = self.prune_layers(source, jobs, texts["calibration"], None, memory)
            report = self._report(name, keys, source, texts, rows, dense, memory)
        if output is not None:
            self._save(model, tokenizer, output, report, overwrite=overwrite)
        return report

    def open(self, folder: Path) -> CheckpointSource:
        """Open a checkpoint as this recipe computes it."""
        dtype = None if self.recipe.compute_dtype == "auto" else getattr(torch, self.recipe.compute_dtype)
        return CheckpointSource(folder, dtype, self.recipe.decoder_layers)

    def _texts(
        self, source: Source, jobs: Sequence[dict[str, Job]], model: Path | PreTrainedModel, tokenizer: Tokenizer
    ) -> dict[str, Tokens]:
        recipe = self.recipe
        total = recipe.calibration.samples + recipe.held_back
        specs: dict[str, TextSpec] = {"calibration": replace(recipe.calibration, samples=total)}
        if recipe.evaluation is not None:
            specs["evaluation"] = recipe.evaluation
        self.watch(Progress("calibration text"))
        if any(spec.source == "self" for spec in specs.values()):
            self.guard.expected = lambda: sampling_needs(source)
        with self.stages("text"):
            texts = load_texts(specs, model, tokenizer, self.device)
        self.guard.expected = lambda: pruning_needs(source, jobs, texts, self.settings)
        return texts

    def _final_states(self, source: Source, texts: Mapping[str, Tokens], stage: str) -> Stream | None:
        if "evaluation" not in texts:
            return None
        with self.stages(stage):
            return run_stream(source, texts["evaluation"].ids, self.settings, self.watch, stage)

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
        stream = Stream(source, tokens.ids, self.settings, self.stages)
        for layer in stream:
            if target is not None and layer.name in target.layers:
                self._tell(layer, "replaying")
                new = target.rows_of(layer.name)
            else:
                new = self._prune_layer(layer, jobs[layer.index], stream, memory)
                if target is not None:
                    self._commit(layer, source, target, new, jobs[layer.index])
            rows += new
            self.errors += [row.error for row in new if row.error is not None]
            self._tell(layer, "advancing")
        self.held_by_stream = stream.hidden.resident_bytes, stream.calls.nbytes
        self.watch(Progress("pruning", len(source.layers), len(source.layers), "", self._mean_error()))
        return tuple(rows)

    def _prune_layer(
        self, layer: ResidentLayer, jobs: dict[str, Job], stream: Stream, memory: PeakWatch
    ) -> list[MatrixRow]:
        self._tell(layer, "statistics")
        groups = layer.observe({name: job.method.needs for name, job in jobs.items()})
        batch_tokens = stream.batches[0].numel()
        held_back = self.recipe.held_back * stream.batches[0].shape[1]
        self.memories.append(layer_memory(layer, groups, jobs, batch_tokens, held_back))
        rows = solve_layer(layer, groups, jobs, self.recipe.experts.min_tokens, self.stages, self._teller(layer))
        peak = memory.read()
        return [replace(row, peak_bytes=peak) for row in rows]

    def _commit(
        self,
        layer: ResidentLayer,
        source: Source,
        target: OutputFolder,
        rows: Sequence[MatrixRow],
        jobs: Mapping[str, Job],
    ) -> None:
        assert isinstance(source, CheckpointSource)
        self._tell(layer, "writing")
        with self.stages("write"):
            shard = shard_name(source, layer.index + 1)
            tensors = source.checkpoint_tensors(layer.index, layer.replaced)
            # Under another key than the layer's name, the parts could not be told from it (see packing.py).
            patterns = {name: job.pattern for name, job in jobs.items() if source.linear_key(name) == f"{name}.weight"}
            tensors, layouts = pack_matrices(tensors, patterns, self.recipe.format)
            source.overlay(target.commit(layer.name, shard, tensors, rows, layouts), layouts)

    def write_ends(self, source: CheckpointSource, target: OutputFolder) -> dict[str, list[Stored]]:
        """Write everything outside the decoder layers; returns each shard's tensors."""
        first = shard_name(source, 0)
        tensors = {key: positive_zeros(source.stored[key][...]) for key in source.end_keys()}
        target.commit_ends(first, tensors)
        shards = [first, *(layer["shard"] for layer in target.layers.values())]
        return {shard: read_header(target.path / shard) for shard in shards}

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
        pruned = self._final_states(source, texts, "pruned perplexity")
        evaluation = None
        if dense is not None and pruned is not None:
            with self.stages("pruned perplexity"):
                evaluation = compare_perplexity(pruned, texts["evaluation"], dense.hidden, pruned.hidden).to_dict()
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
        return Report(rows, header)

    def _require_dtype(self, model: PreTrainedModel) -> None:
        wanted = self.recipe.compute_dtype
        if wanted not in ("auto", str(model.dtype).removeprefix("torch.")):
            raise RecipeError(
                f"compute_dtype: {wanted} for a model in memory in {str(model.dtype).removeprefix('torch.')}",
                expected="auto: a model in memory is computed in the dtype that it has",
                fix="load the model in this dtype, or prune its folder",
            )

    def _save(
        self, model: PreTrainedModel, tokenizer: Tokenizer, output: Path, report: Report, *, overwrite: bool
    ) -> None:
        """Save a model in memory beside the output folder first, then move the finished files in."""
        with torch.no_grad():
            for parameter in model.parameters():
                positive_zeros(parameter)
        with writing_to(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".llmprune-") as staging:
                folder = Path(staging) / "dense"
                with quiet_transformers():
                    model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
                for shard in folder.glob("*.safetensors"):
                    shard.chmod(0o644)  # safetensors creates private files
                write_text(folder / RECIPE_NAME, self.recipe.to_yaml())
                report.save(folder)
                write_card(folder, report.header["model"], self.recipe, report)
                if self.recipe.format != "dense":
                    # Where nothing gets smaller, all matrices stay dense, as they do from a checkpoint.
                    with contextlib.suppress(PatternError):
                        folder = pack(folder, folder.with_name("packed"), self.recipe.format).folder
                with locked(output):
                    require_empty(output, resume=False, overwrite=overwrite)
                    remove_checkpoint(output)
                    for file in folder.iterdir():
                        file.replace(output / file.name)

    def _tell(self, layer: ResidentLayer, step: str) -> None:
        self.watch(Progress("pruning", layer.index, len(layer.stream.source.layers), step, self._mean_error()))

    def _teller(self, layer: ResidentLayer) -> Callable[[str], None]:
        return lambda step: self._tell(layer, step)

    def _mean_error(self) -> float | None:
        return sum(self.errors) / len(self.errors) if self.errors else None


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model in evaluation mode: dropout would blur what calibration sees."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def shard_name(source: Source, number: int) -> str:
    """The usual shard name; number 0 holds what is outside the decoder layers."""
    return f"model-{number + 1:05d}-of-{len(source.layers) + 1:05d}.safetensors"


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    return {"llmprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
