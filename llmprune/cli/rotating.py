"""`llmprune rotate`."""

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune.cli import console
from llmprune.cli.layout import OUTPUT, PRUNE, TEXT, Overwrite, Resume, add
from llmprune.cli.options import AsJson, Device, Model, Quiet, explained, quieten

if TYPE_CHECKING:
    from llmprune.stream.stream import StreamSettings
    from llmprune.text.tokens import TextSpec

_EXAMPLES = """
Examples:

llmprune rotate testbed --output out/rotated

llmprune rotate org/model --output out/rotated --calibration text.jsonl --steps 1000 --untie

llmprune rotate org/model --dry-run
"""

# The group of its own options in the help.
_ROTATION = "Rotation"


class Kind(str, Enum):
    """How the rotation is found."""

    learned = "learned"
    hadamard = "hadamard"
    random = "random"


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    add(app, rotate, PRUNE, _EXAMPLES)


def rotate(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Folder for the rotated checkpoint. Required.",
        ),
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            metavar="KIND",
            rich_help_panel=_ROTATION,
            help="learned: pruning takes as little as possible; hadamard and random need no search.",
        ),
    ] = Kind.learned,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_ROTATION, help="Steps of the search.")
    ] = 200,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            rich_help_panel=_ROTATION,
            help="The zeros that the rotation is learned for: 2:4 (the default), 0.6, 0.5@16x16, ...",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=_ROTATION, help="Seed of random and Hadamard rotations.")
    ] = 0,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            rich_help_panel=_ROTATION,
            help="Give the LM head weights of its own if it shares those of the embeddings; the checkpoint grows by "
            "their size.",
        ),
    ] = False,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            "--dataset",
            metavar="TEXT",
            rich_help_panel=TEXT,
            help='A .txt, .jsonl or .parquet file, a dataset on the hub, or "self": text sampled from the model.',
        ),
    ] = "self",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", "--num-samples", min=1, metavar="N", rich_help_panel=TEXT, help="Calibration sequences."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", "--max-seq-length", min=2, metavar="N", rich_help_panel=TEXT, help="Their length in tokens."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=TEXT, help="Sequences per forward pass.")
    ] = 8,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only show the time, memory and disk space that it needs; DIR is optional."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rotate the residual stream of a model, so that pruning it afterwards loses less.

    The result is an ordinary checkpoint with the same logits, which are compared. Architectures in which the rotation
    would not be exact are refused with the reason.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("missing; only --dry-run works without it", param_hint="--output")
    if resume and overwrite:
        raise typer.BadParameter("--resume continues the run in DIR, --overwrite replaces it: give only one of them")
    options = {"kind": kind.value, "steps": steps, "pattern": pattern, "seed": seed, "untie": untie}
    display = console.Display(quiet=quiet)
    with explained(as_json, lambda: _advice(display, model, output, options, overwrite=overwrite)):
        from llmprune.cli.tables.rotating import plan_table, rotation_table

        quieten(quiet)
        text, settings = _inputs(calibration, samples, length, device, batch_size)
        result: Any
        if output is None or dry_run:
            from llmprune.pruning.rotation.plan import plan_rotation

            with display.planning():
                result = plan_rotation(model, options, text, settings)
            shown = plan_table(result)
        else:
            from llmprune.pruning.rotation.rotate import rotate as run

            with display:
                result = run(model, output, options, text, settings, resume=resume, overwrite=overwrite, watch=display)
            shown = rotation_table(result, output)
        if as_json:
            console.show_json(result.to_dict())
        else:
            console.show(shown)


def _inputs(
    calibration: str, samples: int | None, length: int | None, device: str | None, batch_size: int
) -> "tuple[TextSpec, StreamSettings]":
    from llmprune.devices import resolve_device
    from llmprune.stream.stream import StreamSettings
    from llmprune.text.tokens import TextSpec

    return (
        TextSpec(calibration, samples=samples, length=length),
        StreamSettings(resolve_device(device or "auto"), batch_size),
    )


def _advice(
    display: console.Display, model: str, output: Path | None, options: dict[str, Any], *, overwrite: bool
) -> str:
    """One line for an interrupted run: where it stopped, and how to go on."""
    # Until the text is ready, nothing is written.
    begun = display.progress is not None and display.progress.layers > 0 and display.progress.unit != "token"
    if output is None or not begun:
        return "interrupted; nothing was written"
    again = shlex.join(["llmprune", "rotate", model, "--output", str(output)])
    return f"interrupted ({display.where()}); continue with --resume and the same options: {again} ... --resume"
