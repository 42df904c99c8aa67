"""Masked adapters: trained is merged, zeros stay, and nothing else changes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids, save
from transformers import AutoModelForCausalLM
from word_texts import words

from llmprune import TextSpec, pack, prune, recover
from llmprune.errors import MissingPackageError, RecoveryError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import Decoder
from llmprune.recovery.adapters import adapted_linear, add_adapters, merge_saved, remove_adapters, trained_numbers
from llmprune.recovery.masks import masks_of
from llmprune.recovery.options import Adapter, RecoveryOptions
from llmprune.recovery.plan import disk_needs
from llmprune.storage.files import read_index

IDS = random_ids(2, 12)


@pytest.fixture(autouse=True)
def needs_peft() -> None:
    pytest.importorskip("peft", reason='not installed: peft (pip install -e ".[recover]")')


def pruned_llama(family: str = "llama") -> Any:
    model = build(family, torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
            layer.self_attn.q_proj.weight[::2] = 0
    return model


def trained(model: Any, kind: Adapter = "lora") -> dict[str, torch.Tensor]:
    """Add adapters and take some steps."""
    masks = add_adapters(Decoder.find(model), masks_of(model), rank=2, seed=0, kind=kind)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return masks


@pytest.mark.parametrize("kind", ["lora", "shira", "low-rank"])
def test_the_numbers_that_train_are_known_before_there_are_any(kind: Adapter) -> None:
    """Saved states hold these and their moments, and not the weights of the model."""
    model = pruned_llama()
    expected = trained_numbers(Decoder.find(model), 2)
    add_adapters(Decoder.find(model), masks_of(model), rank=2, seed=0, kind=kind)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expected


def test_adapters_need_less_disk_space(tmp_path: Path) -> None:
    source = CheckpointSource(save(build("llama"), tmp_path / "model"), torch.float32)
    stored = source.sizes()["stored_bytes"]
    whole = 36 * sum(parameter.numel() for parameter in source.model.parameters())
    assert disk_needs(source, RecoveryOptions()) == stored + whole
    options = RecoveryOptions(adapter="low-rank", rank=2)
    assert disk_needs(source, options) == stored + 36 * trained_numbers(source.decoder, 2) < stored + whole / 4


def test_a_step_is_that_of_the_masked_product() -> None:
    """W + 2 (M * B A) for a rank of 2 and an alpha of 4, by hand from the factors."""
    model = pruned_llama()
    layer = model.model.layers[0].mlp
    weight = layer.up_proj.weight.detach().clone()
    trained(model)
    adapted = layer.up_proj
    product = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    expected = weight + 2 * product * (weight != 0)
    assert product[:, ::2].ne(0).all()
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(adapted(x), x @ expected.T + adapted.base_layer.bias)


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_trained_is_merged_to_the_last_bit(kind: Adapter) -> None:
    model = pruned_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = trained(model, kind)
    assert set(masks) == {
        f"model.layers.{n}.{m}.base_layer.weight" for n in (0, 1) for m in ("mlp.up_proj", "self_attn.q_proj")
    }
    with torch.no_grad():
        adapted = model(input_ids=IDS).logits
        remove_adapters(model, merge=True)
        assert model(input_ids=IDS).logits.equal(adapted)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        moved = name.endswith("_proj.weight")
        assert parameter.equal(before[name]) != moved, name
        assert parameter.eq(0).equal(before[name].eq(0)), name
    assert not any(isinstance(module, adapted_linear()) for module in model.modules())


def test_shira_trains_as_many_of_the_kept_weights_as_adapters_have_numbers() -> None:
    model = pruned_llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    before = weight.detach().clone()
    trained(model, "shira")
    remove_adapters(model, merge=True)
    assert int((weight != before).sum()) == 2 * sum(weight.shape)
    assert not (weight != before)[:, ::2].any()


def test_shira_is_refused_where_fewer_weights_are_kept_than_it_trains() -> None:
    model = pruned_llama()
    kept = int((model.model.layers[0].self_attn.q_proj.weight != 0).sum())
    with pytest.raises(RecoveryError, match=f"which has kept {kept}"):
        add_adapters(Decoder.find(model), masks_of(model), rank=40, seed=0, kind="shira")


def test_dropped_adapters_leave_the_model_as_it_was() -> None:
    model = pruned_llama()
    before = model(input_ids=IDS).logits
    trained(model)
    assert not model(input_ids=IDS).logits.equal(before)
    remove_adapters(model, merge=False)
    assert model(input_ids=IDS).logits.equal(before)


def test_models_without_linear_layers_are_refused() -> None:
    model = build("gpt2")
    with pytest.raises(RecoveryError, match="GPT2LMHeadModel, which has no linear layers"):
        add_adapters(Decoder.find(model), {}, rank=2, seed=0)


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_recovery_with_adapters_and_its_resumption(tmp_path: Path, kind: str) -> None:
    dense = save(build("llama"), tmp_path / "dense")
    text = TextSpec(str(tmp_path / "text.txt"), length=16)
    Path(text.source).write_text(" ".join(f"w{number * number % 120 + 4}" for number in range(600)))
    settings = {"source": text.source, "samples": 2, "length": 16}
    prune(dense, {"pattern": "2:4", "method": "magnitude", "calibration": settings, "evaluation": None}, tmp_path / "p")
    options = {"adapter": kind, "rank": 4, "learning_rate": 1e-2, "epochs": 4, "batch_size": 4, "held_back": 4}
    report = recover(tmp_path / "p", tmp_path / "out", text, dense, options)
    recovery = report.header["recovery"]
    before, after = ({key: t[...] for key, t in read_index(tmp_path / name).items()} for name in ("p", "out"))
    for name, tensor in after.items():
        assert tensor.eq(0).equal(before[name].eq(0)), name
        assert tensor.equal(before[name]) != name.endswith("_proj.weight"), name
    assert recovery["zeros"]["before"] == recovery["zeros"]["after"]
    assert recovery["scores"][-1]["eval_loss"] < 0.9 * recovery["scores"][0]["eval_loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None

    class Killed(BaseException):
        pass

    def kill(progress: Any) -> None:
        if progress.unit == "step" and progress.layer == 12:
            raise Killed

    with pytest.raises(Killed):
        recover(tmp_path / "p", tmp_path / "again", text, dense, options, watch=kill)
    recover(tmp_path / "p", tmp_path / "again", text, dense, options, resume=True)
    assert all(stored[...].equal(after[key]) for key, stored in read_index(tmp_path / "again").items())


def test_a_missing_peft_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"llmprune\[recover\]"):
        recover(tmp_path / "nowhere", tmp_path / "out", "text.txt", "dense", {"adapter": "lora"})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_a_low_rank_correction_is_loaded_by_peft_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    dense, spec = _prune(tmp_path)
    options = {"adapter": "low-rank", "rank": 4, "learning_rate": 3e-2, "epochs": 3, "held_back": 4}
    report = recover(tmp_path / "pruned", tmp_path / "out", spec, dense, options, evaluation=spec)
    before, after = ({key: one[...] for key, one in read_index(tmp_path / name).items()} for name in ("pruned", "out"))
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    recovery = report.header["recovery"]
    assert recovery["best_step"] > 0
    assert recovery["perplexity"]["recovered"] < recovery["perplexity"]["pruned"]

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = _logits(merged)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "out" / "adapter"
    )
    merge_saved(merged, tmp_path / "out" / "adapter")  # of which the report has the perplexity
    torch.testing.assert_close(_logits(model.eval()), _logits(merged), rtol=1e-3, atol=1e-3)
    assert (_logits(merged) - plain).abs().max() > 0.1
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("LORA", 4, "CAUSAL_LM")
    with pytest.raises(RecoveryError, match="has a correction beside its weights"):
        recover(tmp_path / "out", tmp_path / "again", spec, dense, options)
    # Another form of the weights keeps what lies beside them.
    pack(tmp_path / "out", tmp_path / "packed")
    for name in ("masks.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def _prune(folder: Path) -> tuple[Path, TextSpec]:
    """Write a dense Llama, a text and `folder`/pruned; returns the first two."""
    dense, text = save(build("llama"), folder / "dense"), words(folder / "text.txt", 600)
    settings = {"source": text.source, "samples": 4, "length": 16}
    recipe = {"pattern": "2:4", "method": "magnitude", "calibration": settings, "evaluation": None}
    prune(dense, recipe, folder / "pruned")
    return dense, text


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_correction_beside_packed_weights_is_measured_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, spec = _prune(tmp_path)
    pack(tmp_path / "pruned", tmp_path / "packed", "nm")
    options = {"adapter": "low-rank", "rank": 2, "learning_rate": 3e-2, "epochs": 1, "held_back": 0}

    def again(**more: Any) -> Any:
        return recover(tmp_path / "packed", tmp_path / "out", spec, dense, options, evaluation=spec, **more)

    with monkeypatch.context() as patch:
        patch.setattr("llmprune.recovery.finishing.write_result", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            again()
    report = again(resume=True)
    perplexity = report.header["recovery"]["perplexity"]
    assert perplexity["recovered"] != perplexity["pruned"]
    before, after = ({key: one[...] for key, one in read_index(tmp_path / name).items()} for name in ("packed", "out"))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
