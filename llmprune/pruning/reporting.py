"""What the report of a run contains in addition to its rows."""

import datetime
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

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
    """
    evaluation, stage = None, "pruned perplexity"
    if dense is not None:
        with run.stages(stage):
            pruned = run_stream(source, texts["evaluation"].ids, run.settings, run.watch, stage)
            evaluation = compare_perplexity(dense, pruned, texts["evaluation"], run.watch).to_dict()
    header = {
        "model": name,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **keys,
        "recipe": run.recipe.to_dict(),
        "texts": {text: tokens.description | {"digest": tokens.digest} for text, tokens in texts.items()},
        "seconds": {"total": time.perf_counter() - run.started, **run.stages.seconds},
        "memory": layers.memory,
        "size": sizes,
        "evaluation": evaluation,
        **(more or {}),
    }
    return Report(layers.rows, header, layers.structures)


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
