"""Several processes for one command: started here, or by torchrun."""

import logging
import os
import sys

import typer

from llmprune import torchrun
from llmprune.cli import console


def launch(processes: int | None) -> None:
    """Start the command that runs in several processes, and exit as they do; return in each of these processes.

    Args:
        processes: how many; None or 1: this one goes on alone, as does one that torchrun has started.
    """
    if processes is None or processes == 1:
        return
    if torchrun.started():
        raise typer.BadParameter("torchrun has started the processes already", param_hint="--processes")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what has failed has said why itself
    try:
        main(["--standalone", f"--nproc-per-node={processes}", "-m", "llmprune", *without_number(sys.argv[1:])])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            console.tell(f"process {rank} was ended by {failure.signal_name()}; continue with --resume")
        raise typer.Exit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as error:  # the first process has said how to continue
        raise typer.Exit(128 + int(error.sigval)) from None
    raise typer.Exit(0)


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
