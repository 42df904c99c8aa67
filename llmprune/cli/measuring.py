"""`llmprune perplexity`, `llmprune explain` and `llmprune bench`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli import console
from llmprune.cli.layout import DEPLOY, MEASURE, TEXT, add
from llmprune.cli.options import (
    AsJson,
    ComputeDtype,
    Device,
    DeviceMap,
    Dtype,
    Folder,
    Model,
    Quiet,
    explained,
    quieten,
)

_PERPLEXITY_EXAMPLES = """
Examples:

llmprune perplexity out/demo --text test.txt

llmprune perplexity out/demo --text test.txt --length 1024 --against testbed

llmprune perplexity org/model --text Salesforce/wikitext --config wikitext-2-raw-v1 --split test --length 2048
"""

_BENCH_EXAMPLES = """
Examples:

llmprune bench out/packed

llmprune bench out/packed --against org/model --tokens 1,8,2048 --batches 1

llmprune bench out/packed --tune
"""

# The seed of `evaluation` in recipes, so that `--text self` reproduces a report's dense perplexity.
_SEED = 12345


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, perplexity, MEASURE, _PERPLEXITY_EXAMPLES)
    add(app, explain, DEPLOY)
    add(app, bench, MEASURE, _BENCH_EXAMPLES)


def perplexity(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            "--dataset",
            metavar="TEXT",
            rich_help_panel=TEXT,
            help='A .txt, .jsonl or .parquet file, a dataset on the hub, or "self": text sampled from the dense model, '
            "or without --against from MODEL itself, so that results of different models are not comparable.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense base: also measures KL divergence and top-1 agreement."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            "--max-seq-length",
            min=2,
            metavar="N",
            rich_help_panel=TEXT,
            help="Sequence length in tokens, which is also the stride. Default: 2048 on a GPU, 512 on a CPU, or the "
            "model's positions if there are fewer.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            "--num-samples",
            min=1,
            metavar="N",
            rich_help_panel=TEXT,
            help="Number of sequences, from the beginning of the text.",
        ),
    ] = 128,
    split: Annotated[str, typer.Option(metavar="NAME", rich_help_panel=TEXT, help="Split of the dataset.")] = "train",
    column: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=TEXT, help="Column or key that holds the text.")
    ] = "text",
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=TEXT, help="Configuration of the dataset, if it has several."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences per forward pass.")] = 8,
    device: Device = None,
    compute_dtype: Annotated[
        ComputeDtype,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the forward pass: float32, bfloat16 or float16; auto: the checkpoint's, or float32 on a CPU "
            "without native support for it.",
        ),
    ] = ComputeDtype.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's perplexity one decoder layer at a time, optionally against its dense base.

    Documents are concatenated and cut into sequences, each opened as the tokenizer opens a text (with BOS, or with
    nothing); no token is scored twice.
    """
    started = time.perf_counter()
    display = console.Display(quiet=quiet)
    with explained(as_json):
        from llmprune.cli.tables.measuring import comparison_table, perplexity_table
        from llmprune.devices import describe_device, resolve_device
        from llmprune.measuring.perplexity import perplexity as measure
        from llmprune.measuring.perplexity import perplexity_against
        from llmprune.pruning.context import versions
        from llmprune.stream.stream import StreamSettings
        from llmprune.text.tokens import TextSpec

        quieten(quiet)
        order: Any = {} if text == "self" else {"order": "text"}
        spec = TextSpec(text, config, split, column, samples, length, seed=_SEED, **order)
        where = resolve_device(device or "auto")
        settings = StreamSettings(where, batch_size)
        result: Any
        with display:
            if against is None:
                result = measure(model, spec, settings, compute_dtype.value, display)
            else:
                result = perplexity_against(model, against, spec, settings, compute_dtype.value, display)
        run = {
            "model": model,
            **({"against": against} if against else {}),
            "device": describe_device(where),
            "seconds": time.perf_counter() - started,
        }
        if as_json:
            console.show_json({**run, "version": versions(), **result.to_dict()})
        else:
            console.show((comparison_table if against else perplexity_table)(result, run))


def explain(folder: Folder, device: Device = None, as_json: AsJson = False) -> None:
    """Show which kernel runs each weight matrix on this machine, and the best possible speed-up.

    Reads only config.json and the headers of the weights. Measured speed-ups are shown once `llmprune bench` has run.
    """
    with explained(as_json):
        from llmprune.cli.tables.measuring import explain_tables
        from llmprune.devices import resolve_device
        from llmprune.measuring import explain as explaining

        explanation = explaining.explain(_existing(folder), resolve_device(device or "auto"))
        if as_json:
            console.show_json(explanation.to_dict())
        else:
            console.show(*explain_tables(explanation))


def bench(
    folder: Folder,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model to compare with; default: DIR, unpacked."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens per matmul; default: decode and some prefill sizes.")
    ] = None,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes for the whole model.")] = "1,4,16",
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Prompt length for the whole model.")] = 128,
    tune: Annotated[bool, typer.Option("--tune", help="First search and record kernel configurations (GPU).")] = False,
    seconds: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Time spent on each measurement of a matmul.")
    ] = 0.25,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Result file; default: DIR/bench.json.")
    ] = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = ComputeDtype.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Benchmark a checkpoint against dense weights: matmuls, time to first token, tokens/s, memory.

    Each matmul is first checked against an exact reference; a wrong one is not timed. bench.json keeps the latest
    result for each device.
    """
    sizes = (_numbers(tokens, "--tokens") if tokens else None, _numbers(batches, "--batches"))
    display = console.Display(quiet=quiet)
    with explained(as_json):
        from llmprune.cli.tables.measuring import bench_tables
        from llmprune.errors import CheckpointError
        from llmprune.measuring.bench import bench as benching
        from llmprune.measuring.bench.record import BENCH_NAME, read_results, write_result
        from llmprune.paths import user_path
        from llmprune.storage.files import require_writable
        from llmprune.timing import Effort

        checkpoint = _existing(folder)
        target = user_path(output, CheckpointError) if output else checkpoint / BENCH_NAME
        # Fail now, not after minutes of measuring, if the file cannot be added to.
        read_results(target)
        require_writable(target)
        settings = benching.BenchSettings(
            device or "auto",
            *sizes,
            length,
            dtype=dtype.value,
            tune=tune,
            effort=Effort(seconds),
            device_map=device_map,
        )
        if tune:
            _say_if_nothing_to_tune(settings.device)
        with display:
            result = benching.bench(checkpoint, settings, against, display)
        # Shown first: if they cannot be written after all, minutes of measuring are not lost.
        if as_json:
            console.show_json(result)
        else:
            console.show(*bench_tables(result))
        write_result(target, result)
        if not as_json:
            console.show(f"written to {target}")
        benching.require_right(result)


def _existing(folder: Path) -> Path:
    from llmprune.errors import ModelError
    from llmprune.paths import user_path

    folder = user_path(folder, ModelError)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json" if folder.is_dir() else f"no folder {folder}",
            expected="a local checkpoint folder",
            fix="for a model on the hub, run `hf download` and give the folder that it prints",
        )
    return folder


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: give whole numbers such as 1,4,16", param_hint=option) from None


def _say_if_nothing_to_tune(device: str) -> None:
    from llmprune.devices import resolve_device

    if resolve_device(device).type != "cuda":
        console.tell("nothing to tune: only GPU kernels have configurations")
