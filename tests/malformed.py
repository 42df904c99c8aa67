"""Malformed checkpoints: what breaks a good one, by name. A few hundred, as an attacker or a bad disk would make them.

Each `Fault` changes a copy of a tiny good checkpoint in place: "dense" (one file), "sharded" (an index), or packed as
"nm", "bitmask" or "block".
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
NEST = '{"a":' * 100_000 + "1" + "}" * 100_000
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Fault:
    """One way to break a checkpoint.

    Attributes:
        name: unique.
        base: the good checkpoint that it breaks.
        apply: changes a copy of it in place.
        typed: whether reading the weights must be refused; otherwise it may also be read rightly.
    """

    name: str
    base: str
    apply: Callable[[Path], None]
    typed: bool = True

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change JSON in place; a change that returns something replaces it."""
    content = json.loads(file.read_text())
    changed = change(content)
    file.write_text(json.dumps(content if changed is None else changed))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in a file's place."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def _renamed(file: Path, name: str) -> None:
    file.rename(file.with_name(name))


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / CONFIG, lambda config: config.update(changes))


_VALUES: dict[str, Any] = {"0": 0, "-1": -1, "text": "x", "list": [], "mapping": {}, "1.5": 1.5, "huge": 10**30}
_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "architectures", "model_type", "dtype",
    "tie_word_embeddings", "max_position_embeddings", "quantization_config", "attn_implementation",
)  # fmt: skip
# What a reader may take as it stands: it decides about no weights.
_HARMLESS = {"rms_norm_eps", "max_position_embeddings", "attn_implementation", "tie_word_embeddings", "rope_parameters",
             "architectures", "dtype", "quantization_config", "num_attention_heads"}  # fmt: skip


def _configs() -> Iterator[Fault]:
    for key in _KEYS:
        for label, value in _VALUES.items():
            yield Fault(f"config:{key}={label}", "dense", configured(**{key: value}), typed=key not in _HARMLESS)
    more: dict[str, Any] = {
        "more-layers": {"num_hidden_layers": 3}, "million-layers": {"num_hidden_layers": 1_000_000},
        "wider": {"hidden_size": 64}, "narrower": {"intermediate_size": 24}, "longer": {"vocab_size": 200},
        "other-family": {"model_type": "gpt2"}, "unknown-family": {"model_type": "nothing"},
        "encoder": {"model_type": "bert", "architectures": ["BertModel"]}, "no-family": {"model_type": None},
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "kernel-of-the-hub": {"attn_implementation": "org/kernel"},
    }  # fmt: skip
    harmless = {"kernel-of-the-hub"}
    for label, changes in more.items():
        yield Fault(f"config:{label}", "dense", configured(**changes), typed=label not in harmless)
    texts: dict[str, str | bytes] = {
        "empty": "", "no-json": "{", "list": "[]", "number": "5", "null": "null", "nested": NEST,
        "utf-16": b"\xff\xfe{",
        "control": '{"model_type": "lla\x00ma"}',
    }  # fmt: skip
    for label, text in texts.items():
        yield Fault(f"config:file-{label}", "dense", write(CONFIG, text))
    yield Fault("config:file-folder", "dense", instead(CONFIG, Path.mkdir))
    yield Fault("config:file-absent", "dense", lambda folder: (folder / CONFIG).unlink())


def reheaded(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrite the header of a safetensors file, and leave its data."""

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return apply


def _rebytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def _headers() -> Iterator[Fault]:
    lengths = {"2^63": 1 << 63, "2^64-1": (1 << 64) - 1, "beyond": 1 << 40, "0": 0, "1": 1}
    for label, length in lengths.items():
        change = _rebytes(lambda data, length=length: length.to_bytes(8, "little") + data[8:])  # type: ignore[misc]
        yield Fault(f"header:length-{label}", "dense", change)
    cuts = {"empty": 0, "4-bytes": 4, "in-header": 100, "last-byte": -1}
    for label, end in cuts.items():
        yield Fault(f"header:cut-{label}", "dense", _rebytes(lambda data, end=end: data[:end]))  # type: ignore[misc]
    yield Fault("header:trailing", "dense", _rebytes(lambda data: data + b"x"))
    key = f"{DOWN}.weight"
    entries: dict[str, Any] = {
        "dtype=unknown": {"dtype": "F7"}, "dtype=number": {"dtype": 5}, "dtype=null": {"dtype": None},
        "dtype=other": {"dtype": "F64"}, "dtype=ints": {"dtype": "I32"}, "dtype=complex": {"dtype": "C64"},
        "shape=huge": {"shape": [1 << 40, 1 << 40]}, "shape=negative": {"shape": [-1, 5]}, "shape=text": {"shape": "x"},
        "shape=flat": {"shape": [1536]}, "shape=transposed": {"shape": [48, 32]}, "shape=empty": {"shape": [0]},
        "shape=scalar": {"shape": []}, "shape=halves": {"shape": [1.5, 2]}, "shape=absent": {"shape": None},
        "offsets=reversed": {"data_offsets": [100, 0]}, "offsets=negative": {"data_offsets": [-4, 0]},
        "offsets=beyond": {"data_offsets": [0, 1 << 50]}, "offsets=text": {"data_offsets": "x"},
        "offsets=one": {"data_offsets": [0]}, "offsets=fraction": {"data_offsets": [0.5, 4.5]},
        "offsets=overlap": {"data_offsets": [0, 32 * 48 * 4]},
    }  # fmt: skip
    for label, changes in entries.items():
        change = reheaded(lambda header, changes=changes: header[key].update(changes))  # type: ignore[misc]
        yield Fault(f"header:{label}", "dense", change)
    whole: dict[str, Any] = {
        "list": lambda header: [], "entry-number": lambda header: {**header, key: 5}, "not-utf-8": lambda _: b"\xff{}",
        "entry-absent": lambda header: {name: entry for name, entry in header.items() if name != key},
        "nested": lambda _: NEST.encode(), "not-json": lambda _: b"{{{", "empty": lambda header: {},
    }  # fmt: skip
    for label, replace in whole.items():
        yield Fault(f"header:{label}", "dense", reheaded(replace))


def _indices() -> Iterator[Fault]:
    def mapped(name: Any) -> Callable[[Path], None]:
        return lambda folder: edit(folder / INDEX, lambda index: index["weight_map"].update({f"{DOWN}.weight": name}))

    names = {
        "parent": "../model.safetensors", "absolute": "/etc/passwd", "backslash": "..\\model.safetensors",
        "nul": "a\0b",
        "empty": "", "number": 5, "null": None, "list": [], "missing": "none.safetensors", "long": "a" * 5000,
        "long-shard": "a" * 5000 + ".safetensors", "dot": ".", "other-file": CONFIG,
    }  # fmt: skip
    for label, name in names.items():
        yield Fault(f"index:names-{label}", "sharded", mapped(name))
    yield Fault("index:names-wrong-shard", "sharded", lambda folder: edit(folder / INDEX, _swapped), typed=False)
    contents: dict[str, Any] = {
        "map-list": {"weight_map": []}, "map-text": {"weight_map": "x"}, "map-empty": {"weight_map": {}},
        "no-map": {}, "list": [], "null": None,
    }  # fmt: skip
    for label, content in contents.items():
        yield Fault(f"index:{label}", "sharded", write(INDEX, json.dumps(content)))
    yield Fault("index:nested", "sharded", write(INDEX, NEST))
    yield Fault("index:not-json", "sharded", write(INDEX, "{"))
    metadata = {"list": [], "text": "x", "null": None, "size-text": {"total_size": "x"}}
    for label, value in metadata.items():
        change = configured_index(metadata=value)
        yield Fault(f"index:metadata-{label}", "sharded", change, typed=False)
    yield Fault("index:unknown-tensor", "sharded", lambda f: edit(f / INDEX, _with_unknown))
    yield Fault("index:lacks-tensor", "sharded", lambda f: edit(f / INDEX, _without_one))
    yield Fault("index:shard-absent", "sharded", lambda f: sorted(f.glob("model-*"))[0].unlink())
    yield Fault("index:shard-link-out", "sharded", _linked_out)


def configured_index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / INDEX, lambda index: index.update(changes))


def _swapped(index: dict[str, Any]) -> None:
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"][f"{DOWN}.weight"] = names[-1]


def _with_unknown(index: dict[str, Any]) -> None:
    index["weight_map"]["model.layers.9.x.weight"] = sorted(index["weight_map"].values())[0]


def _without_one(index: dict[str, Any]) -> None:
    del index["weight_map"][f"{DOWN}.weight"]


def _linked_out(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[0]
    shard.unlink()
    shard.symlink_to("/etc/passwd")


def retensored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrite a checkpoint of one file with other tensors."""

    def apply(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def _filled(key: str, value: float) -> Callable[[Path], None]:
    return retensored(lambda tensors: tensors[key].view(-1)[3:5].fill_(value))


def _tensors() -> Iterator[Fault]:
    keys = {
        "weight": f"{UP}.weight", "head": "lm_head.weight", "norm": "model.norm.weight", "bias": f"{UP}.bias",
        "embeddings": "model.embed_tokens.weight", "layer-norm": "model.layers.1.input_layernorm.weight",
    }  # fmt: skip
    for label, key in keys.items():
        changes: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
            "absent": lambda tensors, key: tensors.pop(key),
            "renamed": lambda tensors, key: tensors.update({f"{key}s": tensors.pop(key)}),
            "int32-bits": lambda tensors, key: tensors.update({key: tensors[key].view(torch.int32)}),
            "reshaped": lambda tensors, key: tensors.update({key: tensors[key].flatten()[:-1].clone()}),
        }
        for name, change in changes.items():
            apply = retensored(lambda tensors, change=change, key=key: change(tensors, key))  # type: ignore[misc]
            yield Fault(f"tensor:{label}-{name}", "dense", apply)
        yield Fault(f"tensor:{label}-nan", "dense", _filled(key, float("nan")))
        yield Fault(f"tensor:{label}-infinite", "dense", _filled(key, float("inf")))
    transposed = retensored(lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].T.contiguous()}))
    yield Fault("tensor:transposed", "dense", transposed)
    extra = retensored(lambda t: t.update({"model.layers.7.mlp.other.weight": torch.ones(3, 3)}))
    yield Fault("tensor:of-nothing", "dense", extra, typed=False)
    yield Fault("tensor:no-file", "dense", lambda folder: (folder / WEIGHTS).unlink())
    yield Fault("tensor:fifo", "dense", instead(WEIGHTS, os.mkfifo))
    yield Fault("tensor:folder", "dense", instead(WEIGHTS, Path.mkdir))
    yield Fault("tensor:link-to-itself", "dense", instead(WEIGHTS, lambda file: file.symlink_to(WEIGHTS)))
    yield Fault("tensor:pickle", "dense", lambda folder: _renamed(folder / WEIGHTS, "pytorch_model.bin"))


def _unrecorded(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def _records(base: str) -> Iterator[Fault]:
    """Faults of the record of packed layers."""

    def recorded(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        return lambda folder: edit(folder / CONFIG, lambda config: change(config["quantization_config"]) and None)

    def row(**changes: Any) -> Callable[[Path], None]:
        return recorded(lambda record: record["modules"][DOWN].update(changes))

    for label, value in {"true": True, "2": 2, "text": "1", "null": None, "float": 1.5, "list": []}.items():
        yield Fault(f"record:version={label}", base, recorded(lambda r, value=value: r.update(version=value)))  # type: ignore[misc]
    yield Fault("record:no-version", base, recorded(lambda record: record.pop("version")))
    for label, value in {"list": [], "number": 5, "null": None, "empty": {}, "text": "x"}.items():
        yield Fault(f"record:modules={label}", base, recorded(lambda r, value=value: r.update(modules=value)))  # type: ignore[misc]
    yield Fault("record:no-modules", base, recorded(lambda record: record.pop("modules")))
    yield Fault("record:gone", base, lambda folder: edit(folder / CONFIG, _unrecorded))
    for label, value in {"number": 5, "null": None, "list": [], "empty": {}, "text": "x"}.items():
        change = recorded(lambda r, value=value: r["modules"].update({DOWN: value}))  # type: ignore[misc]
        yield Fault(f"record:entry={label}", base, change)
    yield Fault("record:lacks-module", base, recorded(lambda record: record["modules"].pop(DOWN)))
    twice = recorded(lambda r: r["modules"].update({"model.layers.9.mlp.up_proj": r["modules"][DOWN]}))
    yield Fault("record:module-of-nothing", base, twice)
    rows: dict[str, Any] = {
        "layout=unknown": {"layout": "x"}, "layout=number": {"layout": 5}, "shape=text": {"shape": "x"},
        "shape=negative": {"shape": [-1, 4]}, "shape=swapped": {"shape": [48, 32]}, "shape=one": {"shape": [32]},
        "shape=huge": {"shape": [1 << 40, 1 << 40]}, "shape=true": {"shape": [True, 4]}, "field=unknown": {"more": 1},
    }  # fmt: skip
    numbers = {"nm": ("keep", "of"), "bitmask": ("nonzeros",), "block": ("block", "blocks")}
    for field in numbers[base]:
        for label, number in {"0": 0, "-1": -1, "huge": 1 << 40, "text": "x", "true": True, "1.5": 1.5}.items():
            rows[f"{field}={label}"] = {field: number}
    for label, changes in rows.items():
        yield Fault(f"record:{base}-{label}", base, row(**changes))


def _packed(base: str, parts: tuple[str, ...]) -> Iterator[Fault]:
    """Faults of the tensors of packed layers."""
    for part in parts:
        key = f"{DOWN}.{part}"
        changes: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
            "absent": lambda tensors, key: tensors.pop(key),
            "shorter": lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()}),
            "int16": lambda tensors, key: tensors.update({key: tensors[key].to(torch.int16)}),
        }
        if part not in ("values", "blocks"):
            changes["255"] = lambda tensors, key: tensors[key].view(torch.uint8).fill_(255)
            changes["0"] = lambda tensors, key: tensors[key].zero_()
        else:
            changes["nan"] = lambda tensors, key: tensors[key].fill_(float("nan"))
        for label, change in changes.items():
            apply = retensored(lambda tensors, change=change, key=key: change(tensors, key))  # type: ignore[misc]
            yield Fault(f"packed:{base}-{part}-{label}", base, apply)


_OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def _companions() -> Iterator[Fault]:
    """Faults of what lies beside the weights; the weights may be read."""
    texts = {
        "list": "[]",
        "number": "5",
        "null": "null",
        "nested": NEST,
        "not-json": "{",
        "empty": "",
        "bytes": b"\xff",
    }
    for name in _OTHERS:
        for label, text in texts.items():
            yield Fault(f"companion:{name}-{label}", "dense", write(name, text), typed=False)
    wrong = {
        "generation_config.json": {"temperature": "x", "eos_token_id": "x", "do_sample": 5, "max_length": []},
        "tokenizer_config.json": {"bos_token": 5, "tokenizer_class": 5, "added_tokens_decoder": [], "chat_template": 5},
        "tokenizer.json": {"model": 5, "added_tokens": {}, "pre_tokenizer": "x", "version": 5},
    }
    for name, changes in wrong.items():
        for key, value in changes.items():
            apply = lambda f, n=name, k=key, v=value: edit(f / n, lambda c: c.update({k: v}))  # type: ignore[misc] # noqa: E731
            yield Fault(f"companion:{name}-{key}", "dense", apply, typed=False)


def _all() -> Iterator[Fault]:
    yield from _configs()
    yield from _headers()
    yield from _indices()
    yield from _tensors()
    yield from _companions()
    for base, parts in {
        "nm": ("values", "meta"),
        "bitmask": ("values", "mask"),
        "block": ("values", "crow", "col"),
    }.items():
        yield from _records(base)
        yield from _packed(base, parts)


FAULTS: tuple[Fault, ...] = tuple({fault.name: fault for fault in _all()}.values())
