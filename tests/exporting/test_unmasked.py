"""Models that torch.nn.utils.prune has pruned: as checkpoints, in `inspect`, and in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from safetensors.torch import save_file
from tiny_models import build, random_ids, save
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from llmprune import export, inspect_checkpoint, keep_zeros, pack, sparsify
from llmprune.errors import CheckpointError, ModelError, ResumeError
from llmprune.exporting.masked import add_masks
from llmprune.exporting.unmasked import import_masked
from llmprune.storage.torch_prune import merge_masks, merged

LAYER = "model.layers.0.mlp.up_proj"


def pruned_by_torch(family: str = "llama") -> Any:
    model = build(family)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            prune.l1_unstructured(module, "weight", 0.25)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(random_ids(2, 12)).logits


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_a_folder_of_save_pretrained_becomes_a_checkpoint(tmp_path: Path, shards: str | None) -> None:
    model = pruned_by_torch()
    save(model, tmp_path / "masked", **({"max_shard_size": shards} if shards else {}))
    report = import_masked(tmp_path / "masked", tmp_path / "plain")
    assert report.facts["matrices"] == "14 had a mask"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(loaded), logits(model))
    assert float(loaded.get_submodule(LAYER).weight.eq(0).float().mean()) == 0.25
    assert (tmp_path / "plain" / "tokenizer.json").exists()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_state_dict_of_torch_becomes_a_checkpoint(tmp_path: Path, family: str) -> None:
    model = pruned_by_torch(family)
    save(build(family), tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    done = run(
        "import", tmp_path / "state.pt", "--config", tmp_path / "model", "--output", tmp_path / "plain", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["to"] == "checkpoint"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(loaded), logits(model))
    assert (
        "had a mask"
        in run(
            "import", tmp_path / "state.pt", "--config", tmp_path / "model", "-o", tmp_path / "plain", "--overwrite"
        ).stdout
    )


def test_what_was_exported_is_imported_again(tmp_path: Path) -> None:
    model = pruned_by_torch()
    for name, module in model.named_modules():
        if prune.is_pruned(module) and hasattr(module, "weight_mask"):
            prune.remove(model.get_submodule(name), "weight")
    save(model, tmp_path / "plain")
    import_masked(export(tmp_path / "plain", "torch-prune").output, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_inspect_counts_masked_weights_as_one(tmp_path: Path) -> None:
    model = pruned_by_torch()
    save(model, tmp_path / "masked")
    rows = {row.name: row for row in inspect_checkpoint(tmp_path / "masked").rows}
    row = rows[f"{LAYER}.weight"]
    assert (row.zeros, row.elements, row.layout) == (row.elements // 4, 48 * 32, "torch-prune")
    assert row.bytes == 2 * 4 * row.elements
    assert not any(name.endswith(("_orig", "_mask")) for name in rows)
    import_masked(tmp_path / "masked", tmp_path / "plain")
    plain = inspect_checkpoint(tmp_path / "plain")
    assert plain.matrix_sparsity == inspect_checkpoint(tmp_path / "masked").matrix_sparsity
    assert [row.name for row in plain.rows] == list(rows)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_inspect_counts_a_state_dict_as_the_folder(tmp_path: Path, family: str) -> None:
    model = pruned_by_torch(family)
    save(model, tmp_path / "masked")
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    folder = inspect_checkpoint(tmp_path / "masked")
    done = run("inspect", tmp_path / "pruned.pt", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    own = {row.name: row for row in folder.rows}
    rows = {row["name"]: row for row in found["tensors"]}
    # Of tied tensors, a folder has the embedding, a state dict the one that the model has first: the same.
    assert rows.keys() == own.keys()
    assert all(
        (row["zeros"], row["pattern"], row["layout"], row["bytes"])
        == (own[name].zeros, own[name].pattern, own[name].layout, own[name].bytes)
        for name, row in rows.items()
    )
    assert found["matrix_sparsity"] == folder.matrix_sparsity == 0.25
    assert found["bytes_on_disk"] == (tmp_path / "pruned.pt").stat().st_size
    assert "0.25" in run("inspect", tmp_path / "pruned.pt").stdout
    single = inspect_checkpoint(tmp_path / "masked" / "model.safetensors")
    assert single.rows == folder.rows
    assert run("inspect", tmp_path / "absent.pt").exit_code == 1


def test_masks_in_memory_go_both_ways() -> None:
    model = build("llama")
    masks = sparsify(model, "magnitude", {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 1})
    with masks:
        model(input_ids=random_ids(2, 8), labels=random_ids(2, 8)).loss.backward()
    before = logits(model)
    add_masks(model, masks.masks)
    assert prune.is_pruned(model.get_submodule(LAYER))
    assert torch.equal(logits(model), before)
    weights, found = merge_masks(model.state_dict())
    assert found.keys() == masks.masks.keys()
    assert all(mask.equal(masks.masks[name]) for name, mask in found.items())
    plain = build("llama")
    plain.load_state_dict(weights)
    assert torch.equal(logits(plain), before)
    assert keep_zeros(plain, found).masks.keys() == found.keys()
    with pytest.raises(ModelError, match="not those of this model"):
        add_masks(build("llama"), {"lm_head.weight": torch.ones(3, 3, dtype=torch.bool)})


def test_what_is_pruned_is_zero_whatever_the_original_is() -> None:
    original, mask = torch.tensor([torch.inf, -1.0, torch.nan]), torch.tensor([0.0, 1.0, 0.0])
    found = merged("w", original, mask)
    assert found.tolist() == [0.0, -1.0, 0.0]
    assert not torch.signbit(found[0])
    with pytest.raises(CheckpointError, match="there are w and w_orig with a mask"):
        merge_masks({"w_orig": original, "w_mask": mask, "w": original})


def test_what_is_refused(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has no tensors named \.\.\._orig"):
        import_masked(tmp_path / "plain", tmp_path / "out")
    torch.save(pruned_by_torch().state_dict(), tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        import_masked(tmp_path / "state.pt", tmp_path / "out")
    (tmp_path / "text.pt").write_text("no state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_masked(tmp_path / "text.pt", tmp_path / "out", config=tmp_path / "plain")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="is no state dict"):
        import_masked(tmp_path / "list.pt", tmp_path / "out", config=tmp_path / "plain")
    save(pruned_by_torch(), tmp_path / "masked")
    with pytest.raises(ResumeError):
        import_masked(tmp_path / "masked", tmp_path / "plain")
    refused = run("perplexity", tmp_path / "masked", "--text", tmp_path / "text.pt")
    assert "llmprune import" in " ".join(refused.stderr.split())
    # A mask of other values than zeros and ones, and a checkpoint of another model.
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    save_file({"w_orig": torch.ones(2, 2), "w_mask": torch.full((2, 2), 0.5)}, odd / "model.safetensors")
    with pytest.raises(CheckpointError, match="w_mask is no mask of w_orig"):
        import_masked(odd, tmp_path / "out")
    save_file({"w_orig": torch.ones(2, 2), "w_mask": torch.ones(2, 2)}, odd / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        import_masked(odd, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_packed_checkpoint_goes_out_and_in_again(tmp_path: Path) -> None:
    """Its config.json says how it is packed, which the tensors of torch.nn.utils.prune are not."""
    plain = pruned_by_torch()
    save(plain, tmp_path / "masked")
    import_masked(tmp_path / "masked", tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", "bitmask")
    out = export(tmp_path / "packed", "torch-prune").output
    import_masked(out, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(plain))
    for folder in (out, export(tmp_path / "packed", "csr").output):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_the_model_itself_is_not_overwritten(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "model")
    torch.save(pruned_by_torch().state_dict(), tmp_path / "state.pt")
    with pytest.raises(ResumeError, match="the model itself"):
        import_masked(tmp_path / "state.pt", tmp_path / "model", config=tmp_path / "model", overwrite=True)
