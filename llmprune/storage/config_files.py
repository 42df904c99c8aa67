"""config.json as it is published: as transformers writes it, and without the paths of this machine."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import write_json

_ORIGIN = "_name_or_path"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    write_json(folder / CONFIG_NAME, publishable(config))


def publishable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without where it was loaded from, unless that is a hub id; of nested configs too.

    JSON has no infinities and no NaN: like transformers, it has {"__float__": "Infinity"} instead.
    """
    kept = {key: value for key, value in config.items() if key != _ORIGIN or _HUB_ID.fullmatch(str(value))}
    return {key: _publishable(value) for key, value in kept.items()}


def _publishable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return publishable(value)
    if isinstance(value, list | tuple):
        return [_publishable(inner) for inner in value]
    return value
