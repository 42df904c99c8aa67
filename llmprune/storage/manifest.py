"""The manifest of a run: what it has committed, and what must be unchanged for it to continue."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from llmprune.devices import same_but_threads
from llmprune.errors import ResumeError
from llmprune.storage.exchange import MANIFEST_FORMAT
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME
from llmprune.storage.records import CLOSED, PlainName, read_as
from llmprune.storage.report import MatchRow, MatrixRow, StructureRow

# How much of two long values that differ is shown.
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class CommittedLayer:
    """A decoder layer whose shard is written.

    Attributes:
        shard: name of its file.
        sha256: of the file.
        rows: the report's rows for its matrices.
        layouts: of its packed matrices, by name, as `Layout.to_dict` returns them.
        structures: the report's rows for the structures removed from it.
        matches: the report's row, if it was fitted as a whole.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    shard: PlainName
    sha256: str
    rows: tuple[MatrixRow, ...]
    layouts: dict[str, dict[str, Any]]
    structures: tuple[StructureRow, ...]
    matches: tuple[MatchRow, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the manifest of a run holds; see `OutputFolder` for the fields."""

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    format: int
    complete: bool
    keys: dict[str, Any]
    ends: dict[str, str]
    described: dict[str, str]
    decisions: dict[str, Any] | None
    layers: dict[str, CommittedLayer]
    files: tuple[str, ...] = ()
    processes: int = 1
    notes: tuple[str, ...] = ()


def manifest_of(output: Path) -> Path | None:
    """The manifest of an unfinished run in the folder, or else of a finished one."""
    files = (place / MANIFEST_NAME for place in (output / STAGING_NAME, output))
    return next((file for file in files if file.exists()), None)


def changes(output: Path, manifest: Manifest, keys: Mapping[str, Any], processes: int = 1) -> list[str]:
    """What has changed in the evaluation since the manifest was written; any other change is an error.

    Args:
        output: the folder.
        manifest: of the run in it.
        keys: of the run that is to continue it.
        processes: how many share that run. Another number than before has other threads each, which changes no more.
    """
    found = []
    for key, value in keys.items():
        before = manifest.keys.get(key)
        if key == "device" and processes != manifest.processes and same_but_threads(str(before), str(value)):
            continue
        if _pruned_by(before) != _pruned_by(value):
            raise ResumeError(
                f"{output} cannot be resumed: {_difference(key, _pruned_by(before), _pruned_by(value))}",
                expected="the interrupted run, so that the result is bit-identical; only the evaluation may change",
                fix="undo the change, or start again with --overwrite",
            )
        if before != value:
            found.append(_difference(key, before, value))
    return found


def read_manifest(file: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ResumeError: it is damaged, of another format, or of no run.
    """
    damaged: dict[str, Any] = {
        "expected": "the manifest of an interrupted run",
        "fix": "start again with --overwrite",
        "raised": ResumeError,
    }
    content = read_as(file, dict[str, Any], **damaged)
    if content.get("format") != MANIFEST_FORMAT:
        raise ResumeError(
            f"{file} has format {content.get('format')}",
            expected=f"format {MANIFEST_FORMAT}, which this version of llmprune writes",
            fix="resume with the version that started the run, or start again with --overwrite",
        )
    if "keys" not in content:
        raise ResumeError(
            f"{file.parent} holds a checkpoint that was packed, unpacked or saved from memory",
            expected="the folder of an interrupted run of llmprune prune",
            fix="choose another folder, or replace the checkpoint with --overwrite",
        )
    return read_as(file, Manifest, **damaged)


def _pruned_by(value: Any) -> Any:
    """The part of a key's value that the pruned weights depend on: not the section or the text of the evaluation."""
    return {name: part for name, part in value.items() if name != "evaluation"} if isinstance(value, dict) else value


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(_difference(f"{key}.{name}", before.get(name), now.get(name)) for name in names)
    one, other = str(before), str(now)
    # A little of what they have in common, and then where they differ.
    common = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, common - _SHOWN // 4)
    return f"{key} was {_excerpt(one, start)} and is now {_excerpt(other, start)}"


def _excerpt(text: str, start: int) -> str:
    if len(text) <= _SHOWN:
        return text
    start = min(start, len(text) - 1)
    return "…" * (start > 0) + text[start : start + _SHOWN] + "…" * (start + _SHOWN < len(text))
