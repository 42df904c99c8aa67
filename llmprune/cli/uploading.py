"""The option --push-to-hub, and the last line of commands whose result may be uploaded."""

from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli import console
from llmprune.cli.layout import OUTPUT
from llmprune.cli.options import INTERRUPTED

PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="ORG/NAME",
        rich_help_panel=OUTPUT,
        help="Upload the result to this model repository of the Hugging Face hub, which is created if need be.",
    ),
]


def check(repository: str | None) -> None:
    """Refuse an upload that cannot succeed, before the work begins."""
    if repository is not None:
        from llmprune.storage.upload import require_upload

        require_upload(repository)


def finish(folder: Path, repository: str | None, *, quiet: bool) -> None:
    """Upload the result, or say once how to."""
    from llmprune.storage.upload import upload, upload_command

    if repository is None:
        if not quiet:
            console.tell(f"to upload it: {upload_command(folder)}")
        return
    if not quiet:
        console.tell(f"uploading to {repository}")
    try:
        address = upload(folder, repository)
    except KeyboardInterrupt:
        again = upload_command(folder, repository)
        console.tell(f"interrupted; the result is complete in {folder}; upload it with: {again}")
        raise typer.Exit(INTERRUPTED) from None
    if not quiet:
        console.tell(f"uploaded to {address}")
