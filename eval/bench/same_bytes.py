"""Check whether two checkouts of llmprune prune to byte-identical checkpoints.

    make .venv/ready                                   # in each of the two checkouts
    python eval/bench/same_bytes.py ../before . --json out/same-bytes.json

Each recipe is run in each checkout's own environment, on one thread, with the same text. Checkpoint files must be
byte-identical; report.json and the manifest must be equal apart from times, memory, versions and the wording of
descriptions; README.md and report.html, which may be worded differently, are listed but do not count.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

# The bundled recipes, and one that packs what it prunes.
RECIPES: dict[str, tuple[str, ...]] = {
    "sparsegpt-2of4": (),
    "wanda-50": (),
    "heads-ffn-25": (),
    "budget-25": (),
    "width-25": (),
    "depth-25": (),
    "packed-nm": ("format=nm",),
}
BASES = {"packed-nm": "sparsegpt-2of4"}
SAMPLES, LENGTH, HELD_BACK = 12, 128, 2
PAGES = {"README.md", "report.html"}
RECORDS = {"report.json", ".llmprune.json", "recipe.yaml"}
# Times, sizes of the process, and what identifies the code.
PASSING = {
    "description", "device", "finished", "measured_bytes", "baseline_bytes", "predicted_bytes", "peak_bytes", "seconds",
    "speed", "version",
}  # fmt: skip


def run(checkout: Path, recipe: str, model: Path, text: Path, output: Path) -> None:
    """Prune a model by a recipe, with the code of a checkout."""
    settings = [
        f"calibration.source={text}", f"calibration.samples={SAMPLES}", f"calibration.length={LENGTH}",
        f"held_back={HELD_BACK}", f"evaluation.source={text}", "evaluation.samples=4", f"evaluation.length={LENGTH}",
        "device=cpu", *RECIPES[recipe],
    ]  # fmt: skip
    command = [checkout / ".venv" / "bin" / "llmprune", "prune", str(model), "--recipe", BASES.get(recipe, recipe)]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, "--output", output, "--quiet"], check=True, cwd=checkout, env=environment, stdout=subprocess.DEVNULL
    )


def digests(folder: Path) -> dict[str, str]:
    """Every file of an output folder -> sha256 of the content that must be equal."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(_content(file)).hexdigest() for file in files}


def compare(before: Path, after: Path) -> dict[str, list[str]]:
    """Names of the files that are equal, differ, are pages that differ, or are in only one of two folders."""
    one, other = digests(before), digests(after)
    both = sorted(one.keys() & other.keys())
    return {
        "equal": [name for name in both if one[name] == other[name]],
        "different": [name for name in both if one[name] != other[name] and name not in PAGES],
        "pages": [name for name in both if one[name] != other[name] and name in PAGES],
        "alone": sorted(one.keys() ^ other.keys()),
    }


def _content(file: Path) -> bytes:
    if file.name not in RECORDS:
        return file.read_bytes()
    # JSON is YAML.
    return json.dumps(_lasting(yaml.safe_load(file.read_text("utf-8"))), sort_keys=True).encode()


def _lasting(value: Any) -> Any:
    """A record without the values that change from run to run."""
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in PASSING}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    """Run the recipes in both checkouts, and print what differs; the exit code is 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with its .venv")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument(
        "--text", type=Path, help="text for both, longer than 3,000 tokens (default: LICENSE of the first)"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=Path("out/same-bytes"), help="folder of the runs; replaced")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    before, after = (folder.resolve() for folder in (arguments.before, arguments.after))
    text = _as_text(arguments.text or before / "LICENSE", arguments.output.resolve())
    result = {}
    for recipe in arguments.recipes:
        folders = [arguments.output.resolve() / recipe / name for name in ("before", "after")]
        for checkout, folder in zip((before, after), folders, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            # One path for both: config.json names it.
            run(checkout, recipe, before / "eval" / "testbed", text, folder)
        result[recipe] = compare(*folders)
        found = {kind: names for kind, names in result[recipe].items() if kind != "equal" and names}
        print(f"{recipe}: {len(result[recipe]['equal'])} files are equal", *(f"{k}: {n}" for k, n in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if any(found["different"] or found["alone"] for found in result.values()):
        raise SystemExit("the two checkouts produce different checkpoints")


def _as_text(file: Path, output: Path) -> Path:
    """A copy of the text with a suffix that both checkouts read in the same way."""
    output.mkdir(parents=True, exist_ok=True)
    suffix = file.suffix if file.suffix in (".txt", ".jsonl", ".parquet") else ".txt"
    return Path(shutil.copyfile(file, output / f"text{suffix}"))


if __name__ == "__main__":
    main()
