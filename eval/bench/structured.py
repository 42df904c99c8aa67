"""The quality loss and speed-up of structured pruning; every part writes a JSON file.

    python -m llmprune.eval.bench.structured quality --text FOLDER --json FILE
    python -m llmprune.eval.bench.structured budget --text FOLDER --json FILE
    python -m llmprune.eval.bench.structured depth --text FOLDER --json FILE
    python -m llmprune.eval.bench.structured matched --text FOLDER --json FILE
    python -m llmprune.eval.bench.structured speed --json FILE
    python -m llmprune.eval.bench.structured solver --json FILE

| part | what |
|---|---|
| quality | every score of heads and FFN channels, with and without a refit |
| budget | one budget for all layers, compared with every uniform choice of the same number of parameters |
| depth | layers, attention and MLP blocks, hidden channels |
| matched | what block matching and a linear map make up for |
| speed | a random Llama without half of its channels and heads: prefill and decode, alternating with the dense one |
| solver | exact group removal at 2816 x 1024: seconds, and FLOP/s by the documented operation count |

Protocol of the first four: weights and activations in float32; calibration on the first 128 packed sequences of 256
tokens of calibration.jsonl, with 8 more for validation; perplexity on the first 400 packed sequences of 256 tokens of
heldout.jsonl, each token predicted from its own sequence, and KL divergence as the mean KL(dense || pruned) on the
same, in nats/token. FFN widths are not aligned. There is no recovery training. `matched` also has rows with more
calibration text.

The file is written after every row; rows of the first four parts that it already has are not run again. The figures in
LOG.md are from results/structured-PART-testbed-cpu.json, those of the last two from results/structured-PART-cpu.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmprune.devices import describe_device
from llmprune.eval.bench.structured_plan import Row, budget_rows, depth_rows, matched_rows, quality_rows
from llmprune.eval.bench.structured_speed import SOLVER_COLUMNS, SPEED_COLUMNS, solver_rows, speed_rows
from llmprune.measuring.bench.machine import commit
from llmprune.measuring.perplexity import compare_perplexity, run_stream
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.skeleton import quiet_transformers
from llmprune.progress import ignore
from llmprune.pruning.context import versions
from llmprune.pruning.pipeline import prune
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model
from llmprune.storage.report import Report
from llmprune.stream.stream import StreamSettings
from llmprune.text.loading import load_texts, load_tokenizer
from llmprune.text.tokens import TextSpec

CPU = torch.device("cpu")
PLANS: dict[str, Callable[[CheckpointSource], list[Row]]] = {
    "quality": quality_rows,
    "budget": budget_rows,
    "depth": depth_rows,
    "matched": matched_rows,
}
# What pruning takes, without texts and perplexities.
STAGES = ("load", "forward", "gram", "solve", "match", "write")
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the perplexities are measured.

    Attributes:
        samples: calibration sequences.
        held_back: validation sequences, for the output errors.
        chunks: sequences of the held-out text.
        length: sequence length of both texts.
        batch_size: sequences per forward pass.
    """

    samples: int = 128
    held_back: int = 8
    chunks: int = 400
    length: int = 256
    batch_size: int = 16


class Bench:
    """One model and one pair of texts; the dense model is run on the held-out text once.

    Args:
        model: a checkpoint or "testbed"; its weights are converted to float32.
        text: folder with calibration.jsonl and heldout.jsonl, each with a column `text`.
        work: an empty folder.
        protocol: how the perplexities are measured.

    Attributes:
        source: the dense model.
    """

    def __init__(self, model: str, text: Path, work: Path, protocol: Protocol | None = None) -> None:
        self._text, self._protocol = text, protocol or Protocol()
        self._folder, self._output = work / "dense", work / "pruned"
        folder = resolve_model(model)
        with quiet_transformers():
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False).save_pretrained(
                self._folder
            )
        tokenizer: Any = load_tokenizer(folder)
        tokenizer.save_pretrained(self._folder)
        self.source = CheckpointSource(self._folder)
        self._settings = StreamSettings(batch_size=self._protocol.batch_size)
        chunks = self._spec("heldout", self._protocol.chunks)
        self._tokens = load_texts({"heldout": chunks}, self.source, tokenizer, CPU)["heldout"]
        self._dense = run_stream(self.source, self._tokens.ids, self._settings, ignore, "dense")

    def measure(self, row: Row) -> Figures:
        """Prune by one row and compare the result with the dense model."""
        calibration = self._spec("calibration", row.samples or self._protocol.samples)
        fitted = row.reconstruct or {}
        recipe = {
            "structures": row.structures,
            "reconstruct": row.reconstruct,
            "calibration": asdict(calibration),
            "evaluation": None,
            "held_back": self._protocol.held_back,
            # A step of training takes whole batches.
            "batch_size": min(self._protocol.batch_size, fitted.get("sequences", self._protocol.batch_size)),
            "device": "cpu",
        }
        report = prune(str(self._folder), recipe, self._output, overwrite=True)
        pruned = run_stream(CheckpointSource(self._output), self._tokens.ids, self._settings, ignore, "pruned")
        found = compare_perplexity(self._dense, pruned, self._tokens).to_dict()
        extent, evidence = report.header["extent"], report.header["decisions"]["evidence"]
        return {
            "removed": row.removed,
            "label": row.label,
            "dense_perplexity": found["dense"]["perplexity"],
            "perplexity": found["pruned"]["perplexity"],
            "kl_divergence": found["kl_divergence"],
            "predicted_divergence": evidence["budget"]["error"] if "budget" in evidence else None,
            "agreement": found["agreement"],
            "error": report.mean_error,
            "parameters": extent["pruned"]["parameters"] / extent["dense"]["parameters"],
            "flops": extent["pruned"]["flops_per_token"] / extent["dense"]["flops_per_token"],
            "kept": _kept(report) if "budget" in row.structures else None,
            "structures": row.structures,
            "reconstruct": row.reconstruct,
            "samples": calibration.samples,
            "seconds": sum(report.header["seconds"].get(stage, 0.0) for stage in STAGES),
            "matches": [[match.layer, match.target, match.before, match.after] for match in report.matches],
            "versions": versions(),
            "device": describe_device(CPU),
        }

    def _spec(self, name: str, samples: int) -> TextSpec:
        # As the figures of this bench have always been measured: BOS in front of documents, not of sequences.
        source, length = str(self._text / f"{name}.jsonl"), self._protocol.length
        return TextSpec(source, samples=samples, length=length, order="text", layout="pack-bare")


def perplexity_rows(
    bench: Bench, rows: Sequence[Row], path: Path, code: str | None, only: Sequence[str] = ("*",)
) -> list[Figures]:
    """Measure the rows that a file does not have yet, and write it after each of them.

    Args:
        bench: the model and the texts.
        rows: of one part.
        path: of the file; its rows are kept, except that those whose recipe has changed are measured again.
        code: the commit that is measured.
        only: shell globs over the rows' names.

    Returns:
        All rows of the file.
    """
    known: dict[str, Figures] = {_name(row): row for row in _read(path)}
    wanted = [row for row in rows if any(fnmatchcase(row.name, glob) for glob in only)]
    for number, row in enumerate(wanted):
        last = known.get(row.name, {})
        if last and all(last.get(key) == getattr(row, key) for key in ("structures", "reconstruct")):
            continue
        known[row.name] = bench.measure(row) | {"commit": code}
        order = [row.name for row in rows]
        write_json(path, sorted(known.values(), key=lambda row: _place(order, _name(row))))
        print(f"[{number + 1}/{len(wanted)}] {row.name}: {_rounded(known[row.name]['perplexity'])}", flush=True)
    return _read(path)


def perplexity_table(rows: Sequence[Figures]) -> str:
    """Tabulate perplexities (and KL divergences): a row per method, a column per amount removed."""
    columns, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("removed", "label"))
    cells = {(row["label"], row["removed"]): _cell(row) for row in rows}
    head = f"perplexity (divergence), dense {rows[0]['dense_perplexity']:.2f}"
    return markdown([head, *columns], ([label, *(cells.get((label, c), "") for c in columns)] for label in labels))


def figures_table(rows: Sequence[Figures], columns: Mapping[str, str]) -> str:
    """Tabulate the figures of the other parts, one row each.

    Args:
        rows: as in the file.
        columns: heading -> format string for a row.
    """
    return markdown(list(columns), ([form.format(**row) for form in columns.values()] for row in rows))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, write its file, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PLANS, "speed", "solver"])
    parser.add_argument("--model", default="testbed", help="for quality, budget and depth")
    parser.add_argument("--text", type=Path, help="folder with calibration.jsonl and heldout.jsonl, for the same parts")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="names of rows, for the same parts")
    parser.add_argument("--json", type=Path, required=True, help="the figures; rows that it has are not run again")
    parser.add_argument("--table", type=Path, help="where to write them as a Markdown table")
    parser.add_argument("--commit", default=commit(), help="of the code; default: from git")
    args = parser.parse_args(arguments)
    if args.part in PLANS:
        if args.text is None:
            parser.error(f"{args.part} needs --text")
        with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as work:
            bench = Bench(args.model, args.text, Path(work))
            rows = perplexity_rows(bench, PLANS[args.part](bench.source), args.json, args.commit, args.rows)
        table = perplexity_table(rows)
    else:
        measure, columns = (speed_rows, SPEED_COLUMNS) if args.part == "speed" else (solver_rows, SOLVER_COLUMNS)
        rows = []
        for row in measure():
            rows.append(row | {"versions": versions(), "commit": args.commit})
            write_json(args.json, rows)
        table = figures_table(rows, columns)
    print(table)
    if args.table:
        args.table.write_text(table, encoding="utf-8")


def _kept(report: Report) -> dict[str, list[int]]:
    """The kept heads and channels, layer by layer."""
    kinds = dict.fromkeys(row.kind for row in report.structures)
    return {kind: [row.kept for row in report.structures if row.kind == kind] for kind in kinds}


def _read(path: Path) -> list[Figures]:
    rows: list[Figures] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def _name(row: Figures) -> str:
    return Row(row["removed"], row["label"], {}).name


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _cell(row: Figures) -> str:
    return f"{_rounded(row['perplexity'])} ({_rounded(row['kl_divergence'], 3)})"


def _rounded(value: float | None, places: int = 2) -> str:
    return "infinite" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    main()
