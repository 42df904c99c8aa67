"""What the tests of sweeps have in common: a text, a recipe and a grid, and Ctrl-C at a given step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models

from llmprune.progress import Progress

GRID = {"pattern": [0.5, "2:4"], "method": ["wanda", "magnitude"]}
NAMES = ["pattern-0.5_wanda", "pattern-0.5_magnitude", "pattern-2of4_wanda", "pattern-2of4_magnitude"]


def write_text(folder: Path) -> Path:
    """A text of 400 words."""
    file = folder / "text.txt"
    file.write_text(" ".join(f"w{number % 90 + 4}" for number in range(400)))
    return file


def on_text(text: Path) -> dict[str, Any]:
    """A recipe that measures a perplexity on a text."""
    calibration = {"source": str(text), "samples": 3, "length": 16}
    # No prompts: answering them takes longer than all the rest of such a run.
    evaluation = {"source": str(text), "samples": 3, "prompts": []}
    return tiny_models.recipe(calibration=calibration, evaluation=evaluation, method="wanda")


def states(folder: Path) -> dict[str, str]:
    """Run -> how far it got, by the record of a sweep."""
    return {row["name"]: row["state"] for row in json.loads((folder / "sweep.json").read_text())["runs"]}


def stop_at(stage: str, layer: int) -> Callable[[Progress], None]:
    """Press Ctrl-C there."""

    def watch(progress: Progress) -> None:
        if (progress.stage, progress.layer) == (stage, layer):
            raise KeyboardInterrupt

    return watch
