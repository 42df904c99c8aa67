"""Whether two checkouts of llmprune prune alike, to the byte.

    make .venv/ready                                   # in each of the two checkouts
    python eval/bench/same_bytes.py ../before . --json out/same-bytes.json

Each recipe is run by each checkout's own environment, on one thread, with the same text. Checkpoint files must be equal
to the byte; report.json and the manifest without times, memory, versions and the wording of descriptions; the pages for
people, README.md and report.html, may say the same in other words, so they are named and not judged.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

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
RECORDS = {"report.json", ".llmprune.json"}
# Times, sizes of this process, and what names the code that ran.
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
    """Every file of an output folder -> sha256 of what must be equal."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(_content(file)).hexdigest() for file in files}


def compare(before: Path, after: Path) -> dict[str, list[str]]:
    """Names of the files that are equal, differ, are pages that differ, or are in one of two folders only."""
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
    return json.dumps(_lasting(json.loads(file.read_text("utf-8"))), sort_keys=True).encode()


def _lasting(value: Any) -> Any:
    """A record without what passes."""
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in PASSING}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    """Run the recipes in both checkouts, and say what differs; the exit code is 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with its .venv")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument(
        "--text", type=Path, help="text for both, longer than 3,000 tokens (default: LICENSE of the first)"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=Path("out/same-bytes"), help="where the runs go; replaced")
    parser.add_argument("--json", type=Path, help="where the result goes")
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
        raise SystemExit("the two do not prune alike")


def _as_text(file: Path, output: Path) -> Path:
    """The text under a name that both checkouts read the same way."""
    output.mkdir(parents=True, exist_ok=True)
    suffix = file.suffix if file.suffix in (".txt", ".jsonl", ".parquet") else ".txt"
    return Path(shutil.copyfile(file, output / f"text{suffix}"))


if __name__ == "__main__":
    main()
