"""The bundled model, pruned by magnitude, dense and packed, for whole engines."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from llmprune.patterns import parse
from llmprune.storage.formats import Layout, quantise
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
    "tied": {"proj": "2:4"},  # the LM head is the embedding
}


def save(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `folder`/dense and `folder`/packed; returns both, the same for a model without packed layers."""
    source = resolve_model("testbed")
    dense, packed = folder / "dense", folder / "packed"
    shutil.copytree(source, dense, ignore=shutil.ignore_patterns("__*"))
    tensors, patterns = load_file(source / "model.safetensors"), {}
    if name == "tied":
        del tensors["lm_head.weight"]
        config = json.loads((dense / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
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


def save_experts(folder: Path) -> tuple[Path, Path]:
    """Write a random Mixtral with 2:4 attention and dense experts, with the bundled model's tokenizer; see `save`."""
    source = resolve_model("testbed")
    dense, packed = folder / "dense", folder / "packed"
    shutil.copytree(source, dense, ignore=shutil.ignore_patterns("__*", "*.safetensors"))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=AutoConfig.from_pretrained(source).vocab_size, hidden_size=128, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4,
        num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(dense)
    tensors = load_file(dense / "model.safetensors")
    names = [key.removesuffix(".weight") for key in tensors if "self_attn" in key]
    for name in names:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = weight * parse("2:4").compared("row").mask(weight.abs())
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(dense, packed)
    parts, layouts = pack_matrices(tensors, dict.fromkeys(names, parse("2:4")), "auto")
    save_file(parts, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(
        json.dumps(with_packing_record(json.loads((dense / "config.json").read_text()), layouts))
    )
    return dense, packed


# What is left of some decoder layers of the bundled model: heads of 32, channels of the MLP, or whole blocks.
UNEVEN: dict[str, dict[str, dict[str, object]]] = {
    "sizes": {"1": {"num_attention_heads": 6, "num_key_value_heads": 3}, "5": {"intermediate_size": 512}},
    "blocks": {"2": {"removed_blocks": {"self_attn": 2}}, "6": {"removed_blocks": {"mlp": 1}}},
}
EVEN = {
    str(layer): {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512} for layer in range(8)
}


def save_cut(folder: Path, sizes: dict[str, dict[str, object]], pattern: str | None = None) -> Path:
    """Write the bundled model with the first heads and channels of some layers, or without blocks, as runs write it."""
    source = resolve_model("testbed")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__*"))
    tensors = load_file(source / "model.safetensors")
    for layer, values in sizes.items():
        _cut_layer(tensors, f"model.layers.{layer}.", values)
    config = json.loads((folder / "config.json").read_text())
    if sizes is EVEN:
        config |= EVEN["0"]
    else:
        for name in {name for values in sizes.values() for name in values}:
            config.setdefault(name, {})
        config |= {"per_layer_config": sizes, "allow_global_per_layer_attribute_access": True}
    layouts: dict[str, Layout] = {}
    if pattern:
        names = [key.removesuffix(".weight") for key in tensors if key.endswith("proj.weight")]
        for name in names:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = weight * parse(pattern).compared("row").mask(weight.float().abs())
        tensors, layouts = pack_matrices(tensors, dict.fromkeys(names, parse(pattern)), "auto")
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(with_packing_record(config, layouts)))
    return folder


def _cut_layer(tensors: dict[str, Tensor], prefix: str, values: dict[str, object]) -> None:
    for block in values.get("removed_blocks", ()):  # type: ignore[attr-defined]
        for key in [key for key in tensors if key.startswith(f"{prefix}{block}.")]:
            del tensors[key]
    rows = {"q_proj": 32 * values.get("num_attention_heads", 8), "gate_proj": values.get("intermediate_size", 704)}  # type: ignore[operator]
    rows |= {"k_proj": 32 * values.get("num_key_value_heads", 4), "up_proj": rows["gate_proj"]}  # type: ignore[operator]
    rows["v_proj"] = rows["k_proj"]
    columns = {"o_proj": rows["q_proj"], "down_proj": rows["gate_proj"]}
    for key in [key for key in tensors if key.startswith(prefix) and "proj" in key]:
        name = key.split(".")[-2]
        tensors[key] = tensors[key][: rows.get(name), : columns.get(name)]
