"""Bytes of a checkpoint: dense, pruned and packed, pruned and archived. The third stage of Deep Compression, lossless.

    python -m llmprune.eval.bench.archive testbed /path/to/SmolLM2-135M --json results/archive-cpu.json

Pruned by magnitude: the pattern decides about the bytes, and the method that chose the zeros hardly does. Every archive
is extracted again and compared with the files. "matrices" are the pruned ones alone; the checkpoint has embeddings and
norms as well. The MB/s are of one run, of dense bytes per second of `archive` and `extract`.
"""

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.linear_weights import linear_weights
from llmprune.patterns import parse
from llmprune.pruning.packing import pack
from llmprune.storage.archives.extracting import extract
from llmprune.storage.archives.writing import archive
from llmprune.storage.files import file_digest, read_index, weight_files, write_json, write_shard
from llmprune.storage.hub import resolve_model

PATTERNS = ("dense", "0.5", "2:4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write JSON."""
    args = _parse(arguments)
    rows = []
    for model in args.models:
        source = resolve_model(model)
        name = Path(model).name
        for pattern in args.patterns:
            with tempfile.TemporaryDirectory(prefix="llmprune-") as work:
                rows.append({"model": name, "pattern": pattern, **measure(source, pattern, Path(work))})
            print(_line(rows[-1]), flush=True)
    if args.json:
        header = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
        write_json(args.json, [{**row, **header} for row in rows])


def measure(source: Path, pattern: str, work: Path) -> dict[str, Any]:
    """Sizes of the tensors of a model pruned to a pattern, in bytes, and the ratios of the matrices alone.

    Args:
        source: a dense checkpoint folder.
        pattern: a pattern, or "dense".
        work: an empty folder.
    """
    pruned = work / "pruned"
    shutil.copytree(source, pruned)
    matrices = set(linear_weights(CheckpointSource(source)))
    if pattern != "dense":
        prune_by_magnitude(pruned, pattern)
    dense, coded, rates = _archived(pruned)
    figures = {"dense_bytes": dense, "archived_bytes": coded, **rates}
    only = _archived(_only(pruned, matrices, work / "matrices"))
    figures["archived_matrices"] = only[1] / only[0]
    if pattern != "dense":
        report = pack(pruned, work / "packed")
        figures |= {"packed_bytes": report.packed_checkpoint_bytes, "packed_matrices": report.ratio}
        figures["archived_packed_bytes"] = _archived(work / "packed")[1]
    return figures


def prune_by_magnitude(folder: Path, pattern: str) -> None:
    """Prune the linear layers of a dense checkpoint in place."""
    matrices = linear_weights(CheckpointSource(folder)).keys()
    for file in weight_files(folder):
        tensors = {stored.key: stored[...] for stored in read_index(folder).values() if stored.file == file}
        for key in tensors.keys() & matrices:
            tensors[key][~parse(pattern).compared("row").mask(tensors[key].float().abs())] = 0
        write_shard(file, tensors)


def _only(folder: Path, matrices: set[str], target: Path) -> Path:
    """A checkpoint of the matrices alone."""
    target.mkdir()
    shutil.copyfile(folder / "config.json", target / "config.json")
    stored = read_index(folder)
    write_shard(target / "model.safetensors", {key: stored[key][...] for key in stored if key in matrices})
    return target


def _archived(folder: Path) -> tuple[int, int, dict[str, float]]:
    """Dense bytes of the tensors, bytes of the weight files in the archive, and MB/s there and back."""
    times = [time.perf_counter()]
    report = archive(folder)
    times.append(time.perf_counter())
    again = extract(report.archive, folder.with_name(f"{folder.name}-again")).folder
    times.append(time.perf_counter())
    for row in report.rows:
        if file_digest(folder / row.file) != file_digest(again / row.file):
            raise SystemExit(f"{row.file} of {folder} came back changed")
    coded = sum(row.coded_bytes for row in report.rows if row.file.endswith(".safetensors"))
    forth, back = (report.dense_bytes / 1e6 / (end - start) for start, end in itertools.pairwise(times))
    return report.dense_bytes, coded, {"archive_mb_per_second": forth, "extract_mb_per_second": back}


def _line(row: Mapping[str, Any]) -> str:
    shares = {
        name: row[f"{name}_bytes"] / row["dense_bytes"]
        for name in ("packed", "archived", "archived_packed")
        if f"{name}_bytes" in row
    }
    shown = "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
    matrices = f"matrices {row['archived_matrices']:.3f}"
    speed = f"{row['archive_mb_per_second']:.0f} and {row['extract_mb_per_second']:.0f} MB/s"
    return f"{row['model']:16} {row['pattern']:6} {row['dense_bytes'] / 1e6:8.1f} MB  {shown}  {matrices}  {speed}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="hub ids, folders or testbed")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
