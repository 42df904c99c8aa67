"""Checkpoints whose decoder layers differ in size, and the logits that they must give."""

import json
from pathlib import Path
from typing import Any

import torch
from shrinking import Cuts, by_kind, masked_logits, shrunk_state, structures_of
from tiny_models import build, random_ids, save
from torch import Tensor
from transformers import PretrainedConfig

from llmprune.models.decoder import Decoder
from llmprune.models.uneven import build_decoder
from llmprune.storage.packed_config import with_packing_record
from llmprune.structures.describe.configuration import uneven_config
from llmprune.structures.find.discovery import find_structures
from llmprune.structures.remove.cuts import Cut

IDS = random_ids(2, 12)


def save_uneven(
    folder: Path, family: str = "llama", heads: bool = True, dtype: torch.dtype = torch.float32, **changes: Any
) -> Tensor:
    """Save a tiny model with a smaller first and last layer; the logits of the full-size model with zeros there."""
    model = build(family, **changes)
    found = find_structures(Decoder.find(model)) if changes else structures_of(family)
    last = len(found) - 1
    first, narrow = (by_kind(found, layer, "ffn")[0] for layer in (0, last))
    cuts: Cuts = {0: [Cut(first, (3, 5, 7, 9))], last: [Cut(narrow, tuple(range(8, narrow.groups // 2 + 4)))]}
    if heads:
        cuts[last].append(Cut(by_kind(found, last, "heads")[0], (0,)))
    config = uneven_config(model.config, cuts)
    small = build_decoder(config).model
    small.load_state_dict(shrunk_state(model, cuts), assign=True)
    small.tie_weights()
    save(small.to(dtype), folder)
    describe(folder, config)
    return masked_logits(model, cuts, IDS)


def describe(folder: Path, config: PretrainedConfig) -> None:
    """Write config.json, as the output of a run does."""
    before = json.loads((folder / "config.json").read_text())
    content = {
        **json.loads(config.to_json_string()),
        "architectures": before["architectures"],
        "dtype": before["dtype"],
    }
    (folder / "config.json").write_text(json.dumps(with_packing_record(content, {})))
