"""bench.json: the measurements of a checkpoint, stored next to its weights.

Its content is {"format": 2, "devices": {...}}: the latest result of each device by its name, as `bench` returns it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError
from llmprune.storage.files import read_json, write_json
from llmprune.units import spans

_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

BENCH_NAME = "bench.json"

_FORMAT = 2


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read the measurements: device -> result; empty if there is no such file.

    Raises:
        CheckpointError: the file is damaged, or has a different version.
    """
    if not path.exists():
        return {}
    content = read_json(path)
    devices = content.get("devices")
    if (
        content.get("format") != _FORMAT
        or not isinstance(devices, dict)
        or not all(isinstance(result, dict) for result in devices.values())
    ):
        raise CheckpointError(
            f"{path} is not a result of `llmprune bench` that this version can read",
            expected=f"format {_FORMAT} with the results of each device",
            fix="delete the file and run `llmprune bench` again",
        )
    return dict(devices)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Add one device's result to the file, atomically, replacing an older one of the same device.

    Args:
        path: of the file.
        result: with the device's name as "device".

    Raises:
        CheckpointError: the file is damaged, or cannot be written.
    """
    write_json(path, {"format": _FORMAT, "devices": {**read_results(path), result["device"]: result}})


def gains(result: dict[str, Any], name: str, layout: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """The measured speed-ups of one layer: (tokens, speed-up over dense), by ascending tokens; empty without any.

    Args:
        result: of one device.
        name: of the layer.
        layout: as config.json describes it; measurements of other layouts do not count.
    """
    for product in result.get("products", ()):
        if product["layouts"].get(name) == layout:
            measured = ((row["tokens"], row["ratio"]) for row in product["comparisons"] if "ratio" in row)
            return tuple(sorted(measured))
    return ()


def grouped(names: Sequence[str]) -> str:
    """Names grouped by layers: "model.layers.0-31: mlp.gate_proj, mlp.up_proj"."""
    places: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = split_layer(name)
        places.setdefault((before, after), []).extend([] if number is None else [number])
    layers: dict[str, list[str]] = {}
    for (before, after), numbers in places.items():
        layers.setdefault(layer_span(before, numbers), []).append(after)
    return "; ".join(
        f"{layer}: {', '.join(inside)}" if layer else ", ".join(inside) for layer, inside in layers.items()
    )


def split_layer(name: str) -> tuple[str, int | None, str]:
    """The part of a name before the layer's number, the number, and the part after it, with "*" for an expert's."""
    match = _NUMBERED.match(name)
    return (match[1], int(match[2]), _NUMBER.sub("*", match[3])) if match else ("", None, name)


def layer_span(before: str, numbers: Sequence[int]) -> str:
    """Name one layer, or several: "model.layers.0-31"."""
    return f"{before}.{spans(sorted(set(numbers)))}" if numbers else before


def tokens_a_second(row: Mapping[str, Any]) -> str:
    """The tokens/s of a batch, plus or minus half the range between the 10th and the 90th percentile of its runs."""
    step = row["later_token"]
    spread = row["tokens_per_second"] * (step["high_us"] - step["low_us"]) / (2 * step["median_us"])
    return f"{row['tokens_per_second']:,.1f} ±{spread:,.1f}"
