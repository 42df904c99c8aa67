"""bench.json: what was measured for a checkpoint, beside its weights.

It holds {"format": 2, "devices": {...}}: the latest result of each device under its name, as `bench` returns it.
"""

from pathlib import Path
from typing import Any

from llmprune.checkpoint import read_json, write_json
from llmprune.errors import CheckpointError

BENCH_NAME = "bench.json"

_FORMAT = 2


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read what was measured: device -> result; empty if there is no such file.

    Raises:
        CheckpointError: the file is damaged, or of another version.
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
            f"{path} is no result of `llmprune bench` that this version reads",
            expected=f"format {_FORMAT} with the results of each device",
            fix="delete the file and run `llmprune bench` again",
        )
    return dict(devices)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Add one device's result to the file, atomically; an older one of the same device is replaced.

    Args:
        path: of the file.
        result: with the device's name as "device".

    Raises:
        CheckpointError: the file is damaged, or cannot be written.
    """
    write_json(path, {"format": _FORMAT, "devices": {**read_results(path), result["device"]: result}})


def gains(result: dict[str, Any], name: str, layout: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """What was measured for one layer: (tokens, times as fast as dense) in ascending order; empty if nothing was.

    Args:
        result: of one device.
        name: of the layer.
        layout: as config.json describes it; a measurement of another one does not count.
    """
    for product in result.get("products", ()):
        if product["layouts"].get(name) == layout:
            measured = ((row["tokens"], row["ratio"]) for row in product["comparisons"] if "ratio" in row)
            return tuple(sorted(measured))
    return ()
