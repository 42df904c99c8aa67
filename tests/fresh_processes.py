"""Programs in processes that have imported nothing of llmprune: forks of one that waits with what takes seconds."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

# Imports what its arguments name; then each line of stdin is a program, and the file for all that it prints.
_PARENT = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    program, printed = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        exec(program)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TORCH = ("torch._dynamo", "torch.distributed.tensor")
TRANSFORMERS = ("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")


class Finished(NamedTuple):
    """How a program ended, and what it wrote to stdout and stderr."""

    status: int
    printed: str


class FreshProcesses:
    """Runs programs one after the other; the parents are started as they are needed, and end with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._printed, self._stack = folder / "printed.txt", stack
        self._parents: dict[tuple[str, ...], subprocess.Popen[str]] = {}

    def __call__(self, program: str, imported: tuple[str, ...] = TORCH) -> Finished:
        """Run a program with these modules imported already, and llmprune not."""
        if imported not in self._parents:
            command = [sys.executable, "-c", _PARENT, *imported]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._parents[imported] = self._stack.enter_context(process)
        parent = self._parents[imported]
        assert parent.stdin
        assert parent.stdout
        self._printed.unlink(missing_ok=True)
        parent.stdin.write(json.dumps([program, str(self._printed)]) + "\n")
        parent.stdin.flush()
        return Finished(int(parent.stdout.readline()), self._printed.read_text())
