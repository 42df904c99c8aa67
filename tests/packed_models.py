"""Packed checkpoints, written by hand: a tiny model, pruned by magnitude, with its linear layers packed."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, save

from llmprune.patterns import Pattern, parse
from llmprune.storage.files import read_index
from llmprune.storage.formats import fit_layout, quantise
from llmprune.storage.packed_config import packing_record


def save_packed(
    folder: Path, layout: str = "nm", pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, **config: Any
) -> Path:
    """Save a tiny Llama as `folder`/dense, pruned, and as `folder`/packed; returns the folder."""
    dense, packed = folder / "dense", folder / "packed"
    save(build("llama", dtype, **config), dense)
    prune_by_magnitude(dense, parse(pattern))
    if layout.startswith("int8"):
        content = load_file(dense / "model.safetensors")
        quantised = {f"{name}.weight": quantise(content[f"{name}.weight"]) for name in linear_layers(content)}
        save_file(content | quantised, dense / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(dense, packed)
    tensors = {key: stored[...] for key, stored in read_index(dense).items()}
    layouts = {}
    for name in linear_layers(tensors):
        weight = tensors.pop(f"{name}.weight")
        layouts[name] = fit_layout(layout, weight, parse(pattern))
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in layouts[name].pack(weight).items()}
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    description = json.loads((dense / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**description, **packing_record(layouts)}))
    return folder


def prune_by_magnitude(folder: Path, pattern: Pattern) -> None:
    """Prune the linear layers of a checkpoint of one file."""
    tensors = {key: stored[...] for key, stored in read_index(folder).items()}
    for name in linear_layers(tensors):
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = weight * pattern.compared("row").mask(weight.float().abs())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prune_files(folder: Path, patterns: dict[str, str], zero: float = 0.0) -> None:
    """Make zeros in the weights whose key has one of these names in it, of a checkpoint of any number of files."""
    for file in folder.glob("*.safetensors"):
        content = load_file(file)
        for key, weight in content.items():
            pattern = next((parse(patterns[name]) for name in patterns if name in key and weight.dim() == 2), None)
            if pattern is not None:
                weight[~pattern.compared("row").mask(weight.float().abs())] = zero
        save_file(content, file, metadata={"format": "pt"})


def linear_layers(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The linear layers inside decoder layers."""
    return [key.removesuffix(".weight") for key, tensor in tensors.items() if key.endswith("proj.weight")]
