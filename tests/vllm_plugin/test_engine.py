"""Whole engines of vLLM on the bundled model: the tokens of transformers. Run by `make test-vllm`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EVEN, PATTERNS, UNEVEN, save, save_cut, save_experts
from engines import engine, generated, judged, needs_vllm
from safetensors.torch import load_file, save_file

from llmprune.errors import ModelError
from llmprune.measuring.explain import explain

pytestmark = [needs_vllm, pytest.mark.slow]

# In nats. Of a prompt token's log-probability; int8 forms round the activations to 16 bits.
TOLERANCE = {"int8": 2e-3}


def require_the_same(packed: Path, dense: Path, tolerance: float = 1e-4, exact: bool = True, **options: Any) -> None:
    """Compare an engine with transformers: greedy tokens, and log-probabilities of the prompts."""
    tokens, logs = generated(packed, **options)
    worst, wanted = judged(dense, tokens)
    pairs = [(one, other) for one, other in zip(logs, wanted, strict=True) if len(one)]
    largest = max(float((one - other).abs().max()) for one, other in pairs)
    print(
        f"{packed.parent.name}: {worst:.2g} nats below the best token, log-probabilities differ by {largest:.2g} nats"
    )
    assert largest <= tolerance
    assert worst <= (0.0 if exact else tolerance)


@pytest.mark.parametrize("name", PATTERNS)
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    dense, packed = save(name, tmp_path / name)
    # In float32, 8-bit weights are not rounded to the dtype of the dense checkpoint.
    judge = packed if name == "int8" else dense
    require_the_same(packed, judge, TOLERANCE.get(name, 1e-4), exact=name != "int8")


def test_a_compiled_engine_gives_the_same(tmp_path: Path) -> None:
    dense, packed = save("mixed", tmp_path)
    require_the_same(packed, dense, enforce_eager=False)


def test_a_mixture_of_experts_has_packed_attention_and_dense_experts(tmp_path: Path) -> None:
    dense, packed = save_experts(tmp_path / "experts")
    require_the_same(packed, dense, tolerance=1e-3, exact=False)


def test_the_forms_are_those_that_explain_names(tmp_path: Path) -> None:
    _, packed = save("mixed", tmp_path)
    with engine(packed) as llm:
        (forms,) = llm.apply_model(_forms)
    assert forms["model.layers.0.self_attn.qkv_proj"] == ["cpu-nm", "dense", "cpu-nm"]
    assert forms["model.layers.0.mlp.gate_up_proj"] == ["cpu-bitmask", "blocks"]
    explained = {row.name: row.vllm for row in explain(packed, torch.device("cpu")).packed}
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert [explained[f"model.layers.0.{name}"] for name in names] == ["cpu-nm", "cpu-nm", "cpu-bitmask", "blocks"]
    assert "model.layers.0.self_attn.o_proj" not in forms


def _forms(model):  # type: ignore[no-untyped-def]
    return {
        name: [part.form.name for part in module.llmprune_parts]
        for name, module in model.named_modules()
        if hasattr(module, "llmprune_parts")
    }


def test_structures_removed_alike_from_every_layer_are_a_stock_model(tmp_path: Path) -> None:
    pruned = save_cut(tmp_path / "even", EVEN)
    assert "quantization_config" not in json.loads((pruned / "config.json").read_text())
    require_the_same(pruned, pruned)


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_layers_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    pruned = save_cut(tmp_path / name, UNEVEN[name])
    with (
        pytest.raises(ModelError, match=r"differ in size or lack a block(.|\n)*fix: serve it with llmprune serve"),
        engine(pruned),
    ):
        pass


@pytest.mark.parametrize("missing", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_that_is_not_packed_is_refused(missing: str, tmp_path: Path) -> None:
    _, packed = save("nm", tmp_path)
    tensors = load_file(packed / "model.safetensors")
    del tensors[missing]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"not initialized from checkpoint: .*{missing}"), engine(packed):
        pass


def test_a_dense_checkpoint_needs_no_flag(tmp_path: Path) -> None:
    dense, _ = save("dense", tmp_path)
    with pytest.raises(ModelError, match=r"(.|\n)*leave the flag out"), engine(dense, quantization="llmprune"):
        pass
