"""The output folder: one shard a decoder layer, each committed atomically, and a manifest that lets a run resume."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from llmprune.checkpoint import INDEX_NAME, Stored, file_digest, read_json, write_json, write_shard
from llmprune.console import format_size
from llmprune.errors import CheckpointError, ResumeError
from llmprune.formats import Layout, layout_from_dict
from llmprune.packed import with_packing_record
from llmprune.report import PAGE_NAME, REPORT_NAME, MatrixRow, StructureRow

MANIFEST_NAME = ".llmprune.json"
LOCK_NAME = ".llmprune.lock"
RECIPE_NAME = "recipe.yaml"

# What makes the shards a model.
_DESCRIBING = ("config.json", INDEX_NAME)

_FORMAT = 4

# What lies beside the weights: tokenizer, report and its page.
_BESIDE_BYTES = 20_000_000

# Everything beside the weights that makes a checkpoint usable; copied as it is.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip

# What --overwrite removes: the files that a checkpoint or a run of ours consists of, and nothing else.
_REPLACED = (
    *_COMPANIONS, "*.safetensors", INDEX_NAME, "README.md", RECIPE_NAME, REPORT_NAME, PAGE_NAME, MANIFEST_NAME,
    ".*.partial",
)  # fmt: skip


@dataclass
class OutputFolder:
    """A checkpoint in the making.

    Attributes:
        path: the folder.
        keys: what must be equal for a run to continue: name -> value.
        layers: decoder layer name -> {"shard", "sha256", "rows"} of what is committed.
        ends: {"shard", "sha256"} of what is outside the decoder layers, once it is written.
        described: sha256 of the files that make the shards a model (config.json and the index), once it is complete.
        complete: whether the run has nothing left to do.
        decisions: what was decided about structures before the first layer; None if nothing was.
    """

    path: Path
    keys: dict[str, Any]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    described: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    decisions: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, keys: Mapping[str, Any], *, resume: bool, overwrite: bool) -> "OutputFolder":
        """Start a folder, or continue one.

        Args:
            path: created if it does not exist.
            keys: what identifies the run, JSON-ready.
            resume: continue what an interrupted run with the same keys has committed.
            overwrite: remove an earlier checkpoint from the folder first.

        Raises:
            ResumeError: the folder is not empty and neither was asked for, its keys differ, or its record is damaged.
            CheckpointError: it cannot be written.
        """
        require_empty(path, resume=resume, overwrite=overwrite)
        folder = cls(path, json.loads(json.dumps(keys)))
        if resume and (path / MANIFEST_NAME).exists():
            folder._continue(_read_manifest(path))
            return folder
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)
            remove_checkpoint(path)
        folder._write_manifest()
        return folder

    def decide(self, decisions: Mapping[str, Any]) -> None:
        """Record what was decided about structures, so that a continued run decides the same."""
        self.decisions = json.loads(json.dumps(decisions))
        self._write_manifest()

    def commit(
        self,
        layer: str,
        shard: str,
        tensors: Mapping[str, Tensor],
        rows: Sequence[MatrixRow],
        layouts: Mapping[str, Layout],
        structures: Sequence[StructureRow] = (),
    ) -> Path:
        """Write one decoder layer's shard and record it; after this it survives any crash.

        Args:
            layer: dotted name of the layer.
            shard: name of its file.
            tensors: what the file holds.
            rows: what the report says of its matrices.
            layouts: of its packed matrices, by name.
            structures: what the report says of what was removed from it.
        """
        digest = write_shard(self.path / shard, tensors)
        self.layers[layer] = {
            "shard": shard,
            "sha256": digest,
            "rows": [asdict(row) for row in rows],
            "layouts": {name: layout.to_dict() for name, layout in layouts.items()},
            "structures": [row.to_dict() for row in structures],
        }
        self._write_manifest()
        return self.path / shard

    @staticmethod
    def layouts_of(layer: Mapping[str, Any]) -> dict[str, Layout]:
        """The layouts of a committed layer's packed matrices."""
        return {name: layout_from_dict(row) for name, row in layer["layouts"].items()}

    def rows_of(self, layer: str) -> list[MatrixRow]:
        """The report rows of a committed layer."""
        return [MatrixRow.from_dict(row) for row in self.layers[layer]["rows"]]

    def structures_of(self, layer: str) -> list[StructureRow]:
        """What was removed from a committed layer."""
        return [StructureRow.from_dict(row) for row in self.layers[layer]["structures"]]

    def commit_ends(self, shard: str, tensors: Mapping[str, Tensor]) -> None:
        """Write what is outside the decoder layers."""
        self.ends = {"shard": shard, "sha256": write_shard(self.path / shard, tensors)}

    def finish(
        self, source: Path, shards: Mapping[str, Sequence[Stored]], config: Mapping[str, Any] | None = None
    ) -> None:
        """Copy the companions of the weights and write the index; now the folder loads.

        Args:
            source: the folder that was pruned.
            shards: shard name -> its tensors.
            config: of the pruned model; None: that of the source.
        """
        copy_companions(source, self.path)
        if config is not None:
            write_json(self.path / "config.json", dict(config))
        self._describe()
        weight_map = {stored.key: shard for shard, tensors in shards.items() for stored in tensors}
        total = sum(stored.nbytes for tensors in shards.values() for stored in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.path / INDEX_NAME, index)

    def _describe(self) -> None:
        """Have config.json say what is packed now, and nothing of what the source had packed."""
        with writing_to(self.path):
            config = read_json(self.path / "config.json")
        layouts = {name: layout for layer in self.layers.values() for name, layout in self.layouts_of(layer).items()}
        described = with_packing_record(config, layouts)
        if described != config:
            write_json(self.path / "config.json", described)

    def close(self) -> None:
        """Mark the run as complete."""
        self.described = {name: file_digest(self.path / name) for name in _DESCRIBING}
        self.complete = True
        self._write_manifest()

    def _continue(self, manifest: dict[str, Any]) -> None:
        for key, value in self.keys.items():
            if manifest["keys"].get(key) != value:
                raise ResumeError(
                    f"{self.path} cannot be resumed: {_difference(key, manifest['keys'].get(key), value)}",
                    expected="the run that was interrupted, unchanged, so that the result is the same to the bit",
                    fix="undo the change, or start again with --overwrite",
                )
        for name, layer in manifest["layers"].items():
            # A shard that went missing or was damaged is done again, and so is every layer behind it.
            if not self._intact(layer):
                break
            self.layers[name] = layer
        index = self.path / INDEX_NAME
        files = [manifest["ends"], *({"shard": name, "sha256": sum_} for name, sum_ in manifest["described"].items())]
        self.decisions = manifest["decisions"]
        self.complete = (
            manifest["complete"]
            and len(self.layers) == len(manifest["layers"])
            and all(self._intact(file) for file in files)
        )
        if not self.complete:
            # Shards are about to change: until all of them are there again, the folder must not load.
            with writing_to(self.path):
                for leftover in (index, *self.path.glob(".*.partial")):
                    leftover.unlink(missing_ok=True)

    def _intact(self, committed: Mapping[str, Any]) -> bool:
        shard = self.path / committed["shard"]
        return shard.exists() and file_digest(shard) == committed["sha256"]

    def _write_manifest(self) -> None:
        content = {
            "format": _FORMAT,
            "keys": self.keys,
            "complete": self.complete,
            "ends": self.ends,
            "described": self.described,
            "decisions": self.decisions,
            "layers": self.layers,
        }
        write_json(self.path / MANIFEST_NAME, content)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other run out of an output folder, which is created if it does not exist.

    The operating system holds the lock while this process lives; what a killed run leaves of it is no obstacle.

    Raises:
        ResumeError: another run is writing into the folder.
        CheckpointError: the folder cannot be written.
    """
    lock = FileLock(path / LOCK_NAME)
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"another run of llmprune is writing into {path}",
                expected="one run at a time in an output folder",
                fix="wait for it to end, or choose another output folder",
            ) from None
    try:
        yield
    finally:
        # While it is held: whoever comes now finds no file, or one that is locked.
        with contextlib.suppress(OSError):
            (path / LOCK_NAME).unlink()
        lock.release()


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}",
            expected="a writable folder with enough free space",
            fix="free some space, mend the permissions or choose another folder",
        ) from error


def copy_companions(source: Path, target: Path, *, but: str = "") -> None:
    """Copy configuration and tokenizer files, unchanged, except the one called `but`."""
    with writing_to(target):
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                if file.is_file() and file.name != but:
                    copy = target / file.relative_to(source)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by a home folder.

    Raises:
        ResumeError: it is no path, an empty one, or ~name of a user whom this machine does not know.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ResumeError(
            f"output folder {path!r}", expected="the path of a folder", fix="pass one, such as out/pruned"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ResumeError(
            f"{path} begins with a home folder that is not known: {error}",
            expected="an output folder",
            fix="write the path in full, or ./~ for a folder of that name",
        ) from error


def require_other(path: Path, source: str | Path) -> None:
    """Refuse to write over the model that is pruned.

    Raises:
        ResumeError: both are one folder.
    """
    if str(source) and path.resolve() == Path(source).resolve():
        raise ResumeError(f"{path} is the model itself", fix="choose another output folder")


def require_free(path: Path) -> None:
    """Refuse a folder into which another run is writing; creates nothing.

    Raises:
        ResumeError: there is such a run.
    """
    if (path / LOCK_NAME).exists():
        with locked(path):
            pass


def require_empty(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless the user said what to do with it.

    Args:
        path: the output folder.
        resume: an interrupted run of ours may be in it.
        overwrite: a checkpoint may be in it.

    Raises:
        ResumeError: the folder is not empty, or is no folder; says what can be done.
    """
    if resume and overwrite:
        raise ResumeError("resume and overwrite contradict each other", fix="ask for one of them")
    existing = _existing(path)
    if not existing.is_dir():
        raise ResumeError(f"{existing} is a file", expected="an output folder", fix="choose another output folder")
    # A run that was killed before it was recorded leaves no more than this, and so does one that has just begun.
    beginnings = {f".{MANIFEST_NAME}.partial", LOCK_NAME}
    if existing != path or all(file.name in beginnings for file in path.iterdir()):
        return
    ours = (path / MANIFEST_NAME).exists()
    replaceable = ours or (path / INDEX_NAME).exists() or any(path.glob("*.safetensors"))
    elsewhere = "choose another folder" + ", or replace the checkpoint in it with --overwrite" * replaceable
    if resume and not ours:
        raise ResumeError(
            f"{path} holds files but no run of llmprune to resume",
            expected="the folder of an interrupted run",
            fix=elsewhere,
        )
    if overwrite and not replaceable:
        raise ResumeError(
            f"{path} holds files but no checkpoint",
            expected="an empty folder, or a checkpoint that --overwrite can replace",
            fix="choose an empty folder",
        )
    if not resume and not overwrite:
        way_on = "continue the run with --resume, or replace it with --overwrite" if ours else elsewhere
        raise ResumeError(f"{path} is not empty", expected="a new or empty folder", fix=way_on)


def require_space(path: Path, nbytes: int) -> None:
    """Refuse to start what cannot be finished.

    Args:
        path: the output folder; shards that are in it will be replaced, so their space counts as free.
        nbytes: size of the pruned checkpoint.

    Raises:
        CheckpointError: the folder is not writable, or there is less space.
    """
    existing = _existing(path)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"{existing} is not writable", fix="mend the permissions or choose another output folder")
    free = shutil.disk_usage(existing).free + sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
    needed = nbytes + _BESIDE_BYTES
    if free < needed:
        raise CheckpointError(
            f"{format_size(free)} are free under {existing}",
            expected=f"{format_size(needed)} for the pruned checkpoint, its tokenizer and its report",
            fix="choose another output folder or free some space",
        )


def remove_checkpoint(path: Path) -> None:
    """Remove the files that a checkpoint or a run of ours consists of, and nothing else."""
    for pattern in _REPLACED:
        for file in path.glob(pattern):
            if file.is_file():
                file.unlink()


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        known = manifest["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{folder / MANIFEST_NAME} cannot be read: {error}",
            expected="the record of an interrupted run",
            fix="start again with --overwrite",
        ) from error
    if not known:
        raise ResumeError(
            f"{folder / MANIFEST_NAME} has format {manifest['format']}",
            expected=f"format {_FORMAT}, which this version of llmprune writes",
            fix="resume with the version that began the run, or start again with --overwrite",
        )
    return manifest


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(_difference(f"{key}.{name}", before.get(name), now.get(name)) for name in names)
    return f"{key} was {_short(before)} and is now {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "…"
