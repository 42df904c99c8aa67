"""The result of a run in the making: a shard per decoder layer, committed atomically, and a manifest to resume from.

All of it is made in a folder inside the output folder; `close` puts it in the place of an earlier result.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import CheckpointError
from llmprune.storage.companions import CONFIG_NAME, copy_companions
from llmprune.storage.config_files import publishable, write_config
from llmprune.storage.copying import copy_tensors
from llmprune.storage.exchange import MANIFEST_FORMAT, begin, complete_exchange, exchange
from llmprune.storage.files import INDEX_NAME, Stored, file_digest, read_json, write_json, write_shard
from llmprune.storage.folders import MANIFEST_NAME, STAGING_NAME, require_empty, writing_to
from llmprune.storage.formats import Layout, layout_from_dict
from llmprune.storage.manifest import CommittedLayer, Manifest, changes, manifest_of, read_manifest
from llmprune.storage.packed_config import with_packing_record
from llmprune.storage.report import MatchRow, MatrixRow, StructureRow
from llmprune.storage.source_watch import SourceWatch
from llmprune.units import quantity

# The files that make the shards a model.
_DESCRIBING = (CONFIG_NAME, INDEX_NAME)


@dataclass
class OutputFolder:
    """A checkpoint in the making.

    Attributes:
        output: the output folder.
        path: where the files are: a folder inside it until the result is whole, then the output folder itself.
        keys: what must be unchanged for a run to continue: name -> value.
        layers: decoder layer name -> the committed layer.
        ends: {"shard", "sha256"} of the tensors outside the decoder layers, once they are written.
        described: sha256 of the shards that were copied as they are and, once it is complete, of the files that make
            the shards a model (config.json and the index).
        complete: whether the run has nothing left to do.
        decisions: the decisions about structures that were made before the first layer; None if there were none.
        source: notices when the files of the dense checkpoint change; None: nobody does.
        reevaluated: what has changed since the interrupted or finished run that only its evaluation depends on.
        processes: how many share the run.
        follows: another process writes; here the folder is only read.
        told: sentences about a run that is continued.
        notes: sentences for the report, about how it was continued.
    """

    output: Path
    path: Path
    keys: dict[str, Any]
    layers: dict[str, CommittedLayer] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    described: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    decisions: dict[str, Any] | None = None
    source: SourceWatch | None = None
    reevaluated: list[str] = field(default_factory=list)
    processes: int = 1
    follows: bool = False
    told: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        output: Path,
        keys: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        source: SourceWatch | None = None,
        processes: int = 1,
    ) -> "OutputFolder":
        """Start a folder, or continue one.

        Args:
            output: created if it does not exist.
            keys: what identifies the run, JSON-ready.
            resume: continue after the layers that an interrupted run with the same keys has committed; the evaluation
                may have changed.
            overwrite: an earlier checkpoint in the folder will be replaced, once the new one is whole.
            source: nothing is recorded that may have been made from changed files.
            processes: how many share the run; another number than before is told, since sums are rounded otherwise.

        Raises:
            ResumeError: the folder is not empty and neither flag is set, its keys differ, or its manifest is damaged.
            CheckpointError: it cannot be written.
        """
        require_empty(output, resume=resume, overwrite=overwrite)
        complete_exchange(output)
        folder = cls(output, output / STAGING_NAME, json.loads(json.dumps(keys)), source=source, processes=processes)
        found = manifest_of(output) if resume else None
        if found is not None:
            folder._continue(found)
            return folder
        begin(output)
        folder._write_manifest()
        return folder

    def followed(self) -> "OutputFolder":
        """The same folder for another process, which reads what this one writes."""
        return replace(self, source=None, follows=True)

    def follow(self, layer: str, committed: CommittedLayer) -> None:
        """Take note of a layer that another process has committed."""
        self.layers[layer] = committed

    def decide(self, decisions: Mapping[str, Any]) -> None:
        """Record the decisions about structures, so that a resumed run makes the same ones."""
        self._require_unchanged()
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
        matches: Sequence[MatchRow] = (),
    ) -> Path:
        """Write one decoder layer's shard and record it; after this it survives any crash.

        Args:
            layer: dotted name of the layer.
            shard: name of its file.
            tensors: the file's content.
            rows: the report's rows for its matrices.
            layouts: of its packed matrices, by name.
            structures: the report's rows for the structures removed from it.
            matches: the report's row, if it was fitted as a whole.

        Raises:
            CheckpointError: the shard cannot be written, or the source has changed.
        """
        self._require_unchanged()
        digest = write_shard(self.path / shard, tensors)
        packed = {name: layout.to_dict() for name, layout in layouts.items()}
        self.layers[layer] = CommittedLayer(shard, digest, tuple(rows), packed, tuple(structures), tuple(matches))
        self._write_manifest()
        return self.path / shard

    @staticmethod
    def layouts_of(layer: CommittedLayer) -> dict[str, Layout]:
        """The layouts of a committed layer's packed matrices."""
        return {name: layout_from_dict(row) for name, row in layer.layouts.items()}

    def commit_ends(self, shard: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write the tensors outside the decoder layers."""
        self.ends = {"shard": shard, "sha256": write_shard(self.path / shard, tensors)}
        return self.path / shard

    def copy(self, shard: str, tensors: Sequence[Stored]) -> None:
        """Write a shard of tensors that are copied as they are."""
        self.described[shard] = copy_tensors(self.path / shard, tensors)

    def finish(
        self, source: Path, shards: Mapping[str, Sequence[Stored]], config: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Copy configuration and tokenizer files and write the index; from then on the files can be loaded.

        The source is no longer read afterwards, so this is where it is digested again.

        Args:
            source: the folder that was pruned.
            shards: shard name -> its tensors.
            config: of the pruned model; None: that of the source.

        Returns:
            A sentence about each file that was not copied.

        Raises:
            CheckpointError: a file cannot be written, or the source has changed since the run began.
        """
        self._require_unchanged(thorough=True)
        with writing_to(self.output):
            left_out = copy_companions(source, self.path)
            shutil.copyfile(source / CONFIG_NAME, self.path / CONFIG_NAME)
        self._describe(config)
        weight_map = {stored.key: shard for shard, tensors in shards.items() for stored in tensors}
        total = sum(stored.nbytes for tensors in shards.values() for stored in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.path / INDEX_NAME, index)
        return left_out

    def _require_unchanged(self, *, thorough: bool = False) -> None:
        if self.source is None:
            return
        self.source.require_unchanged()  # what was committed before a change that is seen here is sound
        if thorough:
            try:
                self.source.require_unchanged(thorough=True)
            except CheckpointError:
                # Nobody knows when this change was made, nor what has been computed from it.
                shutil.rmtree(self.path, ignore_errors=True)
                raise

    def _describe(self, config: Mapping[str, Any] | None) -> None:
        """Make config.json describe the model, and what is packed now instead of what was packed in the source."""
        copied = read_json(self.path / CONFIG_NAME)
        layouts = {name: layout for layer in self.layers.values() for name, layout in self.layouts_of(layer).items()}
        described = publishable(with_packing_record(copied if config is None else config, layouts))
        if described != copied:
            write_config(self.path, described)

    def close(self) -> None:
        """Mark the run as complete, and put its result in the place of an earlier one."""
        self.described |= {name: file_digest(self.path / name) for name in _DESCRIBING}
        self.complete = True
        self._write_manifest()
        exchange(self.output)
        self.path = self.output

    def evaluated_again(self) -> None:
        """Record the keys of a finished run whose evaluation is now another one."""
        made_by = {"keys": self.keys, "processes": self.processes}
        write_json(self.path / MANIFEST_NAME, {**read_json(self.path / MANIFEST_NAME), **made_by})

    def _continue(self, file: Path) -> None:
        """Go on from the manifest of an interrupted run, or of a finished one, which may have been damaged since."""
        manifest = read_manifest(file)
        self.reevaluated += changes(self.output, manifest, self.keys, self.processes)
        if self.reevaluated:
            self.told.append(f"evaluated again, not pruned again: {'; '.join(self.reevaluated)}")
        self.notes += manifest.notes
        for name, layer in manifest.layers.items():
            # A missing or damaged shard is written again, and so is every layer after it.
            if self._found(layer) is None:
                break
            self.layers[name] = layer
        self.decisions = manifest.decisions
        finished = file.parent == self.output
        self.complete = finished and manifest.complete and self._is_whole(manifest)
        if manifest.processes != self.processes and not self.complete:
            begun = quantity(manifest.processes, "process", "processes")
            self.notes.append(
                f"begun with {begun}, continued with {self.processes}: what is left may differ by rounding"
            )
            self.told.append(self.notes[-1])
        with writing_to(self.output):
            if self.complete:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path = self.output
            else:
                self._take_back(finished=finished)

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether all that a finished run has written is still there."""
        if not manifest.ends.keys() >= {"shard", "sha256"}:
            return False
        sums = {manifest.ends["shard"]: manifest.ends["sha256"], **manifest.described}
        files = [*manifest.files, *sums]
        there = len(self.layers) == len(manifest.layers) and all((self.output / name).is_file() for name in files)
        return there and all(file_digest(self.output / name) == digest for name, digest in sums.items())

    def _take_back(self, *, finished: bool) -> None:
        """Go on with the committed layers in the folder for unfinished results, even those of a finished run."""
        self.path.mkdir(exist_ok=True)
        for file in self.path.iterdir():
            # What a killed process has left; safetensors names its temporary files .tmp and six letters.
            if file.name.startswith(".tmp") or file.name.endswith(".partial"):
                file.unlink()
        self._write_manifest()
        if finished:
            # Until all shards exist again, the folder must not load.
            (self.output / INDEX_NAME).unlink(missing_ok=True)
        for layer in self.layers.values():
            shard = self._found(layer)
            if shard is not None and shard.parent != self.path:
                shard.replace(self.path / shard.name)

    def _found(self, committed: CommittedLayer) -> Path | None:
        """Where a committed shard lies intact."""
        places = (self.path / committed.shard, self.output / committed.shard)
        return next((file for file in places if file.is_file() and file_digest(file) == committed.sha256), None)

    def _write_manifest(self) -> None:
        if self.follows:
            return
        content = {
            "format": MANIFEST_FORMAT,
            "keys": self.keys,
            "complete": self.complete,
            "processes": self.processes,
            "notes": self.notes,
            "ends": self.ends,
            "described": self.described,
            "decisions": self.decisions,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }
        write_json(self.path / MANIFEST_NAME, content)


def require_resumable(output: Path, keys: Mapping[str, Any], processes: int) -> None:
    """Refuse to resume a run that has changed, as soon as some of its keys are known.

    Args:
        output: the folder.
        keys: those that are known.
        processes: how many share the run that is to continue.

    Raises:
        ResumeError: the keys differ from those of the run in the folder, or its manifest is damaged.
    """
    if (found := manifest_of(output)) is not None:
        changes(output, read_manifest(found), json.loads(json.dumps(keys)), processes)
