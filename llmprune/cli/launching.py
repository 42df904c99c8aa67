"""Several processes for one command: started here, or by torchrun."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from llmprune import torchrun
from llmprune.cli import console
from llmprune.cli.options import explained
from llmprune.errors import DeviceError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def number(processes: int | None) -> int:
    """How many processes share the command: as many as --processes or torchrun says, or else one."""
    if processes is None or processes == 1:
        return torchrun.processes()
    if torchrun.started():
        raise typer.BadParameter("torchrun has started the processes already", param_hint="--processes")
    return processes


def again(words: Sequence[str]) -> str:
    """A command of llmprune that torchrun starts if it has started this one, for a shell.

    Args:
        words: the command, from its name on.
    """
    if not torchrun.started():
        return shlex.join(["llmprune", *words])
    here = torchrun.neighbours()
    machines = ["--nnodes", str(torchrun.processes() // here)] if torchrun.on_several_machines() else []
    return shlex.join(["torchrun", *machines, "--nproc-per-node", str(here), "-m", "llmprune", *words])


def interrupted(where: str, words: Sequence[str], output: str | None, since: str = "") -> str:
    """One line for an interrupted training: where it stopped, and how to go on.

    Args:
        where: it was, as the display says; empty before its first step.
        words: its command and model.
        output: its folder; None: it writes nothing.
        since: what it goes on from.
    """
    from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME, expanded

    stopped = f"interrupted ({where})" if where else "interrupted"
    if output is None or not (expanded(output) / STAGING_NAME / MANIFEST_NAME).exists():
        return f"{stopped}; nothing was written"
    command = again([*words, "--output", output])
    return f"{stopped}; continue {since}with --resume and the same options: {command} ... --resume"


def launch(processes: int, *, as_json: bool) -> None:
    """Start the command that runs in several processes, and exit as they do.

    Args:
        processes: how many.
        as_json: also print the death of one as JSON on stdout.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # Of the threads of one process: fewer than the machine's where a scheduler grants only some of its cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads() // processes, 1)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what has failed has said why itself
    try:
        main(["--standalone", f"--nproc-per-node={processes}", "-m", "llmprune", *without_number(sys.argv[1:])])
    except ChildFailedError as error:
        killed = _killed(error.failures)
        rank, failure = killed[0] if killed else error.get_first_failure()
        if killed:
            memory = ", as the system does when memory runs out" if failure.signal_name() == "SIGKILL" else ""
            with explained(as_json):
                what = f"process {rank} was ended by {failure.signal_name()}{memory}"
                raise DeviceError(what, fix="continue with --resume") from None
        raise typer.Exit(failure.exitcode) from None
    except SignalException as error:
        if error.sigval != signal.SIGINT:  # of which the first process says itself how to continue
            console.tell(f"ended by {signal.Signals(error.sigval).name}; continue with --resume")
        raise typer.Exit(128 + int(error.sigval)) from None
    raise typer.Exit(0)


def _killed(failures: Mapping[int, "ProcessFailure"]) -> list[tuple[int, "ProcessFailure"]]:
    """The processes that somebody has killed, by rank: the others fail because of them, some in the same second.

    What torchrun itself ends by SIGTERM, because another one has failed, comes after that one.
    """
    return [
        (rank, failure)
        for place, (rank, failure) in enumerate(failures.items())
        if failure.exitcode < 0 and (place == 0 or failure.exitcode != -signal.SIGTERM)
    ]


def without_number(words: list[str]) -> list[str]:
    """The words of the command without --processes."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--processes":
            skip = True
        elif not word.startswith("--processes="):
            kept.append(word)
    return kept
