"""The report of a recovery: how the loss fell, what it cost, and what was won."""

import datetime
import math
import time
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
from llmprune.models.checkpoint_source import open_checkpoint
from llmprune.progress import Watcher
from llmprune.storage.report import Report, load_report
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
        "evaluation", the dense model beside the recovered one, if there is a dense one; "perplexity" of each by name;
        and "gap_closed", the part of the pruned model's excess perplexity that is gone, if it has any.
    """
    settings = StreamSettings(device)
    sources = [open_checkpoint(folder, device) for folder in models]
    names = ("dense", "pruned", "recovered")[-len(models) :]
    if len(models) < 3:
        found = [measure_perplexity(source, tokens, settings, watch).perplexity for source in sources]
        return {"perplexity": {name: finite(value) for name, value in zip(names, found, strict=True)}}
    streams = [
        run_stream(source, tokens.ids, settings, watch, f"{name} perplexity")
        for source, name in zip(sources, names, strict=True)
    ]
    before, after = (compare_perplexity(streams[0], stream, tokens, watch) for stream in streams[1:])
    found = [after.dense.perplexity, before.pruned.perplexity, after.pruned.perplexity]
    gap = found[1] - found[0]
    return {
        "evaluation": after.to_dict(),
        "perplexity": {name: finite(value) for name, value in zip(names, found, strict=True)},
        "gap_closed": (found[1] - found[2]) / gap if math.isfinite(gap) and gap > 0 else None,
    }


def make_report(
    run: "Recovery",
    keys: dict[str, Any],
    state: TrainerState,
    facts: dict[str, int],
    tokens: Tokens,
    zeros: dict[str, int],
    measured: dict[str, Any] | None,
) -> Report:
    """Assemble the report.

    Args:
        run: what was asked for.
        keys: what the result depends on.
        state: of the Trainer, at its end.
        facts: bytes of memory, and the step whose weights were kept.
        tokens: what was trained on.
        zeros: before and after.
        measured: as `measure` returns it; None: nothing was measured.
    """
    best_step = facts.pop("best_step")
    model, teacher = run.names
    history = state.log_history
    recovery = {
        "teacher": teacher or None,
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
        "pruned_by": _recipe_of(run.source.folder),
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
        "seconds": {"total": time.perf_counter() - run.started, **run.stages.seconds},
        "memory": facts,
        "size": run.source.sizes(),
        "evaluation": (measured or {}).get("evaluation"),
        "recovery": recovery,
    }
    return Report((), header)


def _point(entry: dict[str, Any], *names: str) -> dict[str, float | None]:
    return {"step": entry["step"], **{name: finite(entry[name]) for name in names if name in entry}}


def _recipe_of(folder: Path) -> Any:
    """The recipe by which the checkpoint was pruned, if its report says so."""
    if not (folder / "report.json").is_file():
        return None
    return load_report(folder).header.get("recipe")
