"""Every architecture: streamed as transformers computes it, pruned where the recipe says and nowhere else."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import same, tensors, zeros
from tiny_models import FAMILIES, VOCABULARY, build, known, marked, random_ids, recipe, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune import prune
from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.decoder import Decoder, Matrix, prunable_matrices
from llmprune.models.source import ModelSource
from llmprune.statistics import Gram
from llmprune.storage.report import Report
from llmprune.stream.stream import Stream, StreamSettings

# Older transformers script a function of GPT-BigCode, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

IN_BFLOAT16 = ("llama", "gemma3", "qwen3_moe", "deepseek_v3", "gpt_oss", "falcon_h1")


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, and what pruning made of it on both ways."""

    family: str
    source: Path
    output: Path
    report: Report
    in_memory: PreTrainedModel


@pytest.fixture(scope="module", params=marked([*FAMILIES, *(f"{name}:bfloat16" for name in IN_BFLOAT16)]))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, _, dtype = request.param.partition(":")
    if not known(family):
        pytest.skip(f"this transformers does not know {FAMILIES[family][0]}")
    folder = tmp_path_factory.mktemp("family")
    save(build(family, getattr(torch, dtype or "float32")), folder / "source", max_shard_size="20KB")
    # By name: "auto" is float32 on a processor that has no bfloat16.
    settings = recipe(compute_dtype=dtype or "float32")
    report = prune(folder / "source", settings, folder / "output")
    model = load(folder / "source")
    prune(model, settings)
    return Case(family, folder / "source", folder / "output", report, model)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def matrices(model: PreTrainedModel) -> Iterator[tuple[Matrix, str]]:
    """Every prunable matrix with the full name of its parameter."""
    decoder = Decoder.find(model)
    path, layers = decoder.path, decoder.layers
    for index, layer in enumerate(layers):
        for matrix in prunable_matrices(layer, f"{path}.{index}"):
            yield matrix, f"{path}.{index}.{matrix.parameter}"


def logits(model: PreTrainedModel, batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits for ids in batches]


def test_the_stream_computes_the_models_logits(case: Case) -> None:
    settings = StreamSettings(batch_size=2, outputs=True)
    stream = Stream(CheckpointSource(case.source), random_ids(3, 20), settings)
    for _ in stream:
        pass
    expected = logits(load(case.source), stream.batches)
    streamed = [batch for _, (batch,) in stream.logits(stream.hidden)]
    assert all(torch.equal(*pair) for pair in zip(streamed, expected, strict=True))


def test_the_logits_of_some_positions_are_those_of_all(case: Case) -> None:
    """Norm, head, scaling and soft-capping treat each position by itself, in every family."""
    model = load(case.source)
    stream = Stream(ModelSource(model), random_ids(3, 20), StreamSettings(batch_size=2, outputs=True))
    for _ in stream:
        pass
    expected = logits(model, stream.batches)
    for limit in (4 * VOCABULARY * 7, 4 * VOCABULARY * 20):
        shares = [torch.full_like(batch, torch.nan) for batch in expected]
        for window, (part,) in stream.logits(stream.hidden, limit_bytes=limit):
            assert window.can_cut(stream.hidden[window.batch])
            assert part.shape == window.cut(shares[window.batch]).shape
            assert part[..., 0].numel() * VOCABULARY * 4 <= limit
            window.cut(shares[window.batch]).copy_(part)
        tolerance = 0.02 if expected[0].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(shares, expected, rtol=tolerance, atol=tolerance)


def test_hidden_states_follow_the_pruning(case: Case) -> None:
    """What leaves the last layer is what the pruned model computes, however much was run on the way."""
    model = load(case.source)
    stream = Stream(ModelSource(model), random_ids(3, 20), StreamSettings(batch_size=2, outputs=True))
    for layer in stream:
        layer.observe(dict.fromkeys(layer.matrices, Gram))
        for name in layer.matrices:
            weight = layer.weight(name)
            layer.replace(name, weight * (weight > 0))
    expected = logits(model, stream.batches)
    streamed = [batch for _, (batch,) in stream.logits(stream.hidden)]
    assert all(torch.equal(*pair) for pair in zip(streamed, expected, strict=True))


def test_the_checkpoint_keeps_its_layout(case: Case) -> None:
    before, after = tensors(case.source), tensors(case.output)
    assert {key: (t.shape, t.dtype) for key, t in after.items()} == {
        key: (t.shape, t.dtype) for key, t in before.items()
    }
    for key, tensor in after.items():
        assert not bool((torch.signbit(tensor) & (tensor == 0)).any()), f"{key} holds -0.0"


def test_exactly_the_selected_matrices_change(case: Case) -> None:
    before, after = load(case.source), load(case.output)
    pruned = {}
    rows = {row.name: row for row in case.report.rows}
    for matrix, parameter in matrices(after):
        row, weight = rows.pop(matrix.name), matrix.view(after.get_parameter(parameter))
        assert zeros(weight) == row.zeros == weight.numel() // 2, matrix.name
        pruned[parameter] = weight
    assert not rows
    state = before.state_dict()
    for name, tensor in after.state_dict().items():
        assert name in pruned or same(tensor, state[name]), name


def test_streamed_equals_in_memory(case: Case) -> None:
    streamed, in_memory = load(case.output).state_dict(), case.in_memory.state_dict()
    assert [name for name, tensor in streamed.items() if not same(tensor, in_memory[name])] == []


def test_the_output_is_a_working_model(case: Case) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.output)
    with torch.no_grad():
        assert bool(model(input_ids=random_ids(2, 20)).logits.isfinite().all())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(FAMILIES[case.family][1].get("tie_word_embeddings", False))


def test_grams_are_those_of_the_inputs(case: Case) -> None:
    """Against products seen one level below, in the whole model, recognised by their place in memory alone."""
    model = load(case.source)
    stream = Stream(ModelSource(model), random_ids(3, 20), StreamSettings(batch_size=2))
    layer = next(iter(stream))
    groups = layer.observe(dict.fromkeys(layer.matrices, Gram))
    expected = _Inputs(layer.module, layer.matrices.values())
    with expected:
        logits(model, stream.batches)
    assert sorted(name for group in groups for name in group.names) == sorted(layer.matrices)
    for group in groups:
        for name in group.names:
            gram = expected.grams.get(name, torch.zeros(group.statistics.products.shape))
            torch.testing.assert_close(group.statistics.products.double(), gram.double(), rtol=1e-5, atol=1e-5)


class _Inputs(TorchDispatchMode):
    """X^T X, in float64, of whatever multiplies a layer's matrices."""

    PRODUCTS = {  # noqa: RUF012
        torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.bmm: 0, torch.ops.aten.baddbmm: 1,
    }  # fmt: skip

    def __init__(self, layer: nn.Module, watched: Any) -> None:
        super().__init__()
        views = {m.name: m.view(layer.get_parameter(m.parameter)) for m in watched}
        self.names = {self.place(view): name for name, view in views.items()}
        self.grams: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = self.PRODUCTS.get(func.overloadpacket)
        if first is not None:
            left, right = args[first : first + 2]
            self.look(left, right.mT)
            self.look(right.mT, left)
        return func(*args, **(kwargs or {}))

    def look(self, x: Tensor, weight: Tensor) -> None:
        if weight.dim() == 3:
            for pair in zip(x, weight, strict=True):
                self.look(*pair)
        elif (name := self.names.get(self.place(weight))) is not None:
            self.grams[name] = self.grams.get(name, 0) + x.double().T @ x.double()

    @staticmethod
    def place(weight: Tensor) -> tuple[Any, ...]:
        return weight.data_ptr(), tuple(weight.shape), tuple(weight.stride())


def groups_of(family: str, layer_index: int = 0) -> list[set[str]]:
    """The groups of one layer's matrices, by the names of their modules."""
    stream = Stream(ModelSource(build(family)), random_ids(6, 24), StreamSettings(batch_size=2))
    layer = next(layer for layer in stream if layer.index == layer_index)
    groups = layer.observe(dict.fromkeys(layer.matrices, Gram))
    return [{name.removeprefix(layer.name + ".") for name in group.names} for group in groups]


def under(prefix: str, *names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


QKV = ("q_proj", "k_proj", "v_proj")

LLAMA = [
    under("self_attn", *QKV), {"self_attn.o_proj"}, under("mlp", "gate_proj", "up_proj"), {"mlp.down_proj"},
]  # fmt: skip

GROUPS: dict[str, list[set[str]]] = {
    "llama": LLAMA,
    "gemma2": LLAMA,
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
    "opt": [under("self_attn", *QKV), {"self_attn.out_proj"}, {"fc1"}, {"fc2"}],
    # Blocks in parallel read the output of one norm.
    "gptj": [under("attn", *QKV) | {"mlp.fc_in"}, {"attn.out_proj"}, {"mlp.fc_out"}],
    "falcon-7b": [
        {"self_attention.query_key_value", "mlp.dense_h_to_4h"}, {"self_attention.dense"}, {"mlp.dense_4h_to_h"},
    ],
    "falcon-40b": [
        {"self_attention.query_key_value"}, {"self_attention.dense"}, {"mlp.dense_h_to_4h"}, {"mlp.dense_4h_to_h"},
    ],
    "cohere": [
        under("self_attn", *QKV) | under("mlp", "gate_proj", "up_proj"), {"self_attn.o_proj"}, {"mlp.down_proj"},
    ],
    "mamba": [{"mixer.in_proj"}, {"mixer.x_proj"}, {"mixer.dt_proj"}, {"mixer.out_proj"}],
    # Latent attention; the first layer is dense.
    "deepseek_v3": [
        under("self_attn", "q_a_proj", "kv_a_proj_with_mqa"), {"self_attn.q_b_proj"}, {"self_attn.kv_b_proj"},
        {"self_attn.o_proj"}, under("mlp", "gate_proj", "up_proj"), {"mlp.down_proj"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", GROUPS)
def test_groups_are_found_from_the_data_flow(family: str) -> None:
    found = groups_of(family)
    assert sorted(map(sorted, found)) == sorted(map(sorted, GROUPS[family]))


def test_fused_experts_are_groups_of_their_own() -> None:
    found = groups_of("qwen3_moe", layer_index=1)
    experts = [group for group in found if any("experts" in name for name in group)]
    kinds = ("gate_up_proj", "down_proj")
    assert sorted(map(sorted, experts)) == sorted([f"mlp.experts.{e}.{kind}"] for e in range(6) for kind in kinds)


def test_gate_and_up_of_stacked_experts_share_a_gram() -> None:
    found = groups_of("dbrx")
    assert {"ffn.experts.mlp.0.w1", "ffn.experts.mlp.0.v1"} in found
    assert {"ffn.experts.mlp.0.w2"} in found


# With two tokens, at most four of eight experts are chosen.
EIGHT_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "deepseek_v3": {},
    "granitemoe": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8},
    "jetmoe": {"num_local_experts": 8},
    "llama4": {"num_local_experts": 8},
    "dbrx": {},
}


@pytest.mark.parametrize("family", EIGHT_EXPERTS)
def test_experts_without_tokens_get_a_prior(family: str, tmp_path: Path) -> None:
    """The report says which experts were never chosen, and their matrices are pruned all the same."""
    save(build(family, **EIGHT_EXPERTS[family]), tmp_path / "source")
    settings = recipe(calibration={"source": "self", "samples": 1, "length": 2}, experts={"min_tokens": 16})
    report = prune(tmp_path / "source", settings, tmp_path / "output")
    idle = [row for row in report.rows if row.tokens == 0]
    assert idle
    assert all(row.zeros == row.shape[0] * row.shape[1] // 2 for row in idle)
    assert all(row.tokens + row.prior_tokens == 16 for row in report.rows if row.prior_tokens)
    assert {row.name for row in idle} <= {row.name for row in report.rows if row.prior_tokens}
    assert all(row.tokens == 2 for row in report.rows if not row.prior_tokens)


def test_routers_and_their_corrections_stay(tmp_path: Path) -> None:
    save(build("deepseek_v3"), tmp_path / "source")
    prune(tmp_path / "source", recipe(), tmp_path / "output")
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "output")
    routers = [key for key in before if ".mlp.gate." in key]
    assert {key.rpartition(".")[2] for key in routers} == {"weight", "e_score_correction_bias"}
    assert all(same(after[key], before[key]) for key in routers)
    assert any(".mlp.experts.7.gate_proj.weight" in key for key in after)
    assert not any("gate_up_proj" in key for key in after)


def test_experts_are_watched_whatever_their_implementation() -> None:
    eager, fused = build("qwen3_moe"), build("qwen3_moe")
    fused.set_experts_implementation("grouped_mm")
    found = []
    for model in (eager, fused):
        for layer in Stream(ModelSource(model), random_ids(4, 16), StreamSettings(batch_size=2)):
            groups = layer.observe(dict.fromkeys(layer.matrices, Gram))
            found.append({name: group.statistics for group in groups for name in group.names})
    for expected, watched in zip(found[:3], found[3:], strict=True):
        assert expected.keys() == watched.keys()
        assert all(torch.equal(gram.products, watched[name].products) for name, gram in expected.items())
    assert fused.config._experts_implementation == "grouped_mm"


def test_a_decoder_without_its_encoder_is_pruned_without_cross_attention(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bart", vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, is_encoder_decoder=False, is_decoder=True,
    )  # fmt: skip
    save(AutoModelForCausalLM.from_config(config), tmp_path / "source")
    with pytest.raises(ModelError, match=r"encoder_attn\.k_proj was not used in any matmul .*and 3 more") as caught:
        prune(tmp_path / "source", recipe(), tmp_path / "output")
    exclude = json.loads(caught.value.fix.partition("exclude: ")[2])
    report = prune(tmp_path / "source", recipe(exclude=exclude), tmp_path / "output", overwrite=True)
    assert len(report.rows) == 2 * 6
