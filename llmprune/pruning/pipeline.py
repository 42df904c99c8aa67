"""Prune a model with a recipe: the whole run, from text to report."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.devices import describe_device
from llmprune.errors import RecipeError, ResumeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.in_memory import require_plain, require_savable, saved_linear_keys, unwrapped
from llmprune.models.source import ModelSource, Source
from llmprune.pages import write_report
from llmprune.precision import computed_in, dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.allocating.allocate import allocate
from llmprune.pruning.card import write_card
from llmprune.pruning.context import Run, versions
from llmprune.pruning.deciding import decide_run
from llmprune.pruning.fitting import find_parts
from llmprune.pruning.gradients import dense_gradients
from llmprune.pruning.jobs import nothing_packed, plan_jobs, require_packable
from llmprune.pruning.layers import LayerDriver
from llmprune.pruning.reporting import (
    ask_in_memory,
    ask_stored,
    compare_sizes,
    compare_writing,
    evaluate,
    make_report,
    reevaluated,
)
from llmprune.pruning.rotation.rotating import Rotating, discard_rotated
from llmprune.pruning.saving import evaluating, save_dense, save_pruned, take_over
from llmprune.pruning.tracking import track
from llmprune.pruning.writing import Writer
from llmprune.recipe.allocation import Uniform
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.storage.files import write_text
from llmprune.storage.folders import (
    RECIPE_NAME,
    SAMPLES_NAME,
    expanded,
    locked,
    require_empty,
    require_free,
    require_other,
    require_space,
)
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.output import OutputFolder, require_resumable
from llmprune.storage.report import Report, load_report
from llmprune.storage.source_watch import SourceWatch
from llmprune.stream.stream import Stream
from llmprune.structures.describe.audit import audit_checkpoint
from llmprune.structures.reduction import Reduction
from llmprune.structures.removable import Removable
from llmprune.structures.survey import check_budget
from llmprune.text.generated import write_samples
from llmprune.text.loading import model_positions, tokenizer_for
from llmprune.text.mix import by_source
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import Tokens


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
    run = Run.begin(settings, watch)
    model = unwrapped(model)
    if isinstance(model, nn.Module):
        require_plain(model)
    if not isinstance(model, PreTrainedModel):
        if output is None:
            raise RecipeError(f"no output folder for {model}", fix='pass one, for example output="pruned"')
        folder = resolve_model(model)
        with run.watch:
            return prune_checkpoint(run, str(model), folder, expanded(output), resume=resume, overwrite=overwrite)
    if resume:
        raise ResumeError("a model in memory cannot be resumed", fix="save it and pass the folder")
    tokenizer = tokenizer or tokenizer_for(settings.texts.values(), model.config._name_or_path, model.config)
    with run.watch:
        folder_or_none = None if output is None else expanded(output)
        return prune_in_memory(run, model, folder_or_none, tokenizer, overwrite=overwrite)


def prune_checkpoint(
    run: Run, name: str, folder: Path, output: Path, *, resume: bool = False, overwrite: bool = False
) -> Report:
    """Prune a checkpoint folder into another one.

    Args:
        run: its context.
        name: of the model, as the user gave it.
        folder: the checkpoint.
        output: where the pruned checkpoint is written.
        resume: as for `prune`.
        overwrite: as for `prune`.

    Raises:
        LlmpruneError: as for `prune`.
    """
    require_other(output, folder)
    require_free(output)
    require_empty(output, resume=resume, overwrite=overwrite)
    unchanged = SourceWatch(folder)
    source = run.open(folder)
    rotating = Rotating.begin(run, folder)
    tokenizer = tokenizer_for(run.recipe.texts.values(), folder, source.config)
    run = run.fitted(model_positions(source.config))
    found = None
    if run.recipe.structures is not None:
        run.watch(Progress("finding structures"))
        found = Removable.find(source, run.recipe.structures)
    jobs = plan_jobs(_preview(source, found), run.recipe)
    require_packable(jobs, source.linear_key, run.recipe.format)
    find_parts(source, run.recipe.reconstruct)  # refused now, if at all
    nbytes = sum(stored.nbytes for stored in source.stored.values())
    require_space(output, nbytes if rotating is None else 2 * rotating.nbytes, resume=resume)
    recipe = {"recipe": run.recipe.to_dict() | {"description": "", "report_to": None}}
    environment = _environment(run, source)
    if resume:
        require_resumable(output, recipe | environment)
    texts = run.texts(source, jobs, tokenizer)
    run.watch(Progress("digesting the source"))
    digests = {text: tokens.digest for text, tokens in texts.items()}
    keys = {**recipe, "tokens": digests, "source": checkpoint_digest(folder), **environment}
    with locked(output):
        target = OutputFolder.open(output, keys, resume=resume, overwrite=overwrite, source=unchanged)
        run.watch.resumable = True
        if target.reevaluated:
            run.watch(Progress(f"evaluated again, not pruned again: {'; '.join(target.reevaluated)}"))
        if target.complete:
            if not target.reevaluated:
                run.watch(Progress("nothing to do: the run in this folder is finished"))
            return _evaluate_again(target, run, name, source, texts) if target.reevaluated else load_report(output)
        _keep_samples(target.path, texts, tokenizer)
        write_text(target.path / RECIPE_NAME, run.recipe.to_yaml())
        dense = run.dense.final_states(source, texts, run.settings, run.watch, run.stages)
        if rotating is None:
            return _into(target, run, name, source, texts, found, dense, tokenizer)
        rotated, rotation = rotating.rotated(run, name, texts["calibration"], target.path)
        if found is not None:
            found = Removable.find(rotated, found.spec)
        return _into(target, run, name, rotated, texts, found, dense, tokenizer, {"rotation": rotation})


def _into(
    target: OutputFolder,
    run: Run,
    name: str,
    source: CheckpointSource,
    texts: Mapping[str, Tokens],
    found: Removable | None,
    dense: Stream | None,
    tokenizer: Tokenizer,
    before: Mapping[str, Any] | None = None,
) -> Report:
    """Do what is left to do in an open output folder."""
    if found is not None and found.draft_head is not None:
        run.watch(Progress(str(found.draft_head)))
    decisions = decide_run(run, source, found, target, texts["calibration"])
    reduction = None if found is None or decisions is None else Reduction(found, decisions)
    # Before what an interrupted run has committed takes the place of dense weights.
    jobs = plan_jobs(
        source if reduction is None else reduction.result, run.recipe, {} if decisions is None else decisions.matrices
    )
    gradients = dense_gradients(run, source, jobs, texts["calibration"], target.layers, reduction)
    streamed, result = (source, source) if reduction is None else (reduction.source, reduction.result)
    for layer in target.layers.values():
        result.overlay(target.path / layer.shard, target.layouts_of(layer))
    writer = Writer(source, reduction, target, run.recipe.format)
    layers = LayerDriver(
        run, streamed, jobs, texts["calibration"], writer, reduction, lambda: run.open(source.folder), gradients
    ).drive()
    _complete(run, writer)
    allocation = None if decisions is None else decisions.evidence.get("allocation")
    more: dict[str, Any] = {"allocation": allocation} if allocation else {}
    if reduction is not None:
        # The written checkpoint is measured, which also checks that it can be read.
        run.watch(Progress("checking the written checkpoint"))
        result = _audited(run, target.path)
        more |= compare_sizes(run, source, result, target.decisions, texts["calibration"])
        more["draft_head"] = None if found is None or found.draft_head is None else str(found.draft_head)
    report = make_report(
        run,
        name,
        target.keys,
        result,
        texts,
        layers,
        dense,
        result.sizes(),
        {**more, **(before or {}), **compare_writing(run, source, target.path, texts)},
        lambda: ask_stored(run, source, target.path, tokenizer),
    )
    run.watch(Progress("writing the report"))
    report.save(target.path)
    write_card(target.path, name, run.recipe, report)
    write_report(target.path)
    discard_rotated(target.path)
    target.close()
    _track(run, report, target.path)
    return report


def _complete(run: Run, writer: Writer) -> None:
    """Write what is outside the layers, so that the files can be loaded, and say what was left out."""
    run.watch(Progress("writing what is outside the layers"))
    with run.stages("write"):
        for left_out in writer.finish():
            run.watch(Progress(left_out))
    if run.recipe.format != "dense" and not any(layer.layouts for layer in writer.target.layers.values()):
        run.watch(Progress(nothing_packed(run.recipe.format)))


def _evaluate_again(
    target: OutputFolder, run: Run, name: str, source: CheckpointSource, texts: Mapping[str, Tokens]
) -> Report:
    """Measure a finished checkpoint by another evaluation; its weights stay as they are."""
    dense = run.dense.final_states(source, texts, run.settings, run.watch, run.stages)
    evaluation = evaluate(run, run.open(target.path), texts, dense)
    report = reevaluated(run, load_report(target.path), target.keys, texts, evaluation)
    write_text(target.path / RECIPE_NAME, run.recipe.to_yaml())
    report.save(target.path)
    write_card(target.path, name, run.recipe, report)
    write_report(target.path)
    target.evaluated_again()
    _track(run, report, target.path)
    return report


def _preview(source: CheckpointSource, found: Removable | None) -> CheckpointSource:
    """The model that weights are pruned in, as far as its sizes are known before any text was read.

    Raises:
        ModelError: no config describes it.
        PatternError: the budget is out of reach.
    """
    if found is None:
        return source
    # Whatever will be decided, some config must describe a model with this much removed.
    reduction = Reduction(found, found.preview())
    check_budget(found)
    return reduction.result


def _audited(run: Run, folder: Path) -> CheckpointSource:
    """Open the checkpoint that was written, and check its config and its tensors against each other."""
    source = run.open(folder)
    with run.stages("audit"):
        audit_checkpoint(source)
    return source


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
    on_disk = run.recipe.structures is not None or run.recipe.rotation is not None
    if output is not None or on_disk:
        require_savable(model)
    if on_disk:
        return _shrink(run, model, output, tokenizer, overwrite=overwrite)
    if output is not None:
        require_other(output, model.config._name_or_path)
        require_free(output)
        require_empty(output, resume=False, overwrite=overwrite)
        require_space(output, sum(parameter.nbytes for parameter in model.parameters()))
    run = run.fitted(model_positions(model.config))
    source = ModelSource(model, run.recipe.decoder_layers, _compute_dtype(run, model))
    jobs = plan_jobs(source, run.recipe)
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
        keys = _environment(run, source)
        report = make_report(run, _name(model), keys, source, texts, layers, dense, more=more, ask=ask)
    if output is not None:
        if not save_pruned(model, tokenizer, output, run.recipe, report, overwrite=overwrite):
            run.watch(Progress(nothing_packed(run.recipe.format)))
        _keep_samples(output, texts, tokenizer)
    _track(run, report, output)
    return report


def _track(run: Run, report: Report, output: Path | None) -> None:
    if failure := track(run.recipe.report_to, report, output):
        run.watch(Progress(failure))


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


def _keep_samples(output: Path, texts: Mapping[str, Tokens], tokenizer: Tokenizer) -> None:
    """Keep self-generated calibration text with the result: nobody else has it."""
    parts = [part.ids for _, part in by_source(texts["calibration"]) if part.description["source"] == "self"]
    if parts:
        write_samples(output / SAMPLES_NAME, torch.cat(parts), tokenizer)


def _name(model: PreTrainedModel) -> str:
    return model.config._name_or_path or type(model).__name__


def _environment(run: Run, source: Source) -> dict[str, Any]:
    """What the result depends on, apart from the recipe, the text and the weights."""
    return {
        "version": versions(),
        "device": describe_device(run.device),
        "compute_dtype": dtype_name(source.dtype),
    }


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
