"""The config of a smaller model as the source's config.json with the changes that the removal made, and no others.

transformers renames keys when it reads a config (`rope_theta`, `torch_dtype`), and writes every default. An engine that
serves the original may know only the keys that are in its file.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.skeleton import read_config
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.config_files import write_config
from llmprune.storage.files import read_json

# Not part of what a model computes, or written by us beside the config.
_APART = ("_name_or_path", "transformers_version", "quantization_config", "transformers_weights")
_ABSENT = object()
# A key that is added may change what transformers derives for another.
_ATTEMPTS = 3


def patched_config(dense: CheckpointSource, config: PretrainedConfig) -> dict[str, Any]:
    """The content of config.json for a model that is smaller than that of a checkpoint.

    Args:
        dense: the checkpoint.
        config: of the smaller model.

    Returns:
        The checkpoint's config.json, changed as little as possible: transformers reads `config` from it. If no change
        of single keys achieves that, everything that `config` holds.

    Raises:
        CheckpointError: the checkpoint's config.json cannot be read.
    """
    written = read_json(dense.folder / CONFIG_NAME)
    before, after = dense.config.to_dict(), config.to_dict()
    aliases = {alias: real for part in (config, config.get_text_config()) for alias, real in part.attribute_map.items()}
    patched = _patch(written, before, after, aliases, adding=False)
    for _ in range(_ATTEMPTS):
        found = _read(patched)
        if found is not None and _comparable(found) == _comparable(config):
            return patched
        # Keys that the file leaves to transformers are added only where the smaller model needs them.
        patched = _patch(patched, before if found is None else found.to_dict(), after, aliases, adding=True)
    return after


def _patch(
    written: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    aliases: Mapping[str, str],
    *,
    adding: bool,
) -> dict[str, Any]:
    patched = dict(written)
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if old == new or key in _APART:
            continue
        name = next((alias for alias, real in aliases.items() if real == key and alias in written), key)
        name = key if key in written else name
        if new is _ABSENT:
            patched.pop(name, None)
        elif all(isinstance(value, Mapping) for value in (old, new, written.get(name))):
            patched[name] = _patch(written[name], old, new, aliases, adding=adding)
        elif adding or name in written or old is _ABSENT:
            patched[name] = new
    return patched


def _read(content: Mapping[str, Any]) -> PretrainedConfig | None:
    """What transformers makes of a file with this content; None if it is no config."""
    with tempfile.TemporaryDirectory(prefix="llmprune-config-") as folder:
        write_config(Path(folder), content)
        try:
            return read_config(Path(folder))
        except ModelError:
            return None


def _comparable(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _APART}
