"""Tensors that transformers does not build: copied by weight pruning, dropped or refused by structures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import same, tensors, weights_and_texts
from safetensors.torch import load_file, save_file
from tiny_models import build, recipe, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import dry_run, prune
from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.progress import Progress
from llmprune.recipe.structures import Depth, Structures
from llmprune.storage import copying
from llmprune.storage.files import Stored
from llmprune.structures.draft_head import find_draft_head

WORDS = " ".join(f"w{number % 120 + 4}" for number in range(700))
EXTRA = {"eh_proj.weight": torch.randn(32, 64), "enorm.weight": torch.ones(32), "zero.weight": torch.tensor([-0.0])}


def with_head(family: str, folder: Path, prefix: str, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with one layer more than transformers builds, and a text beside it."""
    source = save(build(family), folder / "dense")
    weights = load_file(source / "model.safetensors")
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    last = f"model.layers.{layers - 1}."
    head = {prefix + key.removeprefix(last): value + 0.5 for key, value in weights.items() if key.startswith(last)}
    head |= {prefix + key: value for key, value in EXTRA.items()}
    add(source, head, **config)
    (folder / "text.txt").write_text(WORDS)
    return source, head


def add(source: Path, extra: dict[str, Tensor], **config: Any) -> None:
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**written, **config}))


def asked(folder: Path, **structures: Any) -> dict[str, Any]:
    text = {"source": str(folder / "text.txt"), "samples": 4, "length": 16}
    if not structures:
        return recipe(calibration=text, method="magnitude")
    whole = recipe(calibration=text, structures=structures)
    return {key: value for key, value in whole.items() if key not in ("pattern", "method")}


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("drafting")
    return with_head("llama", folder, "model.layers.2.", num_nextn_predict_layers=1)


def test_weight_pruning_keeps_a_draft_head_without_reading_it(
    drafting: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, head = drafting
    read = Stored.read

    def read_but_the_head(stored: Stored, dtype: torch.dtype) -> Tensor:
        assert stored.key not in head, "a tensor that nothing computes is read into memory as a whole"
        return read(stored, dtype)

    monkeypatch.setattr(Stored, "read", read_but_the_head)
    monkeypatch.setattr(copying, "_SHARD_BYTES", 20_000)
    settings = asked(source.parent)
    prune(source, settings, tmp_path / "pruned")
    kept = tensors(tmp_path / "pruned")
    assert all(same(kept[key], value) for key, value in head.items())
    index = json.loads((tmp_path / "pruned/model.safetensors.index.json").read_text())["weight_map"]
    assert len({index[key] for key in head}) > 1
    assert not {index[key] for key in head} & {index[key] for key in index if key not in head}
    assert json.loads((tmp_path / "pruned/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert any(
        "Copied as they are" in note and f"{len(head)} tensors" in note for note in dry_run(source, settings).notes
    )


def test_a_finished_run_lacks_nothing_that_was_copied(drafting: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    source, _ = drafting
    prune(source, asked(source.parent), tmp_path / "pruned")
    before = weights_and_texts(tmp_path / "pruned")
    damaged = sorted((tmp_path / "pruned").glob("*.safetensors"))[-1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    prune(source, asked(source.parent), tmp_path / "pruned", resume=True)
    assert weights_and_texts(tmp_path / "pruned") == before


@pytest.mark.parametrize("structures", [{"depth": {"remove": 1}}, {"width": {"remove": 0.25}}], ids=["depth", "width"])
def test_structures_drop_it_with_the_number_of_its_layers_and_say_so(
    drafting: tuple[Path, dict[str, Tensor]], tmp_path: Path, structures: dict[str, Any]
) -> None:
    source, head = drafting
    settings, told = asked(source.parent, **structures), list[Progress]()
    planned = [note for note in dry_run(source, settings).notes if "draft head" in note]
    report = prune(source, settings, tmp_path / "pruned", watch=told.append)
    assert not head.keys() & tensors(tmp_path / "pruned").keys()
    assert json.loads((tmp_path / "pruned/config.json").read_text())["num_nextn_predict_layers"] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    sentence = report.header["draft_head"]
    assert f"{len(head)} tensors" in sentence
    assert "num_nextn_predict_layers in config.json becomes 0" in sentence
    assert planned == [sentence]
    assert sentence in [progress.stage for progress in told]
    assert "The draft head (MTP) is dropped" in (tmp_path / "pruned/README.md").read_text()
    assert "draft head" in (tmp_path / "pruned/report.html").read_text()


def test_a_head_that_no_key_counts(tmp_path: Path) -> None:
    source, head = with_head("llama", tmp_path, "mtp.layers.0.")
    report = prune(source, asked(tmp_path, depth={"remove": 1}), tmp_path / "pruned")
    assert not head.keys() & tensors(tmp_path / "pruned").keys()
    assert "config.json" not in report.header["draft_head"]


def test_a_count_that_transformers_adds_is_written_as_zero(tmp_path: Path) -> None:
    source, _ = with_head("deepseek_v3", tmp_path, "model.layers.3.")
    written = json.loads((source / "config.json").read_text())
    del written["num_nextn_predict_layers"]
    (source / "config.json").write_text(json.dumps(written))
    draft_head = find_draft_head(CheckpointSource(source), Structures(depth=Depth(remove=1)))
    assert draft_head is not None
    assert draft_head.without(written) == {**written, "num_nextn_predict_layers": 0}
    whole = {"model_type": "whole", "text_config": written, "vision_config": {"model_type": "tower"}}
    inner = {"text_config": {**written, "num_nextn_predict_layers": 0}}
    assert draft_head.without(whole) == {**whole, **inner}
    counted = {**whole, "num_nextn_predict_layers": 2}
    assert draft_head.without(counted) == {**counted, "num_nextn_predict_layers": 0}


@pytest.mark.parametrize(
    ("extra", "config", "structures", "said"),
    [
        ("model.layers.2.eh_proj.weight", {}, {"ffn": {"remove": 0.25}}, "no key of config.json counts"),
        ("medusa.0.weight", {}, {"ffn": {"remove": 0.25}}, "nothing says whether they would fit"),
        ("visual.merger.weight", {"vision_config": {"depth": 2}}, {"width": {"remove": 0.25}}, "their 32 channels"),
        ("visual.merger.weight", {"vision_config": {"depth": 2}}, {"ffn": {"remove": 0.25}}, None),
        ("model.rotary_emb.inv_freq", {}, {"ffn": {"remove": 0.25}}, None),
    ],
)
def test_what_may_not_fit_is_refused_before_the_run(
    tmp_path: Path, extra: str, config: dict[str, Any], structures: dict[str, Any], said: str | None
) -> None:
    source = save(build("llama"), tmp_path / "dense")
    add(source, {extra: torch.ones(32, 5)}, **config)
    (tmp_path / "text.txt").write_text(WORDS)
    settings = asked(tmp_path, **structures)
    if said is None:
        prune(source, settings, tmp_path / "pruned")
        assert torch.equal(tensors(tmp_path / "pruned")[extra], torch.ones(32, 5))
        return
    for run in (lambda: dry_run(source, settings), lambda: prune(source, settings, tmp_path / "pruned")):
        with pytest.raises(ModelError, match=said) as caught:
            run()
        assert extra in str(caught.value)
    assert not (tmp_path / "pruned").exists()
