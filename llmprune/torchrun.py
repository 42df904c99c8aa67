"""What torchrun's environment variables say about this process; without torchrun it is alone."""

import os
import signal
import threading
import time

# How long a process that is about to fail waits for the first one to do the same.
_PATIENCE_SECONDS = 15.0

# How often a process looks whether torchrun is still there.
_INTERVAL_SECONDS = 1.0


def processes() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started() -> bool:
    """Whether torchrun has started this process and others."""
    return processes() > 1


def follows() -> bool:
    """Whether this process is one of several, and not the first: then it writes and shows nothing."""
    return started() and number() > 0


def number() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK", "0"))


def attempt() -> str:
    """How often torchrun has started the processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def holds_store() -> bool:
    """Whether it is torchrun that holds the store by which the processes meet, rather than the first of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def on_several_machines() -> bool:
    """Whether some of the processes are elsewhere."""
    return neighbours() < processes()


def neighbours() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def end_with_torchrun() -> None:
    """From now on, end this process as soon as torchrun, which has started it, is gone: killed, it leaves it behind."""
    if started() and "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def let_first_speak() -> None:
    """Wait for the end of the first process, which most likely has failed as this one has: torchrun then ends both.

    Were this process to end before it, torchrun would end the first one before it has said anything. If this returns,
    the first one has not failed, and this one has to say what is wrong.
    """
    time.sleep(_PATIENCE_SECONDS)


def place() -> int:
    """The number of this process among those of its machine, and of the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))
