"""Tables of a run, planned and finished, and of the recipes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmprune.cli.console import facts, new_table
from llmprune.pages.fitted import fitting_facts
from llmprune.pages.headline import headline
from llmprune.pages.labels import divergence, massive_line, opened, text_name
from llmprune.units import factor_stderr, format_change, format_seconds, format_size, quantity, spans

if TYPE_CHECKING:
    from llmprune.pruning.forecast.plan import DryRun, LayerPlan
    from llmprune.storage.report import Report

_MODELS = ("dense", "pruned")


def report_table(report: "Report", folder: Path) -> RenderableType:
    """The summary of a run: its cost in quality, time and memory, and where to find the details."""
    header = report.header
    climbed = sum(len(row.damping_tried) > 1 for row in report.rows)
    priors = sum(row.prior_tokens > 0 for row in report.rows)
    stages = [f"{stage} {format_seconds(value)}" for stage, value in header["seconds"].items() if stage != "total"]
    memory = header["memory"]
    resident = memory.get("resident_bytes")
    error = "not measured" if report.mean_error is None else f"{report.mean_error:.4f} (mean)"
    found = facts(
        ("base model", header["model"]),
        *_evaluation_facts(report),
        *_removal_facts(report),
        *([("draft head", dropped)] if (dropped := header.get("draft_head")) else []),
        *([("sparsity", _sparsity(report))] if report.rows else []),
        *_allocation_facts(header.get("allocation")),
        ("relative output error", error),
        *fitting_facts(report),
        *([("dampening increased", f"for {quantity(climbed, 'matrix', 'matrices')}")] if climbed else []),
        *([("massive activations", massive_line(report.massive))] if report.massive else []),
        *([("too few tokens", f"for {quantity(priors, 'matrix', 'matrices')} of experts")] if priors else []),
        ("seconds", f"{format_seconds(header['seconds']['total'])}: {', '.join(stages)}"),
        (
            "peak memory",
            f"{format_size(memory['predicted_bytes'])} predicted, {format_size(memory['measured_bytes'])} measured",
        ),
        *([("", f"{format_size(resident)} resident in all, with Python and its libraries")] if resident else []),
        *_size_facts(header["size"]),
        *_generation_facts(header.get("generation")),
        ("report", str(folder / "report.json")),
        *([("page", str(folder / "report.html"))] if (folder / "report.html").exists() else []),
    )
    lead = Text(headline(report, str(folder)), "bold")
    return Group(lead, Text(), found, *_answers(report), *(Text(f"note: {note}") for note in report.notes))


def _generation_facts(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """How much of what the dense model writes the pruned one writes, too; empty where it was not measured."""
    if not found:
        return []
    if found["skipped"]:
        return [("generation", f"left out: {found['skipped']}")]
    alike = f"{found['agreement']:.1%} of {found['tokens']} greedy tokens agree before the first difference"
    return [("generation", f"{alike}; {found['identical']} of {found['prompts']} continuations are identical")]


def _answers(report: "Report") -> list[RenderableType]:
    """The prompts that both models have answered, one below the other."""
    answers = report.header.get("answers")
    if not answers:
        return []
    if answers["skipped"]:
        return [Text(f"answers left out: {answers['skipped']}")]
    found = zip(answers["prompts"], answers["dense"], answers["pruned"], strict=True)
    lines = [
        (name, " ".join(text.split()))
        for asked, dense, pruned in found
        for name, text in (("prompt", asked), ("  dense", dense), ("  pruned", pruned))
    ]
    return [Text(), facts(*lines)]


def _sparsity(report: "Report") -> str:
    overall = "" if report.overall_sparsity is None else f", {report.overall_sparsity:.2%} of all weights"
    return f"{report.sparsity:.2%} in {quantity(len(report.rows), 'matrix', 'matrices')}{overall}"


def _allocation_facts(record: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What an allocation is worth beside uniform; empty without one."""
    if not record:
        return []
    ours, uniform = (
        "not measured" if record["worse"] is None else "not finite" if record[key] is None else f"{record[key]:.4f}"
        for key in ("divergence", "uniform_divergence")
    )
    facts = [("allocation", f"{record['rule']}: KL divergence {ours}, uniform {uniform}, on held-back text")]
    return facts + ([("", "worse than uniform: consider allocation: uniform, or search")] if record["worse"] else [])


def _removal_facts(report: "Report") -> list[tuple[str, str]]:
    """What is left of a model that lost structures; empty for any other."""
    extent, speed = report.header.get("extent"), report.header.get("speed")
    if not extent or not speed:
        return []
    dense, pruned = extent["dense"], extent["pruned"]
    prefill, token = (
        speed["dense"][key] / max(speed["pruned"][key], 1e-12) for key in ("prefill_seconds", "token_seconds")
    )
    return [
        *(("kept" if not place else "", line) for place, line in enumerate(map(str, report.left))),
        ("parameters", _of(pruned["parameters"], dense["parameters"])),
        ("FLOPs/token", _of(pruned["flops_per_token"], dense["flops_per_token"])),
        ("bytes", _of(pruned["nbytes"], dense["nbytes"])),
        (
            "speed-up",
            f"{prefill:.2f}x in prefill ({speed['dense']['prefill_tokens']} tokens), {token:.2f}x in decode",
        ),
        ("", "of all decoder layers, dense and pruned timed alternately"),
    ]


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _size_facts(size: dict[str, int] | None) -> list[tuple[str, str]]:
    """The size of the checkpoint; empty for a model in memory."""
    if size is None:
        return []
    stored, dense = size["stored_bytes"], size["dense_bytes"]
    ratio = "" if stored == dense else f" (compression ratio {dense / stored:.2f}x: {format_size(dense)} unpacked)"
    return [("checkpoint size", format_size(stored) + ratio)]


def recipes_table(listed: Mapping[str, Sequence[tuple[str, str]]]) -> RenderableType:
    """The bundled recipes of each command, one line each."""
    parts: list[RenderableType] = []
    for command, recipes in listed.items():
        parts += [Text(f"llmprune {command} --recipe", style="bold"), facts(*recipes), Text()]
    return Group(*parts[:-1])


def dry_run_tables(plan: "DryRun") -> list[RenderableType]:
    """The plan of a run, and the time, memory and disk space that it needs."""
    head = facts(
        ("model", plan.model),
        ("device", f"{plan.device}, computing in {plan.compute_dtype}"),
        ("tokens", f"{plan.tokens:,} for calibration, including held-back (validation) sequences"),
        *([("sparsity", f"{plan.sparsity:.2%} in the pruned matrices")] if plan.sparsity else []),
        ("disk", _disk(plan)),
    )
    notes = [Text(note) for note in plan.notes]
    removal = [_removal_table(plan)] if plan.structures else []
    return [head, *removal, _plan_table(plan), _work_table(plan), _memory_table(plan), *notes]


def _evaluation_facts(report: "Report") -> list[tuple[str, str]]:
    evaluation = report.header["evaluation"]
    if evaluation is None:
        return [("perplexity", "not measured (evaluation: null)")]
    assert report.dense_perplexity is not None
    assert report.pruned_perplexity is not None
    dense, kl = evaluation["dense"], evaluation["kl_divergence"]
    text = text_name(dense["text"])
    return [
        ("perplexity", format_change(report.dense_perplexity, report.pruned_perplexity)),
        *_standard_errors(evaluation),
        ("", f"on {dense['predicted_tokens']:,} tokens of {text}, in sequences of {dense['length']}"),
        *([("", opening.removeprefix(", "))] if (opening := opened(dense["text"])) else []),
        ("KL divergence", "not finite" if kl is None else f"{kl:.4f} nats/token"),
        ("top-1 agreement", f"{evaluation['agreement']:.1%}"),
        *map(_source_fact, evaluation.get("sources", ())),
    ]


def _source_fact(part: dict[str, Any]) -> tuple[str, str]:
    """The figures on one text of a mix."""
    # JSON has no infinity.
    perplexities = (math.inf if part[which]["perplexity"] is None else part[which]["perplexity"] for which in _MODELS)
    change, name = format_change(*perplexities), text_name(part["dense"]["text"])
    return "perplexity by source", f"{change}, KL {divergence(part['kl_divergence'])}, on {name}"


def _standard_errors(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """The standard errors of both perplexities and of the factor between them; empty if unknown."""
    found = [evaluation[which].get("stderr") for which in _MODELS]
    if None in found:
        return []
    dense, pruned = (evaluation[which]["perplexity"] for which in _MODELS)
    factor = factor_stderr(dense, pruned, evaluation.get("change_stderr"))
    return [
        ("", f"standard errors {found[0]:.2g} and {found[1]:.2g}, by sequences"),
        *([("", f"of the factor {factor}: both models read the same text")] if factor else []),
    ]


def _removal_table(plan: "DryRun") -> Table:
    table = new_table("removed", "places", "groups", "kept", "method", left=(0, 4))
    for row in plan.structures:
        kept = "set by budget" if row.kept is None else f"{row.kept:,} ({row.kept / row.groups:.1%})"
        table.add_row(row.kind, f"{row.where} x", f"{row.groups:,}", kept, row.method)
    return table


def _plan_table(plan: "DryRun") -> Table:
    table = new_table("matrix", "shape", "pattern", "method", "zeros", left=(0, 2, 3))
    for layer in plan.layers:
        table.add_row(Text(f"{plan.layers_path}.{spans(layer.indices)}", "bold"))
        for name, (shape, pattern, method), zeros in _merged(layer):
            table.add_row(f"  {name}", f"{shape[0]} x {shape[1]}", pattern, method or "", f"{zeros:,}")
    return table


def _merged(layer: "LayerPlan") -> list[tuple[str, tuple[tuple[int, int], str, str | None], int]]:
    """The matrices of a layer, with identical ones of its experts merged."""
    from llmprune.models.decoder import EXPERT_NUMBER

    rows: dict[Any, list[Any]] = {}
    for matrix in layer.matrices:
        what = matrix.shape, matrix.pattern, matrix.method
        rows.setdefault((EXPERT_NUMBER.sub("*", matrix.name), what), []).append(matrix)
    merged = []
    for (name, what), matrices in rows.items():
        numbers = [int(found[0]) for matrix in matrices if (found := EXPERT_NUMBER.search(matrix.name))]
        merged.append((name.replace("*", spans(numbers)), what, sum(matrix.zeros for matrix in matrices)))
    return merged


def _work_table(plan: "DryRun") -> Table:
    table = new_table("time", "GFLOP", "GFLOP/s here", "seconds", left=(0,))
    work, rates, seconds = plan.work, plan.rates, plan.seconds
    for name, done, rate, duration in (
        ("two forward passes", work.forward, rates.forward, seconds.forward),
        ("Hessians (Gram matrices)", work.gram, rates.gram, seconds.gram),
        ("solver", work.solve, rates.solve, seconds.solve),
        *([("block matching", work.matching, rates.forward, seconds.matching)] if work.matching else []),
    ):
        table.add_row(name, f"{done / 1e9:,.1f}", f"{rate / 1e9:,.0f}", format_seconds(duration))
    around = plan.around
    for name, duration in (
        ("rotation", around.rotation),
        ("choosing zeros by score", around.choosing),
        ("sampling text", around.sampling),
        ("perplexity", around.evaluation),
    ):
        if duration:
            table.add_row(name, "", "", format_seconds(duration))
    table.add_row(
        Text("total", "bold"), f"{work.total / 1e9:,.1f}", "", Text(format_seconds(plan.total_seconds), "bold")
    )
    return table


def _memory_table(plan: "DryRun") -> Table:
    memory, layer = plan.memory, plan.memory.layer
    table = new_table("memory", "size", left=(0,))
    for name, nbytes in (
        ("embeddings, final norm, LM head", memory.ends),
        ("hidden states", memory.hidden_states),
        ("masks and rotary embeddings", memory.calls),
        ("weights of one layer", layer.weights),
        ("statistics", layer.statistics),
        ("held-back (validation) rows", layer.held_back),
        ("forward pass", layer.forward),
        ("solver", layer.solving),
        *([("block matching", layer.matching)] if layer.matching else []),
        *([("rotation, before all that", memory.rotation)] if memory.rotation else []),
        *([("standing for removed layers", layer.replacing)] if layer.replacing else []),
    ):
        table.add_row(name, format_size(nbytes))
    table.add_row(Text("predicted peak", "bold"), Text(format_size(memory.peak), "bold"))
    return table


def _disk(plan: "DryRun") -> str:
    spilled = (
        f", and {format_size(plan.spilled_bytes)} for hidden states in the temporary folder"
        if plan.spilled_bytes
        else ""
    )
    return f"{format_size(plan.disk_bytes)} for the pruned checkpoint{spilled}"
