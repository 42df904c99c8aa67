"""A recovery on its page: the loss as it fell, the scores of held-back text, and what was won."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.pages.charts import Axis, Series, lines
from llmprune.pages.page import Chart, Facts, Part, Table
from llmprune.units import quantity

_STEP = Axis("step")

# What has trained in place of all weights, and where it is afterwards.
_ADAPTERS = {
    "lora": ("masked LoRA", "merged into the weights"),
    "shira": ("SHiRA", "merged into the weights"),
    "low-rank": ("a low-rank correction", "beside the weights, in adapter/: without it, the model is the pruned one"),
}


def recovered_line(header: Mapping[str, Any]) -> str:
    """What was done, and what was won, in one sentence.

    Args:
        header: of the report of a recovery.
    """
    recovery = header["recovery"]
    name = Path(str(header.get("model") or "The model")).name
    steps = quantity(recovery["best_step"], "step")
    adapters = _adapters(recovery["options"])
    done = f"{name} was trained for {steps} with its zeros kept" + (f", by {adapters}" if adapters else "")
    if recovery["best_step"] == 0:
        done = f"{name} is as it was: no training step has lowered the loss of held-back text"
    return f"{done}; {_won(recovery)}."


def recovered_facts(recovery: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and lines for tables."""
    options, zeros = recovery["options"], recovery["zeros"]
    stopped = (
        "" if recovery["steps"] == recovery["planned_steps"] else f", stopped early of {recovery['planned_steps']:,}"
    )
    loss = options["loss"] + (f" ({options['kl_share']:.0%} KL)" if options["loss"] == "mix" else "")
    sequences, adapters = quantity(recovery["sequences"], "sequence"), _adapters(options)
    facts = [
        *([("adapters", adapters)] if adapters else []),
        ("zeros", f"{zeros['after']:,}, before {zeros['before']:,}"),
        ("text", f"{sequences} of {recovery['length']:,} tokens, {quantity(options['epochs'], 'epoch')}"),
        ("steps", f"{recovery['steps']:,}{stopped}; kept are the weights of step {recovery['best_step']:,}"),
        ("loss", f"{loss}, learning rate {options['learning_rate']:g}"),
    ]
    return facts + ([("teacher", str(recovery["teacher"]))] if recovery.get("teacher") else [])


def recovery_parts(recovery: Mapping[str, Any] | None) -> list[Part]:
    """The section of a report's page; empty if the report is of no recovery.

    Args:
        recovery: the entry of its header.
    """
    if not recovery:
        return []
    parts: list[Part] = [Facts(tuple(recovered_facts(recovery)))]
    if losses := recovery["losses"]:
        parts.append(_chart("chart-loss", "Training loss", [("loss", "loss")], losses))
    if scores := recovery["scores"]:
        named = [("loss", "eval_loss"), ("negative log-likelihood", "eval_nats")]
        parts.append(_chart("chart-held-back", "Held-back text", named, scores))
    return parts


def _adapters(options: Mapping[str, Any]) -> str:
    """Which adapters have trained, and where they are; empty if all weights have."""
    if options.get("adapter", "none") == "none":
        return ""
    kind, place = _ADAPTERS[options["adapter"]]
    return f"{kind} of rank {options['rank']}, {place}"


def _won(recovery: Mapping[str, Any]) -> str:
    perplexity = recovery.get("perplexity")
    if not perplexity:
        scores = recovery["scores"]
        if not scores:
            return "nothing was measured"
        best = next((score for score in scores if score["step"] == recovery["best_step"]), scores[-1])
        return f"loss of held-back text: {_shown(scores[0]['eval_loss'])} -> {_shown(best['eval_loss'])}"
    said = f"perplexity: {_shown(perplexity['pruned'])} -> {_shown(perplexity['recovered'])}"
    if "dense" not in perplexity:
        return said
    closed = recovery.get("gap_closed")
    share = "" if closed is None else f"; {closed:.0%} of the gap is closed"
    return f"{said} (dense {_shown(perplexity['dense'])}{share})"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _chart(name: str, title: str, series: list[tuple[str, str]], points: list[dict[str, Any]]) -> Chart:
    steps = [point["step"] for point in points]
    drawn = [
        Series(
            label, steps, [point.get(key) for point in points],
            [f"step {point['step']:,}: {_shown(point.get(key))}" for point in points], number,
        )
        for number, (label, key) in enumerate(series)
    ]  # fmt: skip
    rows = tuple((f"{point['step']:,}", *(_shown(point.get(key)) for _, key in series)) for point in points)
    table = Table(("step", *(label for label, _ in series)), rows, text=())
    return Chart(name, title, lines(drawn, _STEP, Axis("nats per token")), table)
