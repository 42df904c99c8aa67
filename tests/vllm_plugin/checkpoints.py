"""The bundled model, pruned by magnitude, dense and packed, for whole engines."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from llmprune.patterns import parse
from llmprune.storage.formats import quantise
from llmprune.storage.formats.int8 import Int8BitmaskLayout
from llmprune.storage.hub import resolve_model
from llmprune.storage.packed_config import pack_matrices, with_packing_record

# What is packed: part of a matrix's name -> its pattern.
PATTERNS: dict[str, dict[str, str]] = {
    "dense": {},
    "nm": {"proj": "2:4"},
    "block": {"proj": "0.25@32x32"},
    "bitmask": {"proj": "0.5"},
    "mixed": {"q_proj": "2:4", "v_proj": "2:4", "gate_proj": "0.5", "up_proj": "0.25@32x32", "down_proj": "4:8"},
    "int8": {"proj": "0.5"},
}


def save(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `folder`/dense and `folder`/packed; returns both, the same for a model without packed layers."""
    source = resolve_model("testbed")
    dense, packed = folder / "dense", folder / "packed"
    shutil.copytree(source, dense, ignore=shutil.ignore_patterns("__*"))
    tensors, patterns = load_file(source / "model.safetensors"), {}
    for key, weight in tensors.items():
        pattern = next((parse(text) for part, text in PATTERNS[name].items() if f"{part}.weight" in key), None)
        if pattern is not None:
            patterns[key.removesuffix(".weight")] = pattern
            kept = weight * pattern.compared("row").mask(weight.float().abs())
            tensors[key] = quantise(kept) if name == "int8" else kept
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    if not patterns:
        return dense, dense
    shutil.copytree(dense, packed)
    parts, layouts = pack_matrices(tensors, patterns, "auto")
    if name == "int8":
        for layer in patterns:
            layouts[layer] = Int8BitmaskLayout.fit(tensors[f"{layer}.weight"], patterns[layer])
            packed_weight = layouts[layer].pack(tensors[f"{layer}.weight"])
            parts |= {f"{layer}.{suffix}": tensor for suffix, tensor in packed_weight.items()}
    save_file(parts, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(with_packing_record(config, layouts)))
    return dense, packed
