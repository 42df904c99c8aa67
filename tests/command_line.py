"""Running the command line as a user does: in this process, or in one of its own."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmprune.cli import app

# A small run of the recipe demo.
SMALL = [
    part
    for setting in (
        "calibration.samples=6",
        "calibration.length=24",
        "evaluation.samples=2",
        "evaluation.length=24",
        "batch_size=2",
        "held_back=1",
        "evaluation.prompts=[]",
    )
    for part in ("--set", setting)
]


def make_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours and 80 columns, whatever the tests run in."""
    for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TERM", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: object) -> Any:
    """Run a command in this process; errors that nobody explains are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def spawn(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """Start a command in a process of its own."""
    # As many threads as here: a run goes on only where it would give the same bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    # Whoever runs the tests in the background may have them ignore Ctrl-C, and children inherit that.
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{hearing}; from llmprune.cli import main; main()"]
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, **streams)
