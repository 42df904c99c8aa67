"""report.html: the report of one run as a page."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmprune.pages.allocated import allocation_parts
from llmprune.pages.beside import Beside, has_weights, read_beside, stored_bytes
from llmprune.pages.charts import Axis, Series, level, lines, shares
from llmprune.pages.evidence import evidence_parts
from llmprune.pages.fitted import fitting_facts, match_parts
from llmprune.pages.headline import headline
from llmprune.pages.labels import (
    divergence,
    massive_line,
    measured_text,
    perplexity,
    repeating_command,
    short_run,
    text_line,
    text_name,
    with_error,
)
from llmprune.pages.layers import LAYER, layer_parts, number, structure_parts
from llmprune.pages.measured import evaluation_parts, speed_parts
from llmprune.pages.page import Chart, Facts, Lead, Listing, Note, Part, Section, Table, Tiles, render
from llmprune.pages.recovered import recovery_parts
from llmprune.pages.trained import training_parts
from llmprune.storage.files import require_writable, write_text
from llmprune.storage.report import PAGE_NAME, Report, load_report
from llmprune.units import factor_stderr, format_seconds, format_size, quantity

_MEGA = 1e6
# Time that belongs to no stage: inspecting the model, planning, small steps in between.
_OTHER = "other"
# What entries of the host are called, where that differs.
_HOST = {"memory_bytes": "memory", "gpu": "GPU", "cpu": "CPU", "cuda": "CUDA"}
# What the baseline of the measured memory is.
_BASELINE = (
    "(on a CPU what the process with Python, torch and transformers had for itself, on a GPU what torch had "
    "allocated). On a CPU, libraries add some MB that the formula does not predict."
)


def write_report(folder: Path) -> Path:
    """Write report.html into an output folder, from its report.json and later measurements.

    The folder's evaluation*.json (lm-eval) and bench*.json (`llmprune bench`) are shown as well.

    Args:
        folder: the output folder of a finished run.

    Returns:
        The path of the page; an older one is replaced atomically.

    Raises:
        CheckpointError: report.json is missing or damaged.
    """
    folder = Path(folder)
    report = load_report(folder)
    require_writable(folder / PAGE_NAME)
    stored = stored_bytes(folder) if has_weights(folder) else None
    write_text(folder / PAGE_NAME, report_page(report, read_beside(folder), stored))
    return folder / PAGE_NAME


def report_page(report: Report, beside: Beside, stored_bytes: int | None = None) -> str:
    """The page of one run as HTML.

    Args:
        report: the run's report.
        beside: later measurements.
        stored_bytes: size of the weights; None to take it from the report.
    """
    header = report.header
    name = Path(str(header.get("model", "model"))).name
    evidence = dict((header.get("decisions") or {}).get("evidence") or {})
    evidence.pop("allocation", None)  # has a section of its own
    sections = (
        Section("summary", "Summary", _summary(report, stored_bytes)),
        Section("recovery", "Recovery", recovery_parts(header.get("recovery"))),
        Section("training", "Training", training_parts(header.get("training"))),
        Section("allocation", "Allocation", allocation_parts(header.get("allocation"))),
        Section("layers", "Layers", [*layer_parts(report), *match_parts(report)]),
        Section("structures", "Structures", [*_extent(header), *structure_parts(report)]),
        Section("decisions", "Why these were removed", evidence_parts(evidence)),
        Section("text", "Calibration text", _samples(header)),
        Section("answers", "Answers of both models", [*_generation(header), *_answers(header)]),
        Section("evaluation", "Evaluation", evaluation_parts(beside)),
        Section("speed", "Speed", speed_parts(header, beside)),
        Section("resources", "Time and memory", [*_time(header), *_memory(report)]),
        Section("protocol", "Reproducibility", _protocol(header)),
    )
    recipe = (header.get("training") or header).get("recipe") or {}
    subtitle = " · ".join(filter(None, (short_run(header), str(recipe.get("description") or ""))))
    return render(f"{name}, {'recovered' if header.get('recovery') else 'pruned'}", subtitle, sections)


def _summary(report: Report, stored_bytes: int | None) -> list[Part]:
    header = report.header
    climbed = sum(len(row.damping_tried) > 1 for row in report.rows)
    priors = sum(row.prior_tokens > 0 for row in report.rows)
    facts = [*_models(header), ("finished", str(header.get("finished", "")))]
    facts += [("device", str(header.get("device", "")))]
    if measured := measured_text(header):
        facts.append(("perplexity on", text_line(measured)))
    if (evaluation := header.get("evaluation")) and evaluation["pruned"].get("nats_stderr") is not None:
        paired = "; of the factor, paired: both models read the same" if evaluation.get("change_stderr") else ""
        facts.append(("± of perplexity", f"one standard error, taking sequences as independent draws{paired}"))
    facts += [("note", note) for note in report.notes]
    facts += fitting_facts(report)
    if climbed:
        facts.append(("dampening increased", f"for {_matrices(climbed)} whose factorisation failed at first"))
    if massive := report.massive:
        facts.append(("massive activations", massive_line(massive)))
    if priors:
        facts.append(("too few tokens", f"for {_matrices(priors)} of experts"))
    if dropped := header.get("draft_head"):
        facts.append(("draft head", str(dropped)))
    tiles = Tiles(tuple(_tiles(report, stored_bytes)))
    return [Lead(headline(report)), tiles, Facts(tuple(facts)), *_sources(evaluation or {})]


def _matrices(count: int) -> str:
    return quantity(count, "matrix", "matrices")


def _models(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was pruned, or what was trained further and beside which dense model."""
    model = str(header.get("model", ""))
    if (recovery := header.get("recovery")) is None:
        return [("base model", model)]
    return [("pruned model", model), *([("dense model", recovery["teacher"])] if recovery.get("teacher") else [])]


def _sources(evaluation: Mapping[str, Any]) -> list[Part]:
    """The figures on each text of a mix."""
    rows = [
        (
            text_name(part["dense"]["text"]),
            f"{part['dense']['predicted_tokens']:,}",
            *(
                with_error(math.inf if (value := part[which]["perplexity"]) is None else value, part[which]["stderr"])
                for which in ("dense", "pruned")
            ),
            divergence(part["kl_divergence"]),
            f"{part['agreement']:.1%}",
        )
        for part in evaluation.get("sources", ())
    ]
    names = ("text", "tokens", "dense perplexity", "perplexity", "KL divergence", "top-1 agreement")
    return [Table(names, tuple(rows), caption="Perplexity by source")] if rows else []


def _tiles(report: Report, stored_bytes: int | None) -> list[tuple[str, str, str]]:
    header = report.header
    tiles = _quality(report)
    if report.rows:
        overall = report.overall_sparsity
        among = "" if overall is None else f"; {overall:.1%} of all weights"
        tiles.append(("sparsity", f"{report.sparsity:.1%}", f"in {_matrices(len(report.rows))}{among}"))
    if extent := header.get("extent"):
        part = extent["pruned"]["parameters"] / extent["dense"]["parameters"]
        tiles.append(("parameters", f"{part:.1%}", f"{extent['pruned']['parameters']:,}"))
    tiles += [(left.kind, left.amount, left.where) for left in report.left]
    if report.mean_error is not None:
        tiles.append(("relative output error", f"{report.mean_error:.4g}", "mean of all matrices"))
    size = header.get("size")
    stored = stored_bytes if stored_bytes is not None else size and size["stored_bytes"]
    if stored:
        dense = extent["dense"]["nbytes"] if extent else size and size["dense_bytes"]
        tiles.append(("checkpoint size", format_size(stored), _ratio(stored, dense) if dense else ""))
    if seconds := header.get("seconds"):
        tiles.append(("time", f"{format_seconds(seconds['total'])} s", ""))
    return tiles


def _quality(report: Report) -> list[tuple[str, str, str]]:
    evaluation = report.header.get("evaluation")
    if not evaluation:
        name, change = report.change
        return [(name or "perplexity", change or "not measured", "")]
    dense, pruned = report.dense_perplexity, report.pruned_perplexity
    assert dense is not None
    assert pruned is not None
    error = factor_stderr(dense, pruned, evaluation.get("change_stderr"))
    known = f" ± {error}" if error else ""
    factor = f" (x{pruned / dense:.2f}{known})" if math.isfinite(dense) and math.isfinite(pruned) else ""
    shown = [
        with_error(value, evaluation[which].get("stderr")) for which, value in (("dense", dense), ("pruned", pruned))
    ]
    before = ((report.header.get("recovery") or {}).get("perplexity") or {}).get("pruned")
    unrecovered = "" if before is None else f"before recovery {perplexity(before)}, "
    tiles = [
        ("perplexity", shown[1], f"{unrecovered}dense {shown[0]}{factor}"),
        ("KL divergence", divergence(evaluation["kl_divergence"]), "nats/token"),
        ("top-1 agreement", f"{evaluation['agreement']:.1%}", "with the dense model"),
    ]
    errors = [evaluation[which].get("calibration_error") for which in ("pruned", "dense")]
    if None not in errors:
        tiles.append(("ECE (expected calibration error)", f"{errors[0]:.4f}", f"dense {errors[1]:.4f}"))
    return tiles


def _ratio(stored: float, dense: float) -> str:
    """The compression ratio in words."""
    ratio = dense / stored
    said = "as large as dense" if round(ratio, 2) == 1 else f"compression ratio {ratio:.2f}x"
    return f"dense {format_size(dense)}; {said}"


def _extent(header: Mapping[str, Any]) -> list[Part]:
    if not (extent := header.get("extent")):
        return []
    names = {
        "layers": "decoder layers",
        "hidden_size": "hidden channels",
        "parameters": "parameters",
        "flops_per_token": "FLOPs/token",
    }
    dense, pruned = extent["dense"], extent["pruned"]
    rows = [
        (name, f"{dense[key]:,}", f"{pruned[key]:,}", _part(pruned[key], dense[key])) for key, name in names.items()
    ]
    sizes = format_size(dense["nbytes"]), format_size(pruned["nbytes"])
    rows.append(("checkpoint size", *sizes, _part(pruned["nbytes"], dense["nbytes"])))
    return [Table(("", "dense", "pruned", "kept"), tuple(rows), caption="The model")]


def _samples(header: Mapping[str, Any]) -> list[Part]:
    """The beginnings of some self-generated sequences."""
    text = (header.get("texts") or {}).get("calibration") or {}
    excerpts = [excerpt for part in text.get("mix", [text]) for excerpt in part.get("excerpts") or ()]
    return [Listing(f"Sequence {place}", str(excerpt)) for place, excerpt in enumerate(excerpts, start=1)]


def _generation(header: Mapping[str, Any]) -> list[Part]:
    """How much of what the dense model writes the pruned one writes, too, if that was measured."""
    if not (found := header.get("generation")):
        return []
    if found["skipped"]:
        return [Note(f"Continuations left out: {found['skipped']}.")]
    return [
        Note(
            f"{found['prompts']} openings of {found['opening']} held-out tokens, continued greedily by "
            f"{found['tokens']} tokens: {found['agreement']:.1%} agree before the first difference, and "
            f"{found['identical']} continuations are identical."
        )
    ]


def _answers(header: Mapping[str, Any]) -> list[Part]:
    """The same prompts, answered by both models."""
    if not (answers := header.get("answers")):
        return []
    if answers["skipped"]:
        return [Note(f"Left out: {answers['skipped']}.")]
    rows = tuple(zip(answers["prompts"], answers["dense"], answers["pruned"], strict=True))
    note = "Greedy decoding, a few tokens each: an impression, no measurement."
    return [Note(note), Table(("prompt", "dense", "pruned"), rows, text=(0, 1, 2))]


def _part(part: float, whole: float) -> str:
    return f"{part / max(whole, 1):.1%}"


def _time(header: Mapping[str, Any]) -> list[Part]:
    stages = dict(header.get("seconds") or {})
    total = stages.pop("total", 0.0)
    if not stages:
        return []
    other = total - math.fsum(stages.values())
    stages |= {_OTHER: other} if other > 0 else {}
    hover = [f"{name}: {format_seconds(value)} s" for name, value in stages.items()]
    figure = shares(Series("seconds", list(stages), list(stages.values()), hover), Axis("seconds"))
    table = Table(("stage", "seconds"), tuple((name, f"{value:,.2f}") for name, value in stages.items()))
    note = f"{format_seconds(math.fsum(stages.values()))} s in total; nested stages are counted once."
    return [Chart("chart-time", "Time by stage", figure, table, note)]


def _memory(report: Report) -> list[Part]:
    memory = report.header.get("memory")
    if not memory:
        return []
    sizes = {"predicted": memory["predicted_bytes"], "measured": memory["measured_bytes"]}
    hover = [f"{name}: {format_size(value)}" for name, value in sizes.items()]
    bars = shares(Series("peak", list(sizes), [value / _MEGA for value in sizes.values()], hover, 1), Axis("MB"))
    table = Table(("peak", "MB"), tuple((name, f"{value / _MEGA:,.1f}") for name, value in sizes.items()))
    note = f"Above a baseline of {format_size(memory['baseline_bytes'])} {_BASELINE}"
    if resident := memory.get("resident_bytes"):
        note += f" The process was resident with {format_size(resident)} at most, with the pages of files."
    parts: list[Part] = [Chart("chart-memory", "Peak memory, predicted and measured", bars, table, note)]
    seen = [(row.layer, row.peak_bytes) for row in report.structures if row.peak_bytes]
    seen += [(row.layer, row.peak_bytes) for row in report.rows if row.peak_bytes]
    peaks = dict(sorted((number(layer), max(peak - memory["baseline_bytes"], 0) / _MEGA) for layer, peak in seen))
    if len(peaks) > 1:
        said = [f"up to layer {layer}: {value:,.1f} MB" for layer, value in peaks.items()]
        figure = lines(
            [
                Series("measured so far", list(peaks), list(peaks.values()), said, 1),
                level("predicted peak", list(peaks), sizes["predicted"] / _MEGA),
            ],
            LAYER,
            Axis("MB", zero=True),
        )
        rows = Table(("layer", "MB"), tuple((str(layer), f"{value:,.1f}") for layer, value in peaks.items()))
        parts.append(Chart("chart-peaks", "Peak memory after each layer", figure, rows))
    return parts


def _host_fact(name: str, value: object) -> str:
    return format_size(value) if name == "memory_bytes" and isinstance(value, int) else str(value)


def _protocol(header: Mapping[str, Any]) -> list[Part]:
    command = repeating_command(header) if header.get("model") else ""
    facts = [("command", command)] if command else []
    facts += [(_HOST.get(name, name), _host_fact(name, value)) for name, value in (header.get("host") or {}).items()]
    facts += [(name, str(version)) for name, version in (header.get("version") or {}).items()]
    for name, digest in (header.get("tokens") or {}).items():
        facts.append((f"{name} tokens", f"sha256 {digest}"))
    recovery = header.get("recovery") or {}
    if "source" in header:
        facts.append((f"{'pruned' if recovery else 'dense'} checkpoint", f"sha256 {header['source']}"))
    if dense := recovery.get("dense"):
        facts.append(("dense checkpoint", f"sha256 {dense['source']}"))
    parts: list[Part] = [Facts(tuple(facts))] if facts else []
    if recipe := header.get("recipe"):
        parts.append(Listing("Recipe", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)))
    return parts
