"""The report of a recovery: how the loss fell, what it cost, and what was won."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import TrainerState

from llmprune import __version__
from llmprune.devices import describe_device, describe_host
from llmprune.measuring.perplexity import compare_perplexity, finite, measure_perplexity, run_stream
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint
from llmprune.progress import Watcher
from llmprune.storage.report import MatrixRow, Report
from llmprune.stream.stream import StreamSettings
from llmprune.text.tokens import Tokens
from llmprune.torchrun import processes

if TYPE_CHECKING:
    from llmprune.recovery.recover import Recovery


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the result."""
    return {"llmprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def measure(models: Sequence[Path], tokens: Tokens, device: torch.device, watch: Watcher) -> dict[str, Any]:
    """Measure models on a text, by the protocol of `llmprune perplexity`.

    Args:
        models: the dense one, if there is one, the pruned one and the recovered one.
        tokens: of the text.
        device: where it is computed.
        watch: told about every step.

    Returns:
        "perplexity" of each by name. With a dense one "evaluation", that beside the recovered one, "before", how far
        the pruned one was from it, and "gap_closed", the part of the pruned model's excess perplexity that is gone, if
        it has any; without one "measured", the recovered one's figures with the text.
    """
    settings = StreamSettings(device)
    sources = [open_checkpoint(folder, device) for folder in models]
    names = ("dense", "pruned", "recovered")[-len(models) :]
    if len(models) < 3:
        alone = [measure_perplexity(source, tokens, settings, watch) for source in sources]
        shown = {name: finite(one.perplexity) for name, one in zip(names, alone, strict=True)}
        return {"perplexity": shown, "measured": alone[-1].to_dict()}
    streams = [
        run_stream(source, tokens.ids, settings, watch, f"{name} perplexity")
        for source, name in zip(sources, names, strict=True)
    ]
    before, after = (compare_perplexity(streams[0], stream, tokens, watch) for stream in streams[1:])
    found = [after.dense.perplexity, before.pruned.perplexity, after.pruned.perplexity]
    gap = found[1] - found[0]
    return {
        "evaluation": after.to_dict(),
        "before": {key: before.to_dict()[key] for key in ("kl_divergence", "agreement")},
        "perplexity": {name: finite(value) for name, value in zip(names, found, strict=True)},
        "gap_closed": (found[1] - found[2]) / gap if math.isfinite(gap) and gap > 0 else None,
    }


def make_report(
    run: "Recovery",
    keys: dict[str, Any],
    state: TrainerState,
    facts: dict[str, int],
    tokens: Tokens,
    rows: tuple[MatrixRow, ...],
    zeros: dict[str, int],
    measured: dict[str, Any] | None,
    pruned: Report | None,
) -> Report:
    """Assemble the report.

    Args:
        run: what was asked for.
        keys: what the result depends on.
        state: of the Trainer, at its end.
        facts: bytes of memory, and the step whose weights were kept.
        tokens: what was trained on.
        rows: of what pruning has zeroed.
        zeros: of all matrices, before and after.
        measured: as `measure` returns it; None: nothing was measured.
        pruned: the report of the pruned model, if it has one.
    """
    best_step = facts.pop("best_step")
    model, teacher = run.names
    history = state.log_history
    recovery = {
        "teacher": teacher or None,
        "dense": None if run.teacher is None else _dense(run.teacher, keys["teacher"]),
        "options": asdict(run.options),
        "processes": processes(),
        "sequences": len(tokens.ids) - (run.options.held_back or 0),
        "held_back": run.options.held_back,
        "length": tokens.ids.shape[1],
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "best_step": best_step,
        "losses": [_point(entry, "loss", "learning_rate", "grad_norm") for entry in history if "loss" in entry],
        "scores": [_point(entry, "eval_loss", "eval_nats") for entry in history if "eval_loss" in entry],
        "zeros": zeros,
        "pruned_by": None if pruned is None else _recipe_of(pruned),
        **{key: value for key, value in (measured or {}).items() if key != "evaluation"},
    }
    header = {
        "model": model,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source": keys["source"],
        "tokens": {"training": tokens.digest},
        "texts": {"training": tokens.description | {"digest": tokens.digest}},
        "version": versions(),
        "device": describe_device(run.device),
        "host": describe_host(run.device),
        "parameters": sum(parameter.numel() for parameter in run.source.model.parameters()),
        "seconds": run.stages.spent(),
        "memory": facts,
        "size": run.source.sizes(),
        "evaluation": (measured or {}).get("evaluation"),
        "recovery": recovery,
    }
    return Report(rows, header)


def _dense(teacher: CheckpointSource, digest: str) -> dict[str, Any]:
    """What a comparison says of the dense model."""
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    return {"source": digest, "parameters": parameters, "nbytes": teacher.sizes()["dense_bytes"]}


def _point(entry: dict[str, Any], *names: str) -> dict[str, float | None]:
    return {"step": entry["step"], **{name: finite(entry[name]) for name in names if name in entry}}


def _recipe_of(report: Report) -> Any:
    """The recipe by which weights were pruned, in this run or in one before it; None if nothing says so."""
    header = report.header
    if recovery := header.get("recovery"):
        return recovery.get("pruned_by")
    return (header.get("training") or {}).get("recipe") or header.get("recipe")
