"""Parts with measured figures of recovery and of pruning while training, generated from result files."""

from statistics import mean, stdev

from site_parts import figures
from site_parts.markdown import literal, table


def recovery() -> str:
    """What training on the calibration text alone wins back on the bundled model."""
    columns = {
        "pruned by": "{method}, {pattern}",
        "dense": "{perplexity[dense]:.2f}",
        "pruned": "{perplexity[pruned]:.2f}",
        "recovered": "{perplexity[recovered]:.2f}",
        "gap closed": "{gap_closed:.0%}",
        "zeros before": "{zeros[before]:,}",
        "zeros after": "{zeros[after]:,}",
        "CPU seconds": "{cpu_seconds:,.0f}",
    }
    arguments = "recovery --calibration FILE --heldout FILE --folder DIR"
    return figures.bench("recovery-testbed-cpu", arguments, columns)


# What trains, by the option of `llmprune recover`.
_TRAINED = {
    "none": "all kept weights",
    "lora": "masked LoRA (`lora`)",
    "shira": "some kept weights (`shira`)",
    "low-rank": "a correction beside them (`low-rank`)",
}


def adapters() -> str:
    """All weights and each kind of adapter, trained from one pruned model in as many steps."""
    rows = figures.read("recovery-adapters-testbed-cpu")
    body = [
        (
            _TRAINED[row["adapter"]],
            f"{row['options']['learning_rate']:g}",
            f"{row['perplexity']['recovered']:.2f}",
            f"{row['gap_closed']:.0%}",
            f"{row['kl_divergence']:.4f}",
            f"{row['cpu_seconds']:,.0f}",
        )
        for row in rows
    ]
    measured = ("perplexity", "gap closed", "KL divergence", "CPU seconds")
    command = literal(
        "python -m llmprune.eval.bench.recovery --calibration FILE --heldout FILE --methods sparsegpt "
        "--adapters none lora shira low-rank --epochs 1 --folder DIR --json recovery-adapters-testbed-cpu.json"
    )
    before = "pruned {pruned:.2f}, dense {dense:.2f}".format(**rows[0]["perplexity"])
    shown = table(("trained", "rate", *measured), body)
    return f"{shown}\n\nPerplexity {before}. Made by {command}. {figures.measured_on(rows[0])}"


def stages() -> str:
    """The experiment in ten stages on a classifier: accuracy after each."""
    (row,) = figures.read("stages-classifier-cpu")
    body = [
        (
            "before" if point["stage"] is None else "dense" if point["stage"] == 0 else str(point["stage"]),
            str(point["step"]),
            f"{point['sparsity']:.1%}",
            f"{point['accuracy']:.1%}",
        )
        for point in row["curve"]
    ]
    made = literal("python -m llmprune.eval.bench.movement")
    held_out = f"{row['accuracy']:.1%} on {row['examples']} held-out passages in the end."
    shown = table(("stage", "step", "sparsity", "accuracy, held-back passages"), body)
    return f"{shown}\n\n{held_out} Made by the second command of {made}. {figures.measured_on(row)}"


def lottery() -> str:
    """Tickets and their controls: perplexity over the seeds."""
    command = "lottery --text FILE --heldout FILE"
    return _over_seeds("lottery-testbed-cpu", command, "ticket", "perplexity", "{:.1f}")


def movement() -> str:
    """Rules for a classifier: accuracy over the seeds."""
    command = "movement --text FILE --heldout FILE --folder DIR"
    return _over_seeds("movement-testbed-cpu", command, "rule", "accuracy", "{:.1%}")


def masks() -> str:
    """What masks cost in each step of training."""
    columns = {"masks": "{masks}", "ms of a step": "{ms:.0f}", "of a step without": "{ratio:.3f}"}
    return figures.bench("masks-testbed-cpu", "masks", columns)


def _over_seeds(name: str, arguments: str, what: str, figure: str, form: str) -> str:
    """Mean and standard deviation of a figure over the seeds, for each sparsity."""
    command = literal(f"python -m llmprune.eval.bench.{arguments} --json {name}.json")
    if not (figures.RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet; run {command}.*"
    rows = figures.read(name)
    found: dict[tuple[float, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["sparsity"], row[what]), []).append(row[figure])
    body = [
        (f"{sparsity:.0%}", one, form.format(mean(values)), form.format(stdev(values)), str(len(values)))
        for (sparsity, one), values in found.items()
    ]
    shown = table(("sparsity", what, figure, "standard deviation", "seeds"), body)
    return f"{shown}\n\nMade by {command}. {figures.measured_on(rows[0])}"


PARTS = {
    "recovery": recovery,
    "adapters": adapters,
    "stages": stages,
    "lottery": lottery,
    "movement": movement,
    "masks": masks,
}
