"""What each process of `tests/pruning/test_ranks.py` runs: all cases of a JSON file, one after the other."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

from llmprune.pruning.pipeline import prune
from llmprune.pruning.writing import Writer
from llmprune.storage.report import load_report


def die_after(layers: int) -> None:
    """Kill this process where its next layer would be committed, once so many are."""
    commit, count = Writer.commit, itertools.count(1)

    def counted(*args: Any, **more: Any) -> None:
        if next(count) > layers:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(*args, **more)

    Writer.commit = counted  # type: ignore[method-assign]


def main(file: Path) -> None:
    """Prune each case's model into its folder; of a case without `fails`, every process must get the report."""
    for case in json.loads(file.read_text()):
        if str(case.get("killed")) == os.environ["RANK"]:
            die_after(case["layers"])
        report = prune(case["model"], case["recipe"], case["output"], resume=case.get("resume", False))
        assert report == load_report(Path(case["output"])), "every process has the report"
