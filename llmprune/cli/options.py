"""What the commands share: options, exit codes and error messages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.errors import DeviceError, LlmpruneError, PeerError
from llmprune.torchrun import follows, let_first_speak

EXIT_CODES = (
    "Exit codes: 0 success; 1 an error (the message says how to fix it) or a closed pipe; 2 usage error; 130 Ctrl-C."
)

INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help='A hub id, a local checkpoint folder, or "testbed" (the bundled model).'),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A local checkpoint folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress on stderr.")]


class ComputeDtype(str, Enum):
    """The dtype of the computation."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[
    ComputeDtype,
    typer.Option(
        metavar="DTYPE",
        help="Dtype of the weights: float32, bfloat16 or float16; auto: the checkpoint's, or float32 on a CPU without "
        "native support for it.",
    ),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="MAP",
        help="Share the model out over several devices, in place of --device: auto, balanced, balanced_low_0 or "
        "sequential, as in transformers.",
    ),
]


@contextmanager
def explained(
    as_json: bool, interrupted: Callable[[], str] = lambda: "interrupted", out_of_memory: Callable[[], str] = str
) -> Iterator[None]:
    """Turn user errors and Ctrl-C into a message and an exit code; any other exception keeps its traceback.

    Args:
        as_json: also print the error as JSON on stdout, whichever it is.
        interrupted: returns the message for Ctrl-C.
        out_of_memory: returns an extra line for a device error; none if it is empty.
    """
    try:
        yield
    except PeerError as error:
        if not follows():
            console.show_error(error)
        raise typer.Exit(1) from None
    except LlmpruneError as error:
        if follows():
            let_first_speak()
        console.show_error(error)
        if isinstance(error, DeviceError) and (advice := out_of_memory()):
            console.tell(advice)
        if as_json:
            _show_json(error, error.what, error.expected, error.fix)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if not follows():
            console.tell(interrupted())
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if follows():
            let_first_speak()
        if as_json:
            _show_json(error, str(error), fix="this is a bug of llmprune: report it with the traceback on stderr")
        raise


def _show_json(error: Exception, what: str, expected: str = "", fix: str = "") -> None:
    console.show_json({"error": {"kind": type(error).__name__, "what": what, "expected": expected, "fix": fix}})


def quieten(quiet: bool) -> None:
    """Hide the progress bars of downloads as well."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # public, but not in __all__

        disable_progress_bars()
