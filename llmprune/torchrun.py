"""What torchrun's environment variables say about this process; without torchrun it is alone."""

import os

_met = False


def processes() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started() -> bool:
    """Whether torchrun has started this process and others."""
    return processes() > 1


def follows() -> bool:
    """Whether this process is one of several, and not the first: then it writes and shows nothing."""
    return started() and os.environ.get("RANK", "0") != "0"


def meet() -> None:
    """Note that this process works with the others from now on."""
    global _met
    _met = True


def shows_errors() -> bool:
    """Whether this process shows its errors: until the processes meet, all have the same, and the first one does."""
    return _met or not follows()


def place() -> int:
    """The number of this process among those of its machine, and of the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))
