"""The output folder: one shard a decoder layer, each committed atomically, and a manifest that lets a run resume."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.checkpoint import INDEX_NAME, Stored, file_digest, write_json, write_shard
from llmprune.errors import CheckpointError, ResumeError
from llmprune.report import REPORT_NAME, MatrixRow

MANIFEST_NAME = ".llmprune.json"

# Everything beside the weights that makes a checkpoint usable; copied as it is.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "chat_template*", "*.jinja", "preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip

# What --overwrite removes: the files that a checkpoint or a run of ours consists of, and nothing else.
_REPLACED = (*_COMPANIONS, "*.safetensors", INDEX_NAME, "README.md", "recipe.yaml", REPORT_NAME, MANIFEST_NAME, ".*.partial")


@dataclass
class OutputFolder:
    """A checkpoint in the making.

    Attributes:
        path: the folder.
        keys: what must be equal for a run to continue: name -> value.
        layers: decoder layer name -> {"shard", "sha256", "rows"} of what is committed.
    """

    path: Path
    keys: dict[str, Any]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def open(cls, path: Path, keys: Mapping[str, Any], *, resume: bool, overwrite: bool) -> "OutputFolder":
        """Start a folder, or continue one.

        Args:
            path: created if it does not exist.
            keys: what identifies the run, JSON-ready.
            resume: continue what an interrupted run with the same keys has committed.
            overwrite: remove an earlier checkpoint from the folder first.

        Raises:
            ResumeError: the folder is not empty and neither was asked for, or its keys differ.
            CheckpointError: it cannot be written.
        """
        require_empty(path, resume=resume, overwrite=overwrite)
        manifest = path / MANIFEST_NAME
        folder = cls(path, json.loads(json.dumps(keys)))
        if resume and manifest.exists():
            folder._continue(json.loads(manifest.read_text(encoding="utf-8")))
            return folder
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)
            remove_checkpoint(path)
        folder._write_manifest()
        return folder

    def commit(self, layer: str, shard: str, tensors: Mapping[str, Tensor], rows: Sequence[MatrixRow]) -> Path:
        """Write one decoder layer's shard and record it; after this it survives any crash."""
        digest = write_shard(self.path / shard, tensors)
        self.layers[layer] = {"shard": shard, "sha256": digest, "rows": [asdict(row) for row in rows]}
        self._write_manifest()
        return self.path / shard

    def rows_of(self, layer: str) -> list[MatrixRow]:
        """The report rows of a committed layer."""
        return [MatrixRow.from_dict(row) for row in self.layers[layer]["rows"]]

    def finish(self, source: Path, shards: Mapping[str, Sequence[Stored]]) -> None:
        """Copy the companions of the weights and write the index; now the folder loads.

        Args:
            source: the folder that was pruned.
            shards: shard name -> its tensors.
        """
        copy_companions(source, self.path)
        weight_map = {stored.key: shard for shard, tensors in shards.items() for stored in tensors}
        total = sum(stored.nbytes for tensors in shards.values() for stored in tensors)
        write_json(self.path / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def close(self) -> None:
        """Mark the run as complete."""
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
            shard = self.path / layer["shard"]
            # A shard that went missing or was damaged is done again, and so is every layer behind it.
            if not shard.exists() or file_digest(shard) != layer["sha256"]:
                break
            self.layers[name] = layer
        self.complete = manifest["complete"] and len(self.layers) == len(manifest["layers"])

    def _write_manifest(self) -> None:
        content = {"format": 1, "keys": self.keys, "complete": self.complete, "layers": self.layers}
        write_json(self.path / MANIFEST_NAME, content)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error}",
            expected="a writable folder with enough free space",
            fix="free some space, mend the permissions or choose another folder",
        ) from error


def copy_companions(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files, unchanged."""
    with writing_to(target):
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, target / file.name)


def require_empty(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless the user said what to do with it.

    Raises:
        ResumeError: the folder is not empty; says what can be done.
    """
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise ResumeError(f"{path} is a file", expected="an output folder")
    ours = (path / MANIFEST_NAME).exists()
    if resume and not ours:
        raise ResumeError(
            f"{path} holds files but no run of llmprune to resume",
            fix="choose an empty folder, or start again with --overwrite",
        )
    if not resume:
        way_on = "continue the run with --resume, or replace it" if ours else "choose another, or replace what is in it"
        raise ResumeError(f"{path} is not empty", expected="a new or empty folder", fix=f"{way_on} with --overwrite")


def require_space(path: Path, nbytes: int) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        CheckpointError: the disk under `path` has less than `nbytes` free.
    """
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise CheckpointError(
            f"{free / 1e9:.1f} GB are free under {existing}",
            expected=f"{nbytes / 1e9:.1f} GB for the pruned checkpoint",
            fix="choose another output folder or free some space",
        )


def remove_checkpoint(path: Path) -> None:
    """Remove the files that a checkpoint or a run of ours consists of, and nothing else."""
    for pattern in _REPLACED:
        for file in path.glob(pattern):
            if file.is_file():
                file.unlink()


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(_difference(f"{key}.{name}", before.get(name), now.get(name)) for name in names)
    return f"{key} was {_short(before)} and is now {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "…"
