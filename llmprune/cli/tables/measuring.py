"""What `llmprune explain` and `llmprune bench` show: tables that fit 80 columns and show slower cases too."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from llmprune.cli.console import facts, new_table
from llmprune.cli.tables.folding import by_layer
from llmprune.measuring.bench.record import grouped, tokens_a_second
from llmprune.pages.labels import opened
from llmprune.units import factor_stderr, format_change, format_seconds, format_size, quantity, spans

if TYPE_CHECKING:
    from llmprune.measuring.explain import DenseRow, Explanation, PackedRow
    from llmprune.measuring.perplexity import Perplexity, PerplexityComparison

_UNMEASURED = "not yet: run `llmprune bench` on the folder"


def perplexity_table(result: "Perplexity", run: dict[str, Any]) -> RenderableType:
    """A perplexity and how it was measured."""
    return facts(
        ("model", run["model"]),
        ("perplexity", f"{result.perplexity:.4f}{_plus_minus(result)}"),
        ("loss", f"{result.nats:.5f} nats/token"),
        *_protocol(result, run),
    )


def comparison_table(result: "PerplexityComparison", run: dict[str, Any]) -> RenderableType:
    """A model against its dense base, and how both were measured."""
    dense, pruned = result.dense, result.pruned
    factor = factor_stderr(dense.perplexity, pruned.perplexity, result.change_stderr)
    return facts(
        ("model", run["model"]),
        ("against", run["against"]),
        ("perplexity", format_change(dense.perplexity, pruned.perplexity)),
        *([("", f"dense{_plus_minus(dense)}, pruned{_plus_minus(pruned)}")] if _plus_minus(pruned) else []),
        *([("", f"factor ± {factor} (standard error, paired: both models read the same text)")] if factor else []),
        ("KL divergence", f"{result.kl_divergence:.5f} nats/token"),
        ("top-1 agreement", f"{result.agreement:.2%}"),
        *_protocol(pruned, run),
    )


def _plus_minus(result: "Perplexity") -> str:
    return f" ± {result.stderr:.2g} (standard error)" if result.stderr is not None else ""


def _protocol(result: "Perplexity", run: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("text", str(result.text["source"])),
        ("protocol", f"{quantity(result.samples, 'sequence')} of {result.length} tokens{opened(result.text)}"),
        ("", f"{result.predicted_tokens:,} tokens predicted"),
        ("tokens", f"sha256 {result.tokens_digest}"),
        ("computed", f"in {result.compute_dtype} on {run['device']}, {format_seconds(run['seconds'])} s"),
    ]


def explain_tables(explanation: "Explanation") -> list[RenderableType]:
    """The kernel of each matrix, why none is faster, and the best possible speed-up of the whole model."""
    parts: list[RenderableType] = []
    notes: list[str] = []
    if explanation.packed:
        parts.append(_packed_table(explanation.packed, notes))
    if explanation.dense:
        parts.append(_dense_table(explanation.dense, notes))
    if explanation.packed:
        parts.append(
            Text("max: best possible speed-up in decode, by bytes read; measured: speed-up at this many tokens")
        )
    parts += [Text(f"[{number}] {note}") for number, note in enumerate(notes, 1)]
    dense, served = explanation.token_bytes
    parts.append(
        facts(
            ("device", explanation.device),
            ("weights read", f"{format_size(served)} per token, {format_size(dense)} if all were dense"),
            ("max speed-up", f"{explanation.limit:.2f}x in decode, including the matrices that stay dense"),
            ("measured", explanation.measured or _UNMEASURED),
            *_in_vllm(explanation),
        )
    )
    return parts


def _in_vllm(explanation: "Explanation") -> list[tuple[str, str]]:
    """How the plug-in for vLLM serves the matrices, or why it does not."""
    counts = Counter(row.vllm for row in explanation.packed)
    served = ", ".join(f"{count} {form}" for form, count in counts.items())
    if explanation.uneven:
        served = "refused: decoder layers differ in size, and vLLM builds all alike"
    return [("in vLLM", served)] if served else []


def bench_tables(result: dict[str, Any]) -> list[RenderableType]:
    """The matmuls and the whole model, including what was slower."""
    parts: list[RenderableType] = []
    unmeasured: dict[str, list[RenderableType]] = {}
    for product in result["products"]:
        if product["measured"] is None:
            unmeasured.setdefault(product["reason"], []).append(_product_title(product))
        else:
            parts += [_product_title(product), _product_table(product)]
    for reason, titles in unmeasured.items():
        parts += [*titles, Text(f"  no sparse kernel to measure: {reason}")]
    if any(product["comparisons"] for product in result["products"]):
        parts.append(Text(ratio_note(result["rates"])))
    name = Path(result["model"]).name
    parts.append(_whole_model_table(name, result["whole_model"]))
    if not result["whole_model"].get("in_turn", True):
        parts.append(Text("Both models did not fit at once, so they were timed one after the other, not alternately."))
    if lengths := {row["prompt_tokens"] for row in result["whole_model"]["batches"]}:
        prompts = f"prompts of {spans(sorted(lengths))} tokens"
        parts.append(Text(f"TTFT: time to first token, for {prompts}; in brackets: speed-up over dense\n"))
    parts.append(_extent_table(name, result["whole_model"]))
    if result["tuned"]:
        parts.append(_tuned_table(result["tuned"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(facts(("device", result["device"]), ("versions", versions), ("commit", result["commit"] or "unknown")))
    return parts


def ratio_note(rates: Mapping[str, float]) -> str:
    """What the columns of matmuls mean, with the measured rates in bytes and operations per second."""
    copy, matmul = (rates[f"{name}_per_second"] for name in ("copy", "matmul"))
    multiplied = f"{matmul / 1e12:,.2f} TFLOP/s" if matmul >= 1e12 else f"{matmul / 1e9:.3g} GFLOP/s"
    copied = f"{copy / 1e12:,.2f} TB/s" if copy >= 1e12 else f"{copy / 1e9:.3g} GB/s"
    return (
        "speed-up: over the dense matmul; share: of the roofline, which is what the measured rates allow "
        f"({copied} copied or {multiplied} multiplied, whichever takes longer). The rates come from one large copy and "
        "one large matmul, so what fits in a cache can exceed 100%"
    )


def _packed_table(rows: Sequence["PackedRow"], notes: list[str]) -> RenderableType:
    shown = new_table("packed", "shape", "layout", "kernel", "bytes", "max", "measured", left=(0, 2, 3))
    for layer, inside in by_layer(
        rows, lambda row: (row.layout["shape"], _layout(row), row.form, row.reason, row.gains, row.vllm)
    ):
        shown.add_row(Text(layer, "bold"))
        for name, row, _ in inside:
            # Decode and the longest prefill; those in between are in the JSON.
            ends = dict.fromkeys((*row.gains[:1], *row.gains[-1:]))
            gain = "\n".join(f"{ratio:.2f} at {tokens}" for tokens, ratio in ends)
            if row.form == "dense":
                # Measured, but not used here.
                gain = f"({gain})" if gain else "none"
            form = row.form + (f" [{_note(notes, row.reason)}]" if row.reason else "")
            if row.vllm != row.form:
                form += f"\nvLLM: {row.vllm}"
            shape = "x".join(map(str, row.layout["shape"]))
            share = f"{row.packed_bytes / max(row.dense_bytes, 1):.1%}"
            shown.add_row(f"  {name}", shape, _layout(row), form, share, f"{row.limit:.2f}", gain or "?")
    return shown


def _dense_table(rows: Sequence["DenseRow"], notes: list[str]) -> RenderableType:
    shown = new_table("not packed", "shape", "size", "why", left=(0, 3))
    for layer, inside in by_layer(rows, lambda row: (row.shape, row.reason)):
        if layer:
            shown.add_row(Text(layer, "bold"))
        for name, row, count in inside:
            shape, note = " x ".join(map(str, row.shape)), f"[{_note(notes, row.reason)}]"
            shown.add_row(f"  {name}" if layer else name, shape, format_size(row.bytes * count), note)
    return shown


def _layout(row: "PackedRow") -> str:
    layout = row.layout
    if layout["layout"] == "nm":
        return f"{layout['keep']}:{layout['of']}"
    if layout["layout"] == "block":
        stored = layout["blocks"] * layout["block"] ** 2 / max(layout["shape"][0] * layout["shape"][1], 1)
        return f"{1 - stored:.2g}@{layout['block']}x{layout['block']}"
    return str(layout["layout"])


def _note(notes: list[str], text: str) -> int:
    """The number of a footnote, which is added if it is new."""
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def _product_title(product: dict[str, Any]) -> Text:
    names = grouped([name for names in product["names"] for name in names])
    rows, columns = product["shape"]
    return Text(f"{names}  {rows} x {columns}, kernel: {product['served']}", "bold")


def _product_table(product: dict[str, Any]) -> RenderableType:
    shown = new_table("tokens", "dense us", "sparse us", "speed-up", "share", "error", "", left=(6,))
    for row in product["comparisons"]:
        error = f"{float(row['error']):.1e}"
        if not row["correct"]:
            shown.add_row(str(row["tokens"]), "", "", "", "", error, Text("WRONG, not timed", "bold red"))
            continue
        dense, sparse = (_spread(row[name]) for name in ("dense", "sparse"))
        share = f"{row['sparse']['share']:.0%}"
        shown.add_row(str(row["tokens"]), dense, sparse, f"{row['ratio']:.2f}", share, error, _verdict(row, product))
    return shown


def _verdict(row: dict[str, Any], product: dict[str, Any]) -> Text:
    if row["ratio"] >= 1:
        unused = product["served"] == "dense"
        return Text("faster, unused" if unused else "", "yellow")
    if product["served"] == "dense":
        return Text("slower, unused", "yellow")
    return Text("SLOWER", "bold red")


def _spread(timing: dict[str, Any]) -> str:
    """The median, ± half the distance between the 10th and the 90th percentile."""
    return f"{timing['median_us']:,.1f} ±{(timing['high_us'] - timing['low_us']) / 2:,.1f}"


def _whole_model_table(name: str, model: dict[str, Any]) -> RenderableType:
    shown = new_table("model", "batch", "TTFT", "tokens/s", "weights in\nmemory", "peak\nmemory", left=(0,))
    dense: dict[str, Any] | None = model.get("dense")
    for index, row in enumerate(model["batches"]):
        if dense is None:
            shown.add_row(*_model_row(name, row, model))
            continue
        other = dense["batches"][index]
        shown.add_row(*_model_row(name, row, model, other))
        shown.add_row(*_model_row("dense", other, dense))
    return shown


def _extent_table(name: str, model: dict[str, Any]) -> RenderableType:
    shown = new_table("model", "parameters", "nonzero", "FLOPs/token", "checkpoint size", left=(0,))
    for label, one in ((name, model), ("dense", model.get("dense"))):
        if one is not None:
            extent = one["extent"]
            counts = (f"{extent[key]:,}" for key in ("parameters", "nonzeros", "flops_per_token"))
            shown.add_row(label, *counts, format_size(extent["nbytes"]))
    return shown


def _model_row(
    name: str, row: dict[str, Any], model: dict[str, Any], dense: dict[str, Any] | None = None
) -> tuple[str, ...]:
    """The figures of one batch size, with speed-ups over the dense model."""
    first = f"{row['first_token']['median_us'] / 1e3:,.1f} ms"
    speed = tokens_a_second(row)
    if dense is not None:
        first += f" ({dense['first_token']['median_us'] / row['first_token']['median_us']:.2f}x)"
        speed += f" ({row['tokens_per_second'] / dense['tokens_per_second']:.2f}x)"
    return name, str(row["batch"]), first, speed, format_size(model["resident_bytes"]), format_size(model["peak_bytes"])


def _tuned_table(tuned: Sequence[dict[str, Any]]) -> RenderableType:
    shown = new_table("tuned", "shape", "before us", "after us", "configuration", left=(0, 4))
    for row in tuned:
        shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
        choice = " ".join(f"{name}={value}" for name, value in row["choice"].items())
        before, now = ("-" if row[k] is None else f"{1e6 * row[k]:,.1f}" for k in ("before_seconds", "seconds"))
        shown.add_row(row["op"], shape, before, now, choice)
    return shown
