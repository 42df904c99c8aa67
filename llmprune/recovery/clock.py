"""How long a training takes, over all the processes that go on with it one after the other."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmprune.storage.files import read_json, write_json
from llmprune.timing import Stages

_NAME = "seconds.json"


class Clock(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Keeps the seconds of a run beside its saved states, so that a process that goes on from one counts them as well.

    What a killed process has done after its last state is done again, and so not counted.

    Args:
        stages: the stopwatch of this process; what earlier ones have spent is added.
        folder: of all states.

    Raises:
        CheckpointError: what an earlier process has kept cannot be read.
    """

    def __init__(self, stages: Stages, folder: Path) -> None:
        self._stages, self._file = stages, folder / _NAME
        if self._file.exists():
            stages.go_on(read_json(self._file))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the seconds until now."""
        if args.should_save:
            write_json(self._file, self._stages.spent())
