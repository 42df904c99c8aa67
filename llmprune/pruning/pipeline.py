"""Prune a model with a recipe: the whole run, from text to report."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.errors import RecipeError, ResumeError
from llmprune.models.in_memory import require_plain, require_savable, saved_linear_keys, unwrapped
from llmprune.models.source import ModelSource
from llmprune.precision import computed_in, dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.allocating.allocate import allocate, require_allocatable
from llmprune.pruning.context import Run, require_runnable
from llmprune.pruning.fitting import find_parts
from llmprune.pruning.gradients import dense_gradients
from llmprune.pruning.jobs import nothing_packed, plan_jobs, require_packable
from llmprune.pruning.layers import LayerDriver
from llmprune.pruning.on_disk import environment, keep_samples, prune_checkpoint, track_run
from llmprune.pruning.reporting import (
    ask_in_memory,
    make_report,
)
from llmprune.pruning.saving import evaluating, save_dense, save_pruned, take_over
from llmprune.ranks import finished, join
from llmprune.recipe.allocation import Uniform
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.storage.folders import (
    expanded,
    require_empty,
    require_free,
    require_other,
    require_space,
)
from llmprune.storage.hub import resolve_model
from llmprune.storage.report import Report
from llmprune.text.loading import model_positions, tokenizer_for
from llmprune.text.openings import Tokenizer


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
        model: a hub id, a local checkpoint folder or "testbed", which is read layer by layer and never changed; or a
            model in memory, which is pruned in place.
        recipe: a bundled recipe's name, a YAML file, a mapping or a `Recipe`.
        output: folder for the pruned checkpoint; optional for a model in memory.
        overrides: changes to the recipe, "key.path=value".
        tokenizer: of a model in memory; default: the one it was loaded with. A checkpoint has its own.
        resume: continue an interrupted run in `output`. If only the evaluation has changed, a finished run is evaluated
            again, and not pruned again.
        overwrite: replace an existing checkpoint in `output`.
        watch: told about every step.

    Returns:
        The report; it is also written into `output`.

    Raises:
        LlmpruneError: a subclass of it for everything that a user can fix; see `llmprune.errors`.

    Example:
        >>> prune("testbed", "demo", "out/demo").sparsity  # doctest: +SKIP
        0.5
    """
    settings = load_recipe(recipe, overrides)
    require_runnable(settings)  # before the processes meet, so that the first one alone says it
    run = Run.begin(settings, watch, ranks=join(settings.device))
    model = unwrapped(model)
    if isinstance(model, nn.Module):
        require_plain(model)
    if not isinstance(model, PreTrainedModel):
        if output is None:
            raise RecipeError(f"no output folder for {model}", fix='pass one, for example output="pruned"')
        run.ranks.once(lambda: resolve_model(model) and None)  # what is wrong is said by the first process alone
        folder = resolve_model(model)
        with run.watch:
            report = prune_checkpoint(run, str(model), folder, expanded(output), resume=resume, overwrite=overwrite)
        finished()
        return report
    if run.ranks.size > 1:
        raise RecipeError(
            f"{run.ranks.size} processes for a model in memory",
            expected="a checkpoint, which every process reads layer by layer",
            fix="save the model and pass the folder",
        )
    if resume:
        raise ResumeError("a model in memory cannot be resumed", fix="save it and pass the folder")
    tokenizer = tokenizer or tokenizer_for(settings.texts.values(), model.config._name_or_path, model.config)
    with run.watch:
        folder_or_none = None if output is None else expanded(output)
        return prune_in_memory(run, model, folder_or_none, tokenizer, overwrite=overwrite)


def prune_in_memory(
    run: Run, model: PreTrainedModel, output: Path | None, tokenizer: Tokenizer, *, overwrite: bool
) -> Report:
    """Prune a model in place, and save it if there is an output folder.

    Args:
        run: its context.
        model: changed.
        output: where it is saved; None: it is not saved.
        tokenizer: the model's.
        overwrite: as for `prune`.

    Raises:
        LlmpruneError: as for `prune`.
    """
    if run.recipe.rotation is not None and run.recipe.rotation.optional:
        # The caller's model keeps its basis, unless a rotation is insisted on.
        run.watch(Progress("pruned without a rotation, which is optional: the model is in memory"))
        run = run.unrotated()
    on_disk = run.recipe.structures is not None or run.recipe.rotation is not None
    if output is not None or on_disk:
        require_savable(model)
    if on_disk:
        return _shrink(run, model, output, tokenizer, overwrite=overwrite)
    if output is not None:
        require_other(output, model.config._name_or_path)
        require_free(output)
        require_empty(output, resume=None, overwrite=overwrite)
        require_space(output, sum(parameter.nbytes for parameter in model.parameters()))
    run = run.fitted(model_positions(model.config))
    source = ModelSource(model, run.recipe.decoder_layers, _compute_dtype(run, model))
    jobs = plan_jobs(source, run.recipe)
    require_allocatable(run.recipe, source, jobs)
    find_parts(source, run.recipe.reconstruct)
    if output is not None:
        saved = saved_linear_keys(model)
        require_packable(jobs, lambda name: key if (key := f"{name}.weight") in saved else None, run.recipe.format)
    with evaluating(model):
        texts = run.texts(source, jobs, tokenizer)
        dense = run.dense.final_states(source, texts, run.settings, run.watch, run.stages)
        before = ask_in_memory(run, model, tokenizer)
        more: dict[str, Any] = {}
        if not isinstance(run.recipe.allocation, Uniform):
            allocated = allocate(run, source, jobs, texts["calibration"].ids)
            more, jobs = {"allocation": allocated.record}, plan_jobs(source, run.recipe, allocated.choices)
        gradients = dense_gradients(run, source, jobs, texts["calibration"])
        layers = LayerDriver(run, source, jobs, texts["calibration"], gradients=gradients).drive()
        ask = partial(ask_in_memory, run, model, tokenizer, before)
        keys = environment(run, source)
        report = make_report(run, _name(model), keys, source, texts, layers, dense, more=more, ask=ask)
    if output is not None:
        if not save_pruned(model, tokenizer, output, run.recipe, report, overwrite=overwrite):
            run.watch(Progress(nothing_packed(run.recipe.format)))
        keep_samples(output, texts, tokenizer)
    track_run(run, report, output)
    return report


def _shrink(run: Run, model: PreTrainedModel, output: Path | None, tokenizer: Tokenizer, *, overwrite: bool) -> Report:
    """Prune a copy on disk, where modules can change their size or be untied, and load the result into the model."""
    _compute_dtype(run, model)
    if output is not None:
        require_other(output, model.config._name_or_path)
    with tempfile.TemporaryDirectory(prefix="llmprune-model-") as staging:
        dense = Path(staging) / "dense"
        save_dense(model, tokenizer, dense)
        folder = output or Path(staging) / "pruned"
        report = prune_checkpoint(run, _name(model), dense, folder, overwrite=overwrite)
        take_over(model, folder)
    return report


def _name(model: PreTrainedModel) -> str:
    return model.config._name_or_path or type(model).__name__


def _compute_dtype(run: Run, model: PreTrainedModel) -> torch.dtype:
    """The dtype in which the layers of a model in memory are computed."""
    wanted = run.recipe.compute_dtype
    if wanted == "auto":
        return computed_in(model.dtype, run.device)
    if wanted not in ("float32", dtype_name(model.dtype)):
        raise RecipeError(
            f"compute_dtype: {wanted} for a model in memory in {dtype_name(model.dtype)}",
            expected="auto, float32, or the dtype that it has",
            fix="load the model in this dtype, or prune its folder",
        )
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype
