"""Prune a checkpoint folder into another one, in one process or in several that share the batches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmprune.devices import describe_device
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import Source
from llmprune.pages import write_report
from llmprune.precision import dtype_name
from llmprune.progress import Progress
from llmprune.pruning.allocating.allocate import require_allocatable
from llmprune.pruning.card import write_card
from llmprune.pruning.context import Run, versions
from llmprune.pruning.deciding import decide_run
from llmprune.pruning.fitting import find_parts
from llmprune.pruning.gradients import dense_gradients
from llmprune.pruning.jobs import Job, nothing_packed, plan_jobs, require_packable
from llmprune.pruning.layers import LayerDriver, PrunedLayers
from llmprune.pruning.reporting import (
    ask_stored,
    compare_sizes,
    compare_writing,
    evaluate,
    make_report,
    reevaluated,
)
from llmprune.pruning.rotation.rotating import Rotating, begin_rotation, discard_rotated, rotated_folder
from llmprune.pruning.sharing import require_same, require_shareable
from llmprune.pruning.tracking import track
from llmprune.pruning.writing import Writer
from llmprune.ranks import SINGLE
from llmprune.storage.files import write_text
from llmprune.storage.folders import (
    RECIPE_NAME,
    SAMPLES_NAME,
    locked,
    require_empty,
    require_free,
    require_other,
    require_space,
)
from llmprune.storage.hub import checkpoint_digest
from llmprune.storage.output import OutputFolder, require_resumable
from llmprune.storage.report import Report, load_report
from llmprune.storage.source_watch import SourceWatch
from llmprune.stream.stream import Stream, require_batches
from llmprune.structures.describe.audit import audit_checkpoint
from llmprune.structures.reduction import Reduction
from llmprune.structures.removable import Removable
from llmprune.structures.survey import check_budget
from llmprune.text.generated import write_samples
from llmprune.text.loading import model_positions, tokenizer_for
from llmprune.text.mix import by_source
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import Tokens


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
    if run.ranks.first:
        return run.ranks.share(_lead(run, name, folder, output, resume=resume, overwrite=overwrite))
    return _follow(run, name, folder)


@dataclass(frozen=True, slots=True)
class _Begun:
    """What the first process has prepared, for the others.

    Attributes:
        texts: the tokens.
        target: the output folder, to be read only.
        made_by: the checkpoint, and what the result depends on as well.
        rotates: whether the model is rotated first.
    """

    texts: dict[str, Tokens]
    target: OutputFolder
    made_by: dict[str, Any]
    rotates: bool


def _lead(run: Run, name: str, folder: Path, output: Path, *, resume: bool, overwrite: bool) -> Report:
    """What the first process does, or the only one."""
    require_shareable(run.recipe, run.ranks.size)
    require_other(output, folder)
    require_free(output)
    require_empty(output, resume=resume, overwrite=overwrite)
    unchanged = SourceWatch(folder)
    source = run.open(folder)
    run, rotating, left_out = begin_rotation(run, folder)
    tokenizer = tokenizer_for(run.recipe.texts.values(), folder, source.config)
    run, found, preview, jobs = _planned(run, source)
    require_packable(jobs, source.linear_key, run.recipe.format)
    find_parts(source, run.recipe.reconstruct)  # refused now, if at all
    nbytes = sum(stored.nbytes for stored in source.stored.values())
    require_space(output, nbytes if rotating is None else 2 * rotating.nbytes, resume=resume)
    recipe = {"recipe": run.recipe.to_dict() | {"description": "", "report_to": None}}
    made_by = environment(run, source)
    if resume:
        require_resumable(output, recipe | made_by, run.ranks.size)
    else:  # an interrupted run has decided, and needs no file any more
        require_allocatable(run.recipe, preview, jobs)
    texts = run.texts(source, jobs, tokenizer)
    require_batches(run.shared, len(texts["calibration"].ids))
    run.watch(Progress("digesting the source"))
    digests = {text: tokens.digest for text, tokens in texts.items()}
    made_by = {"source": checkpoint_digest(folder), **made_by}
    keys = {**recipe, "tokens": digests, **made_by}
    with locked(output):
        target = OutputFolder.open(
            output, keys, resume=resume, overwrite=overwrite, source=unchanged, processes=run.ranks.size
        )
        run.watch.resumable = True
        target.notes += [sentence for sentence in left_out if sentence not in target.notes]
        for sentence in (*left_out, *target.told):
            run.watch(Progress(sentence))
        if target.complete:
            run.ranks.share(None)
            if not target.reevaluated:
                run.watch(Progress("nothing to do: the run in this folder is finished"))
            return _evaluate_again(target, run, name, source, texts) if target.reevaluated else load_report(output)
        keep_samples(target.path, texts, tokenizer)
        write_text(target.path / RECIPE_NAME, run.recipe.to_yaml())
        run.ranks.share(_Begun(texts, target.followed(), made_by, rotating is not None))
        return _together(target, run, name, source, texts, found, tokenizer, rotating)


def _follow(run: Run, name: str, folder: Path) -> Report:
    """What the other processes do: all but writing."""
    begun: _Begun | None = run.ranks.share(None)
    if begun is not None:
        run.watch.resumable = True
        source = run.open(folder)
        require_same(begun.made_by, environment(run, source) | {"source": checkpoint_digest(folder)}, run.ranks.rank)
        tokenizer = tokenizer_for(run.recipe.texts.values(), folder, source.config)
        run, found, _, _ = _planned(run if begun.rotates else run.unrotated(), source)
        _together(begun.target, run, name, source, begun.texts, found, tokenizer)
    return run.ranks.share(None)


def _planned(
    run: Run, source: CheckpointSource
) -> tuple[Run, Removable | None, CheckpointSource, list[dict[str, Job]]]:
    """The run for this model, what can be removed from it, what is then left, and what is done to its matrices."""
    run = run.fitted(model_positions(source.config))
    found = None
    if run.recipe.structures is not None:
        run.watch(Progress("finding structures"))
        found = Removable.find(source, run.recipe.structures)
    preview = _preview(source, found)
    return run, found, preview, plan_jobs(preview, run.recipe)


def _together(
    target: OutputFolder,
    run: Run,
    name: str,
    source: CheckpointSource,
    texts: Mapping[str, Tokens],
    found: Removable | None,
    tokenizer: Tokenizer,
    rotating: Rotating | None = None,
) -> Report:
    """What all processes do in an open output folder; the first one has what rotates the model, if it is rotated."""
    dense = run.dense.final_states(source, texts, run.shared, run.watch, run.stages)
    before = None
    if run.recipe.rotation is not None:

        def rotate() -> dict[str, Any]:
            assert rotating is not None, "the first process plans the rotation"
            return rotating.rotate(run, name, texts["calibration"], target.path)

        before = {"rotation": run.ranks.once(rotate)}
        source = run.open(rotated_folder(target.path))
        if found is not None:
            found = Removable.find(source, found.spec)
    return _into(target, run, name, source, texts, found, dense, tokenizer, before)


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
    run.ranks.once(lambda: _complete(run, writer))
    if not run.ranks.first:
        return _measured_with(run, target, layers, texts, dense, None if reduction is not None else result)
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
    report.header["notes"] += target.notes
    run.watch(Progress("writing the report"))
    report.save(target.path)
    write_card(target.path, name, run.recipe, report)
    write_report(target.path)
    discard_rotated(target.path)
    target.close()
    track_run(run, report, target.path)
    return report


def _measured_with(
    run: Run,
    target: OutputFolder,
    layers: PrunedLayers,
    texts: Mapping[str, Tokens],
    dense: Stream | None,
    result: CheckpointSource | None,
) -> Report:
    """Take part in measuring the result; the first process makes the report of it."""
    if dense is not None:  # otherwise the first process may have moved what it has finished
        evaluate(run, result or run.open(target.path), texts, dense)
    return Report(layers.rows, {}, layers.structures, layers.matches)


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
    """Measure a finished checkpoint by another evaluation, in one process; its weights stay as they are."""
    run = replace(run, ranks=SINGLE)
    dense = run.dense.final_states(source, texts, run.settings, run.watch, run.stages)
    evaluation = evaluate(run, run.open(target.path), texts, dense)
    report = reevaluated(run, load_report(target.path), target.keys, texts, evaluation)
    write_text(target.path / RECIPE_NAME, run.recipe.to_yaml())
    report.save(target.path)
    write_card(target.path, name, run.recipe, report)
    write_report(target.path)
    target.evaluated_again()
    track_run(run, report, target.path)
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


def track_run(run: Run, report: Report, output: Path | None) -> None:
    """Hand a report to the tracker that the recipe names; a failure is told, and costs nothing else."""
    if failure := track(run.recipe.report_to, report, output):
        run.watch(Progress(failure))


def keep_samples(output: Path, texts: Mapping[str, Tokens], tokenizer: Tokenizer) -> None:
    """Keep self-generated calibration text with the result: nobody else has it."""
    parts = [part.ids for _, part in by_source(texts["calibration"]) if part.description["source"] == "self"]
    if parts:
        write_samples(output / SAMPLES_NAME, torch.cat(parts), tokenizer)


def environment(run: Run, source: Source) -> dict[str, Any]:
    """What the result depends on, apart from the recipe, the text and the weights."""
    return {
        "version": versions(),
        "device": describe_device(run.device),
        "compute_dtype": dtype_name(source.dtype),
    }
