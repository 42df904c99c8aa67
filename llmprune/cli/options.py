"""What the commands have in common: options, exit codes, and errors in words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.errors import DeviceError, LlmpruneError

EXIT_CODES = (
    "Exit codes: 0 done; 1 something that you can mend, and the message says how (or the reader of the output left); "
    "2 wrong usage; 130 interrupted by Ctrl-C."
)

_INTERRUPTED = 130

Model = Annotated[str, typer.Argument(help='A hub id, a local checkpoint folder, or "testbed", a small bundled model.')]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A local checkpoint folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


class ComputeDtype(str, Enum):
    """What a model is computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[
    ComputeDtype,
    typer.Option(
        help="Dtype of the weights; auto is the checkpoint's, or float32 on a CPU without instructions for it."
    ),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]


@contextmanager
def explained(
    as_json: bool, interrupted: Callable[[], str] = lambda: "interrupted", out_of_memory: Callable[[], str] = str
) -> Iterator[None]:
    """Turn errors that a user can mend, and Ctrl-C, into words and an exit code; all others keep their traceback.

    Args:
        as_json: also print an error as JSON on stdout.
        interrupted: what to say after Ctrl-C.
        out_of_memory: what to say after an error of the device; nothing if it is empty.
    """
    try:
        yield
    except LlmpruneError as error:
        console.show_error(error)
        if isinstance(error, DeviceError) and (way_on := out_of_memory()):
            console.tell(way_on)
        if as_json:
            kind = type(error).__name__
            console.show_json(
                {"error": {"kind": kind, "what": error.what, "expected": error.expected, "fix": error.fix}}
            )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.tell(interrupted())
        raise typer.Exit(_INTERRUPTED) from None


def quieten(quiet: bool) -> None:
    """Leave out the bars of a download, too."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # public, but not in __all__

        disable_progress_bars()
