"""`llmprune eval`."""

from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.cli.layout import MEASURE, add
from llmprune.cli.options import AsJson, ComputeDtype, Device, DeviceMap, Model, Quiet, explained, quieten
from llmprune.progress import Progress

_EXAMPLES = """
Examples:

llmprune eval out/packed --tasks hellaswag,arc_easy,wikitext --against org/model --output eval.json

llmprune eval testbed
"""


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    add(app, evaluate, MEASURE, _EXAMPLES, "eval")


def evaluate(
    model: Model,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Tasks, groups or tags of lm-eval, or YAML files. Default: three bundled tasks, which need no network "
            "and are meaningful only for the bundled test model.",
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The dense base model to compare with.")] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="N", help="Documents per task, or a fraction below 1. Default: all.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Requests per forward pass.")] = "8",
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples before each question. Default: the task's.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder with further tasks, as YAML files.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through the chat template of the model's tokenizer.")
    ] = False,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            "--gen-kwargs",
            metavar="NAME=VALUE,...",
            help="Arguments of generation for tasks that generate, such as temperature=0.7,do_sample=True.",
        ),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option("--log-samples", help="Also write every question with the model's answer; needs --output."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="JSON file for the comparison; lm-eval's own JSON goes into a folder of the same name.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Cache the model's answers here, so that an interrupted run can continue."),
    ] = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Annotated[
        ComputeDtype,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the weights: float32, bfloat16 or float16; auto: the checkpoint's, as for lm-eval's hf.",
        ),
    ] = ComputeDtype.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run lm-eval on a checkpoint and, with --against, on its dense base.

    Needs the extra `eval` (see the README). A difference is called significant above 2 standard errors.
    """
    batch = _batch_size(batch_size)
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise typer.BadParameter(f"{limit:g}: give a whole number, or a fraction below 1", param_hint="--limit")
    with explained(as_json):
        from llmprune.cli.tables.evaluating import evaluation_tables
        from llmprune.errors import CheckpointError
        from llmprune.measuring.tasks import OFFLINE_TASKS, HarnessSettings, run_tasks
        from llmprune.paths import user_path

        quieten(quiet)
        names = tuple(tasks.split(",")) if tasks else OFFLINE_TASKS
        settings = HarnessSettings(
            limit,
            batch,
            num_fewshot,
            device or "auto",
            dtype.value,
            cache,
            quiet,
            include_path=include_path,
            apply_chat_template=apply_chat_template,
            gen_kwargs=gen_kwargs,
            log_samples=log_samples,
            device_map=device_map,
        )
        target = user_path(output, CheckpointError) if output else None
        result = run_tasks(model, names, against, settings, target, lambda step: _tell(step, quiet))
        if as_json:
            console.show_json(result.to_dict())
        else:
            console.show(*evaluation_tables(result), *[f"written to {target}"] * bool(target))


def _tell(progress: Progress, quiet: bool) -> None:
    # lm-eval draws progress bars of its own, so there is no live display around them.
    if not quiet:
        console.tell(progress.stage)


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f'{text!r}: give a number of at least 1, or "auto"', param_hint="--batch-size")
