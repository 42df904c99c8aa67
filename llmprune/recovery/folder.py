"""The output folder of a recovery: its result in the making, and the saved states to resume from."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import ResumeError
from llmprune.storage.exchange import MANIFEST_FORMAT, begin, complete_exchange, exchange
from llmprune.storage.files import read_json, write_json
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME, locked, require_empty, writing_to
from llmprune.torchrun import follows, processes

# Where the Trainer saves its states.
WORK_NAME = f"{STAGING_NAME}/training"


class RecoveryFolder:
    """The output folder of a recovery, or of another training that is saved and resumed like one.

    Under torchrun, the first process alone changes it, and the others wait.

    Args:
        output: the folder.
        keys: what must be unchanged for a run to continue, JSON-ready.
        command: of llmprune, whose run it is.

    Attributes:
        staging: where the result is made.
        finished: whether the run with these keys is finished already.
    """

    def __init__(self, output: Path, keys: Mapping[str, Any], command: str = "recover") -> None:
        self._output, self.staging, self._command = output, output / STAGING_NAME, command
        self.keys: dict[str, Any] = json.loads(json.dumps(keys))
        self.finished = False

    @contextlib.contextmanager
    def opened(self, *, resume: bool, overwrite: bool, arguments: Any) -> Iterator[None]:
        """Lock the folder, and start a run in it or continue one.

        Args:
            resume: continue the run in it.
            overwrite: an earlier checkpoint in it will be replaced.
            arguments: the Trainer's; asking them for a device joins the other processes.

        Raises:
            ResumeError: the folder is not empty and neither flag is set, or its run is another one.
        """
        assert arguments.device is not None
        with contextlib.nullcontext() if follows() else locked(self._output):
            if not follows():
                self._begin(resume=resume, overwrite=overwrite)
            self.wait()
            self.finished = not self.staging.exists()
            yield
            self.wait()

    def wait(self) -> None:
        """Wait for the other processes to come here."""
        if processes() > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Put the result in the place of an earlier one."""
        write_json(self.staging / MANIFEST_NAME, self._manifest(complete=True))
        with writing_to(self._output):
            shutil.rmtree(self._output / WORK_NAME, ignore_errors=True)
        exchange(self._output)

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        require_empty(self._output, resume=resume, overwrite=overwrite)
        complete_exchange(self._output)
        places = (self.staging / MANIFEST_NAME, self._output / MANIFEST_NAME)
        if resume and (found := next((file for file in places if file.exists()), None)) is not None:
            manifest = read_json(found)
            self._require_same(manifest.get(self._key))
            if found == places[0] and manifest.get("complete"):
                self.close()  # it was killed between the last two lines of `close`
            return
        begin(self._output)
        write_json(self.staging / MANIFEST_NAME, self._manifest(complete=False))

    @property
    def _key(self) -> str:
        return {"recover": "recovery", "train": "training"}[self._command]

    def _manifest(self, *, complete: bool) -> dict[str, Any]:
        return {"format": MANIFEST_FORMAT, "complete": complete, self._key: self.keys}

    def _require_same(self, before: Any) -> None:
        if not isinstance(before, dict):
            raise ResumeError(
                f"{self._output} holds no run of llmprune {self._command}",
                expected="the folder of an interrupted run of it",
                fix="choose another folder, or replace the checkpoint with --overwrite",
            )
        for key, value in self.keys.items():
            if before.get(key) != value:
                raise ResumeError(
                    f"{self._output} cannot be resumed: {_difference(key, before.get(key), value)}",
                    expected="the interrupted run, so that the result is the same",
                    fix="undo the change, or start again with --overwrite",
                )


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(
            _difference(f"{key}.{name}", before.get(name), now.get(name))
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        )
    return f"{key} was {before} and is now {now}"
