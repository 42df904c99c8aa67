"""Quality and bytes after each stage: pruned, quantised, both, and coded (Deep Compression, arXiv 1510.00149).

    python -m llmprune.eval.bench.stages --calibration calibration.jsonl --heldout heldout.jsonl --json stages.json

The protocol is that of `eval.bench.quality`. Bytes are shares of the dense bytes of the pruned matrices: packed, as a
model in use needs them, and archived once packed. Weights of 4 bits are stored as 16-bit numbers, and save nothing yet.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmprune.eval.bench.quality import Protocol
from llmprune.measuring.bench.machine import commit, versions
from llmprune.pruning.pipeline import prune
from llmprune.storage.archives.writing import archive
from llmprune.storage.files import read_index, read_json, write_json, write_shard
from llmprune.storage.hub import resolve_model
from llmprune.storage.packed_config import PackedWeight, as_dense, packed_layouts

# pattern, bits
STAGES = (
    ("0.0", 16), ("0.5", 16), ("2:4", 16), ("0.7", 16), ("0.0", 8), ("0.5", 8), ("2:4", 8), ("0.0", 4), ("0.5", 4),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write JSON."""
    args = _parse(arguments)
    protocol = Protocol(args.model, args.calibration, args.heldout)
    rows = []
    for pattern, bits in STAGES:
        with tempfile.TemporaryDirectory(prefix="llmprune-") as work:
            rows.append(measure(protocol, args.method, pattern, bits, Path(work)))
        print({key: rows[-1][key] for key in ("pattern", "bits", "perplexity", "packed", "archived")}, flush=True)
    table = Table("pattern", "bits", "perplexity", "KL divergence", "packed", "archived")
    for row in rows:
        shares = ("packed", "archived")
        figures = (f"{row['perplexity']:.2f}", f"{row['kl_divergence']:.4f}", *(f"{row[key]:.3f}" for key in shares))
        table.add_row(row["pattern"], str(row["bits"]), *figures)
    Console().print(table)
    if args.json:
        write_json(args.json, [{**row, "versions": versions(), "commit": commit()} for row in rows])


def measure(protocol: Protocol, method: str, pattern: str, bits: int, work: Path) -> dict[str, Any]:
    """Prune, quantise if bits are fewer than 16, pack and archive; `work` is an empty folder."""
    quantise = None if bits == 16 else {"bits": bits, "group": 128}
    recipe = {
        **protocol.recipe(),
        "pattern": pattern,
        "method": method,
        "quantise": quantise,
        "format": "auto",
        "batch_size": 16,
    }
    report = prune(resolve_model(protocol.model), recipe, work / "pruned")
    stored = read_index(work / "pruned")
    layouts = packed_layouts(read_json(work / "pruned" / "config.json"))
    weights = [as_dense(stored, layouts)[f"{row.name}.weight"] for row in report.rows]
    parts = [part for one in weights for part in (one.parts.values() if isinstance(one, PackedWeight) else (one,))]
    only = work / "matrices"
    only.mkdir()
    write_shard(only / "model.safetensors", {part.key: part[...] for part in parts})
    write_json(only / "config.json", read_json(work / "pruned" / "config.json"))
    coded = archive(only)
    total = sum(one.nbytes for one in weights)
    evaluation = report.header["evaluation"]
    return {
        "method": method,
        "pattern": pattern,
        "bits": bits,
        **protocol.facts(),
        "dense_perplexity": evaluation["dense"]["perplexity"],
        "perplexity": evaluation["pruned"]["perplexity"],
        "kl_divergence": evaluation["kl_divergence"],
        "packed": sum(part.nbytes for part in parts) / total,
        "archived": sum(row.coded_bytes for row in coded.rows if row.file.endswith(".safetensors")) / total,
        "device": report.header["device"],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
