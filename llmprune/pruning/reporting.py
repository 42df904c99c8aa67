"""What the report of a run contains in addition to its rows."""

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from llmprune.devices import describe_host
from llmprune.measuring.answers import Answers, answer, attempt, stored_model, too_large
from llmprune.measuring.continuations import (
    Continuations,
    compare_continuations,
    continue_greedily,
    openings_of,
)
from llmprune.measuring.extent import measure_extent
from llmprune.measuring.layer_speed import compare_speed
from llmprune.measuring.perplexity import compare_perplexity, run_stream
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import Source
from llmprune.progress import Progress
from llmprune.pruning.context import Run
from llmprune.pruning.layers import PrunedLayers
from llmprune.storage.report import Report
from llmprune.stream.stream import Stream
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import Tokens


def make_report(
    run: Run,
    name: str,
    keys: Mapping[str, Any],
    source: Source,
    texts: Mapping[str, Tokens],
    layers: PrunedLayers,
    dense: Stream | None,
    sizes: Mapping[str, int] | None = None,
    more: Mapping[str, Any] | None = None,
    ask: Callable[[], Answers | None] = lambda: None,
) -> Report:
    """Measure the pruned model, and assemble the report.

    Args:
        run: its context.
        name: of the model, as the user gave it.
        keys: hashes, versions and device.
        source: the pruned model.
        texts: "calibration" and, if perplexity is measured, "evaluation".
        layers: their results.
        dense: a finished stream of the dense model over the evaluation text; None: perplexity is not measured.
        sizes: bytes of the checkpoint, as `CheckpointSource.sizes` gives them; None for a model in memory.
        more: the record of an allocation, and the result of `compare_sizes`.
        ask: gives the answers of both models, after the evaluation; None: nothing is asked.
    """
    evaluation = evaluate(run, source, texts, dense)
    answers = ask()
    header = {
        "model": name,
        **_made(run, keys, texts),
        "host": describe_host(run.device) | ({"processes": run.ranks.size} if run.ranks.size > 1 else {}),
        "parameters": sum(parameter.numel() for parameter in source.model.parameters()),
        "notes": list(dict.fromkeys(str(t.description["note"]) for t in texts.values() if "note" in t.description)),
        "seconds": {"total": time.perf_counter() - run.started, **run.stages.seconds},
        "memory": layers.memory,
        "size": sizes,
        "evaluation": evaluation,
        **({} if answers is None else {"answers": answers.to_dict()}),
        **(more or {}),
    }
    return Report(layers.rows, header, layers.structures, layers.matches)


def ask_stored(run: Run, dense: CheckpointSource, folder: Path, tokenizer: Tokenizer) -> Answers | None:
    """The answers of a checkpoint and of the pruned one, each loaded completely; None if nothing is asked.

    Args:
        run: its context.
        dense: the model that was pruned.
        folder: the pruned checkpoint.
        tokenizer: of both.
    """
    if not (prompts := prompts_of(run, tokenizer)):
        return None
    if reason := too_large(dense, run.device):
        run.watch(Progress("answers", step=f"left out: {reason}"))
        return Answers(prompts, skipped=reason)

    def ask(which: str, where: Path) -> tuple[str, ...]:
        run.watch(Progress("answers", step=f"{which} model, {len(prompts)} prompts"))
        return answer(stored_model(where, run.device), tokenizer, prompts)

    assert dense.folder is not None
    source = dense.folder
    with run.stages("answers"):
        return attempt(prompts, lambda: ask("dense", source), lambda: ask("pruned", folder))


def compare_writing(run: Run, dense: CheckpointSource, folder: Path, texts: Mapping[str, Tokens]) -> dict[str, Any]:
    """What the report says about text that both models write, if layers or blocks have been removed; otherwise nothing.

    Args:
        run: its context.
        dense: the model that was pruned.
        folder: the pruned checkpoint.
        texts: the evaluation text is continued; without one nothing is compared.
    """
    spec = run.recipe.structures
    if spec is None or not (spec.depth or spec.blocks) or "evaluation" not in texts:
        return {}
    if reason := too_large(dense, run.device):
        return {"generation": Continuations(skipped=reason).to_dict()}
    openings, tokens = openings_of(texts["evaluation"].ids)

    def write(which: str, where: Path) -> Tensor:
        run.watch(Progress("continuations", step=f"{which} model, {len(openings)} openings"))
        return continue_greedily(stored_model(where, run.device), openings, tokens)

    assert dense.folder is not None
    source = dense.folder
    with run.stages("continuations"):
        found = compare_continuations(openings, tokens, lambda: write("dense", source), lambda: write("pruned", folder))
    return {"generation": found.to_dict()}


def ask_in_memory(
    run: Run, model: PreTrainedModel, tokenizer: Tokenizer, before: Answers | None = None
) -> Answers | None:
    """The answers of a model in memory: as the dense one at first, then, with these as `before`, as the pruned one."""
    if not (prompts := prompts_of(run, tokenizer)) or (before is not None and before.skipped):
        return before
    run.watch(Progress("answers", step=f"{'dense' if before is None else 'pruned'} model, {len(prompts)} prompts"))
    with run.stages("answers"):
        if before is None:
            return attempt(prompts, lambda: answer(model, tokenizer, prompts), tuple)
        return attempt(prompts, lambda: before.dense, lambda: answer(model, tokenizer, prompts))


def prompts_of(run: Run, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What both models are asked; empty without a tokenizer that can spell out answers."""
    evaluation = run.recipe.evaluation
    return evaluation.prompts if evaluation is not None and hasattr(tokenizer, "decode") else ()


def evaluate(run: Run, source: Source, texts: Mapping[str, Tokens], dense: Stream | None) -> dict[str, Any] | None:
    """Measure the perplexity of the pruned model; None if there is no dense one to compare with."""
    if dense is None:
        return None
    stage = "pruned perplexity"
    with run.stages(stage):
        pruned = run_stream(source, texts["evaluation"].ids, run.shared, run.watch, stage)
        return compare_perplexity(dense, pruned, texts["evaluation"], run.watch).to_dict()


def reevaluated(
    run: Run, report: Report, keys: Mapping[str, Any], texts: Mapping[str, Tokens], evaluation: dict[str, Any] | None
) -> Report:
    """The report of a finished run with another evaluation.

    Args:
        run: the context of the evaluation.
        report: of the finished run.
        keys: as for `make_report`.
        texts: as for `make_report`.
        evaluation: the result of `evaluate`.
    """
    before = dict(report.header["seconds"])
    spent = time.perf_counter() - run.started - sum(before.get(stage, 0.0) for stage in run.stages.seconds)
    seconds = {**before, **run.stages.seconds, "total": before["total"] + spent}
    header = {**report.header, **_made(run, keys, texts), "seconds": seconds, "evaluation": evaluation}
    return replace(report, header=header)


def _made(run: Run, keys: Mapping[str, Any], texts: Mapping[str, Tokens]) -> dict[str, Any]:
    """When, from what and by which recipe."""
    return {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **keys,
        "recipe": run.recipe.to_dict(),
        "texts": {text: tokens.description | {"digest": tokens.digest} for text, tokens in texts.items()},
    }


def compare_sizes(
    run: Run, dense: CheckpointSource, pruned: CheckpointSource, decisions: Mapping[str, Any] | None, tokens: Tokens
) -> dict[str, Any]:
    """What the report says about a model that was made smaller, compared with the dense one.

    Args:
        run: its context.
        dense: the model before.
        pruned: the model after.
        decisions: as plain data.
        tokens: the calibration text; the first sample is timed.
    """
    run.watch(Progress("speed"))
    with run.stages("speed"):
        speeds = compare_speed(dense, pruned, tokens.ids[:1], run.device)
    both = ("dense", "pruned")
    return {
        "decisions": decisions,
        "extent": {name: measure_extent(model).to_dict() for name, model in zip(both, (dense, pruned), strict=True)},
        "speed": {name: asdict(speed) for name, speed in zip(both, speeds, strict=True)},
    }
