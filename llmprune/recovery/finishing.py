"""The end of a recovery: its result is written, counted, measured, and described by the files beside it."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerState

from llmprune.errors import CheckpointError
from llmprune.pages import write_report
from llmprune.recovery.adapters import merge_saved
from llmprune.recovery.card import write_card
from llmprune.recovery.counting import recovered_rows
from llmprune.recovery.folder import RecoveryFolder
from llmprune.recovery.reporting import make_report, measure
from llmprune.recovery.result import compare_zeros, write_result
from llmprune.storage.companions import ADAPTER_FOLDER
from llmprune.storage.files import write_text
from llmprune.storage.folders import RECIPE_NAME
from llmprune.storage.report import REPORT_NAME, Report, load_report
from llmprune.text.tokens import Tokens

if TYPE_CHECKING:
    from llmprune.recovery.recover import Recovery


def finish(
    run: "Recovery",
    folder: RecoveryFolder,
    state: TrainerState,
    facts: dict[str, int],
    tokens: Tokens,
    evaluation: Tokens | None,
) -> None:
    """Write the result, count its zeros, measure it, and put it in its place.

    Args:
        run: what was asked for; its source has the trained weights.
        folder: of the output.
        state: of the Trainer, at its end.
        facts: bytes of memory, and the step whose weights were kept.
        tokens: what was trained on.
        evaluation: what is measured on; None: nothing is.
    """
    pruned, staging = run.source.folder, folder.staging
    before = _report_of(pruned)
    with run.stages("write"):
        write_result(run.source, staging, run.watch)
        zeros = compare_zeros(pruned, staging, run.watch)
        rows = recovered_rows(run.source, before)
    measured = None
    if evaluation is not None:
        with run.stages("perplexity"), _measurable(run, staging) as recovered:
            models = [pruned, recovered] if run.teacher is None else [run.teacher.folder, pruned, recovered]
            measured = measure(models, evaluation, run.device, run.watch)
    report = make_report(run, folder.keys, state, facts, tokens, rows, zeros, measured, before)
    report.save(staging)
    write_text(staging / RECIPE_NAME, run.options.to_yaml())
    write_report(staging)
    write_card(staging, report)
    folder.close()


def _report_of(folder: Path) -> Report | None:
    """The report of the run that has made a checkpoint; None if there is none, or another program's."""
    if not (folder / REPORT_NAME).is_file():
        return None
    with contextlib.suppress(CheckpointError):
        return load_report(folder)
    return None


@contextlib.contextmanager
def _measurable(run: "Recovery", result: Path) -> Iterator[Path]:
    """The result as a checkpoint of its own: with a correction beside it, that is added to a copy for the while."""
    if run.options.adapter != "low-rank":
        yield result
        return
    with tempfile.TemporaryDirectory(prefix="llmprune-merged-") as folder:
        merge_saved(run.source.model, result / ADAPTER_FOLDER)
        write_result(run.source, Path(folder), run.watch, dense=True)  # there are no zeros left to pack
        yield Path(folder)
