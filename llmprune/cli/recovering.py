"""`llmprune recover`."""

from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import typer

from llmprune.cli import console, launching
from llmprune.cli.layout import OUTPUT, PRUNE, TEXT, Overwrite, Resume, add
from llmprune.cli.options import AsJson, Device, Quiet, explained, quieten
from llmprune.torchrun import follows

_EXAMPLES = """
Examples:

llmprune recover out/pruned --teacher org/model --dataset text.jsonl --output out/recovered

llmprune recover out/pruned --teacher org/model --dataset text.jsonl --output out/recovered --dry-run

torchrun --nproc-per-node 4 -m llmprune recover out/pruned --teacher org/model --dataset t.jsonl --output out
"""

# The group of its own options in the help.
_TRAINING = "Training"


class Loss(str, Enum):
    """What is minimised."""

    kl = "kl"
    cross_entropy = "cross-entropy"
    mix = "mix"


class Adapter(str, Enum):
    """What is trained in place of all weights."""

    none = "none"
    lora = "lora"
    shira = "shira"
    low_rank = "low-rank"


def _option(name: str, metavar: str, help_text: str, panel: str = _TRAINING, **bounds: Any) -> Any:
    return typer.Option(*name.split(), metavar=metavar, rich_help_panel=panel, help=help_text, **bounds)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether the user has set an option, rather than left it at its default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    add(app, recover, PRUNE, _EXAMPLES)


def recover(
    context: typer.Context,
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The pruned checkpoint: a folder, or a hub id.")],
    teacher: Annotated[
        str | None,
        _option("--teacher", "MODEL", "The dense model that it was pruned from; not needed for cross-entropy."),
    ] = None,
    dataset: Annotated[
        str | None,
        _option(
            "--dataset --text",
            "TEXT",
            'Text to train on: a .txt, .jsonl or .parquet file, a folder, a dataset on the hub, or "self" (sampled '
            "from the dense model). Required.",
            TEXT,
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        _option("--num-samples", "N", "Sequences of it. Default: all, at most 8,192.", TEXT, min=1),
    ] = None,
    max_seq_length: Annotated[
        int | None, _option("--max-seq-length", "N", "Tokens in each sequence, also for evaluation.", TEXT, min=2)
    ] = None,
    eval_dataset: Annotated[
        str | None,
        _option(
            "--eval-dataset",
            "TEXT",
            "Text on which perplexity is measured before and after, on 32 sequences (128 on a GPU) or what it has.",
            TEXT,
        ),
    ] = None,
    held_back: Annotated[
        int | None,
        _option(
            "--held-back", "N", "Sequences that are scored and not trained on; 0: none. Default: 1 in 16.", TEXT, min=0
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        _option(
            "--recipe",
            "FILE",
            "A YAML file with options, such as the recipe.yaml of a recovered checkpoint; these options precede it.",
        ),
    ] = None,
    loss: Annotated[
        Loss,
        _option("--loss", "LOSS", "kl: divergence from the dense model; cross-entropy: of the text; mix: both."),
    ] = Loss.kl,
    kl_share: Annotated[float, _option("--kl-share", "FRACTION", "Share of the divergence in a mix.")] = 0.5,
    learning_rate: Annotated[float, _option("--learning-rate --lr", "RATE", "Its peak.")] = 1e-4,
    epochs: Annotated[float, _option("--epochs", "N", "Passes over the text.")] = 3.0,
    batch_size: Annotated[int, _option("--batch-size", "N", "Sequences per forward pass and device.", min=1)] = 8,
    accumulation: Annotated[int, _option("--accumulation", "N", "Forward passes per step.", min=1)] = 1,
    optimizer: Annotated[
        str,
        _option("--optimizer", "NAME", "A name of transformers' `optim`, such as adamw_torch_fused or adafactor."),
    ] = "adamw_torch",
    adapter: Annotated[
        Adapter,
        _option(
            "--adapter",
            "KIND",
            "lora: train masked adapters, merged in the end, instead of all weights; shira: some of the kept weights, "
            "as many as adapters would have; low-rank: ordinary adapters, saved beside the sparse weights for peft. "
            "All need peft.",
        ),
    ] = Adapter.none,
    rank: Annotated[int, _option("--rank", "N", "Of the adapters.", min=1)] = 16,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            rich_help_panel=_TRAINING,
            help="Compute activations twice instead of keeping them: less memory, a third more time.",
        ),
    ] = False,
    evaluations: Annotated[
        int, _option("--evaluations", "N", "How often held-back text is scored and the state saved.", min=1)
    ] = 10,
    patience: Annotated[
        int, _option("--patience", "N", "Stop after so many of these without an improvement; 0: never.", min=0)
    ] = 3,
    seed: Annotated[int, _option("--seed", "N", "Of the order of the sequences.", min=0)] = 0,
    output: Annotated[
        str | None, _option("--output -o", "DIR", "Folder for the recovered checkpoint. Required.", OUTPUT)
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only show the steps, time, memory and disk space; DIR is optional."),
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the weights that pruning has left, so that the model comes closer to the dense one.

    Every pruned weight stays zero. The result is stored, and packed, as PRUNED is. An interrupted run goes on from its
    last saved state; under torchrun, each process trains on its part of the text.
    """
    if dataset is None:
        raise typer.BadParameter("missing; the calibration text of the pruning will do", param_hint="--dataset")
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run works without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues the run in DIR, --overwrite replaces it: give only one of them")
    options = {
        "loss": loss.value, "kl_share": kl_share, "learning_rate": learning_rate, "epochs": epochs,
        "batch_size": batch_size, "accumulation": accumulation, "optimizer": optimizer, "adapter": adapter.value,
        "rank": rank, "checkpointing": checkpointing, "held_back": held_back, "evaluations": evaluations,
        "patience": patience, "seed": seed,
    }  # fmt: skip
    display = console.Display(quiet=quiet)
    written = None if dry_run else output
    with explained(as_json, lambda: launching.interrupted(display.where(), ["recover", pruned], written)):
        from llmprune.cli.tables.recovering import plan_table, recovery_table
        from llmprune.recovery import recover as room
        from llmprune.recovery.options import RecoveryOptions
        from llmprune.text.tokens import TextSpec

        quieten(quiet)
        if recipe is not None:
            given = {key: value for key, value in options.items() if _is_given(context, key)}
            options = asdict(RecoveryOptions.read(recipe)) | given
        text = TextSpec(dataset, samples=num_samples, length=max_seq_length)
        measured = None if eval_dataset is None else TextSpec(eval_dataset, length=max_seq_length)
        result: Any
        if output is None or dry_run:
            with display.planning():
                result = room.plan_recovery(
                    pruned, text, teacher, options, output=output, evaluation=measured, device=device or "auto",
                    resume=resume, overwrite=overwrite,
                )  # fmt: skip
            shown = plan_table(result)
        else:
            with display:
                result = room.recover(
                    pruned, output, text, teacher, options, evaluation=measured, device=device or "auto",
                    resume=resume, overwrite=overwrite, watch=display,
                )  # fmt: skip
            shown = recovery_table(result, output)
        if not follows():
            if as_json:
                console.show_json(result.to_dict())
            else:
                console.show(shown)
