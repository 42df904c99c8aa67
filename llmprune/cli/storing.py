"""`llmprune archive`, `llmprune extract`, `llmprune export` and `llmprune import`."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune.cli import console
from llmprune.cli.layout import DEPLOY, OUTPUT, Overwrite, add
from llmprune.cli.options import AsJson, Folder, Quiet, explained

if TYPE_CHECKING:
    from llmprune.storage.archives.report import ArchiveReport

_ARCHIVE_EXAMPLES = """
Examples:

llmprune archive out/demo --dry-run

llmprune archive out/demo --output cold/demo.llmprune
"""

_EXTRACT_EXAMPLES = """
Examples:

llmprune extract cold/demo.llmprune --dry-run

llmprune extract cold/demo.llmprune --output out/demo
"""

_EXPORT_EXAMPLES = """
Examples:

llmprune export out/demo --to csr

llmprune export out/demo --to torch-prune --output out/masked

llmprune export out/demo --to gguf --llama-cpp ~/llama.cpp --gguf-type q8_0
"""

_IMPORT_EXAMPLES = """
Examples:

llmprune import out/masked --output out/pruned

llmprune import state.pt --config org/model-folder --output out/pruned
"""

_CONTINUE = "interrupted; run the same command again to continue"


class Form(str, Enum):
    """What `llmprune export` writes."""

    csr = "csr"
    torch_prune = "torch-prune"
    gguf = "gguf"
    onnx = "onnx"


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, archive, DEPLOY, _ARCHIVE_EXAMPLES)
    add(app, extract, DEPLOY, _EXTRACT_EXAMPLES)
    add(app, export, DEPLOY, _EXPORT_EXAMPLES)
    add(app, import_, DEPLOY, _IMPORT_EXAMPLES, name="import")


def archive(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", rich_help_panel=OUTPUT, help="The archive; default: DIR.llmprune."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate the sizes; write nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Store a checkpoint folder as one compressed file while it is not in use; lossless.

    50 % zeros in bfloat16 take about 0.38 of the dense bytes. An archive cannot be loaded; `llmprune extract` restores
    every file. After an interruption, the same command continues. Needs the extra `archive`.
    """
    with explained(as_json, lambda: _CONTINUE):
        from llmprune.storage.archives import writing

        with console.Display(quiet=quiet) as display:
            report = writing.archive(folder, output, dry_run=dry_run, watch=display)
        _show(report, as_json, "not written (dry run)" if dry_run else str(report.archive), str(report.folder))


def extract(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="An archive.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            rich_help_panel=OUTPUT,
            help="A new folder; default: FILE without .llmprune.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decode and check everything; write nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Restore the folder that `llmprune archive` stored, every file bit for bit.

    After an interruption, the same command continues. Needs the extra `archive`.
    """
    with explained(as_json, lambda: _CONTINUE):
        from llmprune.storage.archives import extracting

        with console.Display(quiet=quiet) as display:
            report = extracting.extract(archive, output, dry_run=dry_run, watch=display)
        folder = "not written (dry run); the archive is sound" if dry_run else str(report.folder)
        _show(report, as_json, str(report.archive), folder)


def export(
    folder: Folder,
    to: Annotated[
        Form,
        typer.Option(
            metavar="FORM",
            rich_help_panel=OUTPUT,
            help="csr: pruned matrices as CSR tensors in safetensors; torch-prune: weight_orig and weight_mask, as "
            "torch.nn.utils.prune has them; gguf: by llama.cpp's converter; onnx: the whole model as a graph in "
            "float32, its logits compared (needs the extra onnx).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", rich_help_panel=OUTPUT, help="Output; default: DIR-FORM, or DIR.gguf."
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            metavar="FOLDER",
            help="For gguf: a clone of llama.cpp; default: the environment variable LLAMA_CPP.",
        ),
    ] = None,
    gguf_type: Annotated[
        str, typer.Option("--gguf-type", metavar="TYPE", help="For gguf: auto, f32, f16, bf16, q8_0.")
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a dense or packed checkpoint in a form that other programs read."""
    with explained(as_json, lambda: "interrupted; nothing was exported"):
        from llmprune.cli.tables.exporting import export_tables
        from llmprune.exporting import export as exporting

        with console.Display(quiet=quiet) as display:
            report = exporting.export(
                folder,
                to.value,
                output,
                overwrite=overwrite,
                llama_cpp=llama_cpp,
                gguf_type=gguf_type,
                watch=display,
            )
        if as_json:
            console.show_json(report.to_dict())
        else:
            console.show(*export_tables(report))


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder with safetensors files, or a state dict of torch.save.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", rich_help_panel=OUTPUT, help="A new folder.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FOLDER", help="Where config.json and the tokenizer are; default: SOURCE, if a folder."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model that torch.nn.utils.prune has pruned (weight_orig, weight_mask) as an ordinary checkpoint.

    The source stays as it is.
    """
    with explained(as_json, lambda: "interrupted; nothing was imported"):
        from llmprune.cli.tables.exporting import export_tables
        from llmprune.exporting.unmasked import import_masked

        with console.Display(quiet=quiet) as display:
            report = import_masked(source, output, config=config, overwrite=overwrite, watch=display)
        if as_json:
            console.show_json(report.to_dict())
        else:
            console.show(*export_tables(report))


def _show(report: "ArchiveReport", as_json: bool, archive: str, folder: str) -> None:
    if as_json:
        console.show_json(report.to_dict())
    else:
        from llmprune.cli.tables.storing import archive_tables

        console.show(*archive_tables(report, archive, folder))
