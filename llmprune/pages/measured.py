"""Measurements of the whole model: scores against the dense model's, and speed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.measuring.bench.record import grouped, tokens_a_second
from llmprune.pages.beside import Beside, Evaluation, Score
from llmprune.pages.charts import PALETTE, Axis, Series, bars, level, lines
from llmprune.pages.page import Chart, Note, Part, Table

# A difference is significant above this many standard errors.
_STANDARD_ERRORS = 2.0

_RESIDENT = (
    "Weights in memory: the model's tensors alone. Peak memory: these and the most that a run allocated on top, "
    "without Python and its libraries."
)

# A value and its standard error.
_Measured = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of one task, dense and pruned; None where unknown."""

    task: str
    metric: str
    dense: float | None
    dense_error: float | None
    pruned: float | None
    pruned_error: float | None
    delta: float | None
    delta_error: float | None
    verdict: str


def evaluation_parts(beside: Beside) -> list[Part]:
    """Scores of lm-eval: a table of all, and a chart of those that are fractions."""
    found = list(_score_lines(beside))
    if not found:
        return [Note(note) for note in beside.notes if note.startswith("evaluation")]
    fractions = [one for one in found if one.pruned is not None and 0 <= one.pruned <= 1 and (one.dense or 0) <= 1]
    parts: list[Part] = [
        Note(
            "lm-eval results; standard errors are paired by document where llmprune eval compared both models. A "
            f"difference is called significant above {_STANDARD_ERRORS:.0f} standard errors; for perplexities, of the "
            "log-perplexity."
        ),
        _score_table(found),
    ]
    if fractions:
        figure = bars(
            [
                _score_bars("dense", fractions, lambda one: (one.dense, one.dense_error), len(PALETTE) - 1),
                _score_bars("pruned", fractions, lambda one: (one.pruned, one.pruned_error), 0),
            ],
            Axis("", names=True),
            Axis("score", percent=True, zero=True),
        )
        parts.append(
            Chart("chart-tasks", "Tasks", figure, _score_table(fractions), "Error bars show one standard error.")
        )
    return [*parts, *(Note(note) for note in beside.notes if note.startswith("evaluation"))]


def speed_parts(header: Mapping[str, Any], beside: Beside) -> list[Part]:
    """The speed of the decoder layers from the run, and the results of `llmprune bench` on each device."""
    parts: list[Part] = []
    if speed := header.get("speed"):
        parts.append(_layers_table(speed, header.get("device", "")))
    for place, (device, result) in enumerate(beside.benches.items()):
        parts += _bench_parts(device, result, place)
    return [*parts, *(Note(note) for note in beside.notes if note.startswith("bench"))]


def _score_lines(beside: Beside) -> Iterable[Line]:
    """Comparisons as written by `llmprune eval`, then scores that only lm-eval's own files have."""
    seen = set()
    for row in beside.compared:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        seen.add((row["task"], metric))
        dense_side = row["dense_value"], row["dense_stderr"]
        yield Line(
            row["task"],
            metric,
            *dense_side,
            row["value"],
            row["stderr"],
            row["delta"],
            row["delta_stderr"],
            row["verdict"],
        )
    dense: dict[tuple[str, str], Score] = {}
    for evaluation in beside.dense:
        dense |= _flat(evaluation)
    for evaluation in beside.evaluations:
        for (task, metric), score in _flat(evaluation).items():
            if (task.split(" (")[0], metric) not in seen:
                yield _joined(task, metric, score, dense.get((task, metric)))


def _flat(evaluation: Evaluation) -> dict[tuple[str, str], Score]:
    return {(task, metric): score for task, own in evaluation.tasks.items() for metric, score in own.items()}


def _joined(task: str, metric: str, score: Score, dense: Score | None) -> Line:
    """A score against the dense model's, treating their errors as independent."""
    if dense is None:
        return Line(task, metric, None, None, score.value, score.deviation, None, None, "")
    delta = score.value - dense.value
    error = None
    verdict = ""
    if score.deviation is not None and dense.deviation is not None:
        error = math.hypot(score.deviation, dense.deviation)
        better = score.higher_is_better
        if abs(delta) <= _STANDARD_ERRORS * error:
            verdict = "within error"
        else:
            verdict = "differs" if better is None else "better" if (delta > 0) == better else "worse"
    return Line(task, metric, dense.value, dense.deviation, score.value, score.deviation, delta, error, verdict)


def _score_table(found: Sequence[Line]) -> Table:
    rows = tuple(
        (
            one.task,
            one.metric,
            _with_error(one.dense, one.dense_error),
            _with_error(one.pruned, one.pruned_error),
            _with_error(one.delta, one.delta_error, signed=True),
            one.verdict,
        )
        for one in found
    )
    return Table(("task", "metric", "dense", "pruned", "difference", ""), rows, text=(0, 1, 5))


def _score_bars(name: str, found: Sequence[Line], side: Callable[[Line], _Measured], colour: int) -> Series:
    labels = [f"{one.task}: {one.metric}" for one in found]
    values = [side(one) for one in found]
    hover = [f"{label}\n{name} {_with_error(*value)}" for label, value in zip(labels, values, strict=True)]
    return Series(name, labels, [v for v, _ in values], hover, colour, deviation=[error for _, error in values])


def _with_error(value: float | None, error: float | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    # Enough decimals for two digits of the error, or four digits of the value.
    digits, scale = (2, error) if error and math.isfinite(error) else (4, abs(value))
    places = digits - 1 - math.floor(math.log10(scale)) if scale and math.isfinite(scale) else 0
    form = f",.{min(max(places, 0), 6)}f"
    return f"{value:{'+' if signed else ''}{form}}" + ("" if error is None else f" ± {error:{form}}")


def _layers_table(speed: Mapping[str, Mapping[str, Any]], device: str) -> Table:
    dense, pruned = speed["dense"], speed["pruned"]
    names = {
        "prefill_seconds": f"prefill, {dense['prefill_tokens']:,} tokens",
        "token_seconds": "decode, one token",
    }
    rows = tuple(
        (name, f"{1e3 * dense[key]:,.2f}", f"{1e3 * pruned[key]:,.2f}", f"{dense[key] / max(pruned[key], 1e-12):.2f}")
        for key, name in names.items()
    )
    caption = f"All decoder layers, without embeddings and LM head, on {device}"
    return Table(("", "dense ms", "pruned ms", "speed-up"), rows, caption=caption)


def _bench_parts(device: str, result: Mapping[str, Any], place: int) -> list[Part]:
    measured = [product for product in result["products"] if product["comparisons"]]
    parts: list[Part] = [_whole_model(device, result["whole_model"]), Note(_RESIDENT)]
    if measured:
        table = _products_table(measured)
        parts.append(
            Chart(
                f"chart-bench-{place}",
                f"Sparse matmuls against dense ones, {device}",
                _products_figure(measured),
                table,
                "Speed-up over the dense matmul of the same shape; below 1 is slower. "
                f"Measured {result['finished']}. Shares are of the roofline set by one large copy and one large "
                "matmul; what fits in a cache can exceed 100%.",
            )
        )
    unmeasured: dict[str, list[str]] = {}
    for product in result["products"]:
        if not product["comparisons"]:
            unmeasured.setdefault(product["reason"], []).append(_product(product))
    parts += [Note(f"No sparse kernel to measure ({why}): {'; '.join(names)}") for why, names in unmeasured.items()]
    return parts


def _whole_model(device: str, model: Mapping[str, Any]) -> Table:
    dense = model.get("dense")
    rows = []
    for place, row in enumerate(model["batches"]):
        rows.append(_model_row("pruned", row, model, dense["batches"][place] if dense else None))
        if dense:
            rows.append(_model_row("dense", dense["batches"][place], dense, None))
    columns = ("", "batch", "TTFT ms", "tokens/s", "decode speed-up", "weights in memory MB", "peak memory MB")
    return Table(columns, tuple(rows), caption=f"The whole model on {device}")


def _model_row(name: str, row: Mapping[str, Any], model: Mapping[str, Any], dense: Any) -> tuple[str, ...]:
    ratio = f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}" if dense else ""
    return (
        name,
        str(row["batch"]),
        f"{row['first_token']['median_us'] / 1e3:,.1f}",
        tokens_a_second(row),
        ratio,
        f"{model['resident_bytes'] / 1e6:,.1f}",
        f"{model['peak_bytes'] / 1e6:,.1f}",
    )


def _products_figure(products: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    series = []
    for place, product in enumerate(products):
        rows = [row for row in product["comparisons"] if row["correct"]]
        series.append(
            Series(
                _product(product),
                [row["tokens"] for row in rows],
                [row["ratio"] for row in rows],
                [
                    f"{_product(product)}\n{row['tokens']:,} tokens: {row['ratio']:.2f}x speed-up\n"
                    f"{row['share']} of the roofline"
                    for row in ({**row, "share": f"{row['sparse']['share']:.0%}"} for row in rows)
                ],
                place % len(PALETTE),
            )
        )
    tokens = sorted({row["tokens"] for product in products for row in product["comparisons"]})
    return lines([*series, level("dense", tokens, 1.0)], Axis("tokens", log="always"), Axis("speed-up", zero=True))


def _products_table(products: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for product in products:
        for row in product["comparisons"]:
            start = (_product(product), product["served"], f"{row['tokens']:,}")
            error = f"{float(row['error']):.1e}"
            if not row["correct"]:
                rows.append((*start, "", "", "", error, "wrong, not timed"))
                continue
            times = (f"{row[name]['median_us']:,.1f}" for name in ("dense", "sparse"))
            verdict = "slower" if row["ratio"] < 1 else ""
            rows.append((*start, *times, f"{row['ratio']:.2f}", error, verdict))
    columns = ("matmul", "kernel", "tokens", "dense µs", "sparse µs", "speed-up", "error", "")
    return Table(columns, tuple(rows), text=(0, 1, 7))


def _product(product: Mapping[str, Any]) -> str:
    names = grouped([name for names in product["names"] for name in names])
    return f"{names} {' x '.join(map(str, product['shape']))}"
