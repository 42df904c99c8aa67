"""`llmprune inspect`, `llmprune pack` and `llmprune unpack`."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune.cli import console, uploading
from llmprune.cli.layout import DEPLOY, MEASURE, OUTPUT, Overwrite, add
from llmprune.cli.options import AsJson, Folder, Quiet, explained
from llmprune.cli.uploading import PushToHub

if TYPE_CHECKING:
    from llmprune.pruning.packing import PackReport

_PACK_EXAMPLES = """
Examples:

llmprune pack out/demo

llmprune pack out/sparse --output out/sparse-nm --format nm
"""


class PackFormat(str, Enum):
    """What `llmprune pack` writes."""

    auto = "auto"
    nm = "nm"
    block = "block"
    bitmask = "bitmask"


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, inspect, MEASURE)
    add(app, pack, DEPLOY, _PACK_EXAMPLES)
    add(app, unpack, DEPLOY)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='A hub id, the folder of a model, "testbed", or one file: safetensors, or a state dict of torch.save.',
        ),
    ],
    every: Annotated[bool, typer.Option("--all", help="List every matrix, even if there are many.")] = False,
    as_json: AsJson = False,
) -> None:
    """Report the sparsity of each matrix and its pattern.

    Works on any safetensors checkpoint or state dict, whichever tool pruned it, also with the masks of
    torch.nn.utils.prune; no code in a file runs. A long list is summarised per layer unless --all is given.
    """
    with explained(as_json):
        from llmprune.cli.tables.checkpoints import inspection_tables
        from llmprune.errors import ModelError
        from llmprune.measuring.inspection import inspect_checkpoint
        from llmprune.paths import user_path
        from llmprune.storage.files import PICKLES
        from llmprune.storage.hub import resolve_model

        # Any folder with safetensors files will do, even one that cannot be pruned.
        path = user_path(model, ModelError)
        is_file = path.suffix in {".safetensors", *PICKLES}
        inspection = inspect_checkpoint(path if path.is_dir() or is_file else resolve_model(model))
        if as_json:
            console.show_json(inspection.to_dict())
        else:
            console.show(*inspection_tables(inspection, every=every))


def pack(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", rich_help_panel=OUTPUT, help="Output folder; default: DIR-packed."
        ),
    ] = None,
    stored_as: Annotated[
        PackFormat,
        typer.Option(
            "--format",
            metavar="FORMAT",
            rich_help_panel=OUTPUT,
            help="nm for N:M, block for blocks, bitmask for any zeros; auto: what suits each.",
        ),
    ] = PackFormat.auto,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a pruned checkpoint to a packed (compressed) one; 2:4 in bfloat16 takes 0.5625 of the bytes.

    A packed checkpoint loads with from_pretrained after `import llmprune`; `llmprune unpack` converts it back.
    """
    with explained(as_json, lambda: "interrupted; no checkpoint was written"):
        from llmprune.pruning import packing

        uploading.check(push_to_hub)
        with console.Display(quiet=quiet) as display:
            report = packing.pack(folder, output, stored_as.value, overwrite, display)
        if not as_json:
            _show(report, as_json)
        uploading.finish(report.folder, push_to_hub, quiet=quiet or as_json)
        if as_json:
            _show(report, as_json)


def unpack(
    folder: Folder,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", rich_help_panel=OUTPUT, help="Output folder.")
    ],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a packed checkpoint back to a dense one, which loads everywhere."""
    with explained(as_json, lambda: "interrupted; no checkpoint was written"):
        from llmprune.pruning import packing

        with console.Display(quiet=quiet) as display:
            report = packing.unpack(folder, output, overwrite, display)
        _show(report, as_json)


def _show(report: "PackReport", as_json: bool) -> None:
    if as_json:
        console.show_json(report.to_dict())
    else:
        from llmprune.cli.tables.checkpoints import packing_tables

        console.show(*packing_tables(report))
