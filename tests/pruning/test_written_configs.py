"""config.json of a result: the source's own, with what pruning changed, as transformers writes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, recipe, save
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune import pack, prune
from llmprune.storage.config_files import publishable

# As older software wrote it; other engines read these keys.
OLD = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "my_tag": {"run": 7},
}  # fmt: skip
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"ffn": {"remove": 0.25}}, {"intermediate_size": 36}),
    ({"depth": {"remove": 1}}, {"num_hidden_layers": 1}),
    ({"heads": {"remove": 0.5}}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
]


def structured(**structures: Any) -> dict[str, Any]:
    return {key: value for key, value in recipe(structures=structures).items() if key not in ("pattern", "method")}


def config_of(folder: Path) -> Any:
    """config.json, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads((folder / "config.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("old") / "dense")
    config = config_of(folder)
    for key in ("rope_parameters", "dtype", "head_dim", "layer_types"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, **OLD}))
    return folder


@pytest.mark.parametrize(("structures", "changes"), CHANGES, ids=["ffn", "depth", "heads"])
def test_a_removal_changes_nothing_but_its_own_keys(
    old: Path, tmp_path: Path, structures: dict[str, Any], changes: dict[str, Any]
) -> None:
    prune(old, structured(**structures), tmp_path / "pruned")
    assert config_of(tmp_path / "pruned") == {**config_of(old), **changes}
    before, after = AutoConfig.from_pretrained(old), AutoConfig.from_pretrained(tmp_path / "pruned")
    assert before.rope_parameters == after.rope_parameters
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


def test_keys_by_another_name_are_the_ones_that_change(tmp_path: Path) -> None:
    source = save(build("gpt2"), tmp_path / "dense")
    config = config_of(source)
    config["num_hidden_layers"] = config.pop("n_layer")
    (source / "config.json").write_text(json.dumps(config))
    prune(source, structured(depth={"remove": 1}), tmp_path / "pruned")
    assert config_of(tmp_path / "pruned") == {**config, "num_hidden_layers": 1}


@pytest.mark.parametrize("way", ["weights", "depth", "packed at once", "packed later"])
def test_infinity_is_written_as_transformers_writes_it(tmp_path: Path, way: str) -> None:
    source = save(build("mamba2" if way == "depth" else "bamba"), tmp_path / "dense")
    config = {**config_of(source), "time_step_limit": [0.0, float("inf")]}
    (source / "config.json").write_text(json.dumps(config))
    assert "Infinity]" in (source / "config.json").read_text()
    output = tmp_path / "pruned"
    if way == "depth":
        prune(source, structured(depth={"remove": 1}), output)
    elif way == "weights":
        prune(source, recipe(), output)
    elif way == "packed at once":
        prune(source, recipe(format="bitmask"), output)
    else:
        prune(source, recipe(), tmp_path / "sparse")
        pack(tmp_path / "sparse", output)
    assert config_of(output)["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert tuple(AutoConfig.from_pretrained(output).time_step_limit) == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("origin", "kept"), [("org/name", True), ("gpt2", True), ("/home/me/secret", False), ("", False), ("./x", False)]
)
def test_local_paths_are_not_published(tmp_path: Path, origin: str, kept: bool) -> None:
    source = save(build("llama"), tmp_path / "dense")
    config = {**config_of(source), "_name_or_path": origin}
    (source / "config.json").write_text(json.dumps(config))
    prune(source, recipe(), tmp_path / "sparse")
    prune(source, structured(ffn={"remove": 0.25}), tmp_path / "small")
    pack(source.with_name("sparse"), tmp_path / "packed")
    for name in ("sparse", "small", "packed"):
        assert config_of(tmp_path / name).get("_name_or_path") == (origin if kept else None)
    assert publishable({"text_config": {"_name_or_path": "/x", "a": 1}}) == {"text_config": {"a": 1}}


def test_a_model_in_memory_does_not_tell_where_it_came_from(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    for settings in (recipe(), structured(ffn={"remove": 0.25})):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        prune(AutoModelForCausalLM.from_pretrained(source), settings, output)
        assert str(tmp_path) not in (output / "config.json").read_text()
