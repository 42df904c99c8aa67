"""The output folder: one shard per decoder layer, committed atomically, and a manifest from which a run can resume."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import ResumeError
from llmprune.storage.files import INDEX_NAME, Stored, file_digest, read_json, write_json, write_shard
from llmprune.storage.folders import MANIFEST_NAME, copy_companions, remove_checkpoint, require_empty, writing_to
from llmprune.storage.formats import Layout, layout_from_dict
from llmprune.storage.packed_config import with_packing_record
from llmprune.storage.report import MatrixRow, StructureRow

# The files that make the shards a model.
_DESCRIBING = ("config.json", INDEX_NAME)

_FORMAT = 4


@dataclass
class OutputFolder:
    """A checkpoint in the making.

    Attributes:
        path: the folder.
        keys: what must be unchanged for a run to continue: name -> value.
        layers: decoder layer name -> {"shard", "sha256", "rows"} of each committed layer.
        ends: {"shard", "sha256"} of the tensors outside the decoder layers, once they are written.
        described: sha256 of the files that make the shards a model (config.json and the index), once it is complete.
        complete: whether the run has nothing left to do.
        decisions: the decisions about structures that were made before the first layer; None if there were none.
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
            resume: continue after the layers that an interrupted run with the same keys has committed.
            overwrite: remove an earlier checkpoint from the folder first.

        Raises:
            ResumeError: the folder is not empty and neither flag is set, its keys differ, or its manifest is damaged.
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
        """Record the decisions about structures, so that a resumed run makes the same ones."""
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
            tensors: the file's content.
            rows: the report's rows for its matrices.
            layouts: of its packed matrices, by name.
            structures: the report's rows for the structures removed from it.
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
        """The report rows for the structures removed from a committed layer."""
        return [StructureRow.from_dict(row) for row in self.layers[layer]["structures"]]

    def commit_ends(self, shard: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors outside the decoder layers."""
        self.ends = {"shard": shard, "sha256": write_shard(self.path / shard, tensors)}

    def finish(
        self, source: Path, shards: Mapping[str, Sequence[Stored]], config: Mapping[str, Any] | None = None
    ) -> None:
        """Copy configuration and tokenizer files and write the index; from then on the folder loads.

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
        """Make config.json describe what is packed now, instead of what was packed in the source."""
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
                    expected="the interrupted run, unchanged, so that the result is bit-identical",
                    fix="undo the change, or start again with --overwrite",
                )
        for name, layer in manifest["layers"].items():
            # A missing or damaged shard is written again, and so is every layer after it.
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
            # Shards are about to change: until all of them exist again, the folder must not load.
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        known = manifest["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{folder / MANIFEST_NAME} cannot be read: {error}",
            expected="the manifest of an interrupted run",
            fix="start again with --overwrite",
        ) from error
    if not known:
        raise ResumeError(
            f"{folder / MANIFEST_NAME} has format {manifest['format']}",
            expected=f"format {_FORMAT}, which this version of llmprune writes",
            fix="resume with the version that started the run, or start again with --overwrite",
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
