"""vLLM's own layers with packed matrices, as each rank of tensor parallelism builds them. Run by `make test-vllm`."""

from collections.abc import Iterator
from typing import Any

import engines
import pytest
import torch
from test_assembly import close, matrix
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.errors import CheckpointError, ModelError
from llmprune.storage.formats import Layout

pytestmark = [engines.needs_vllm, pytest.mark.slow]

PREFIX = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make vLLM's layers believe that they are on one of several ranks."""

    def be(rank: int, ranks: int) -> None:
        from vllm.model_executor.layers import linear

        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: ranks)

    return be


def config(layouts: dict[str, Layout | None], fused: dict[str, list[str]]) -> Any:
    from llmprune.vllm_plugin.method import LlmpruneConfig

    made = LlmpruneConfig({f"{PREFIX}.{name}": layout for name, layout in layouts.items() if layout})
    made.packed_modules_mapping = fused
    return made


def load(layer: nn.Module, tensors: dict[str, Tensor], shard_id: Any = None) -> None:
    for suffix, tensor in tensors.items():
        parameter = layer.get_parameter(suffix)
        parameter.weight_loader(parameter, tensor, *([] if shard_id is None else [shard_id]))


def run(layer: Any, x: Tensor) -> Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    layer.update_param_tp_status()
    found = layer(x)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layouts", [("nm", "nm", "nm"), ("block", "dense", "bitmask")], ids=str)
def test_q_k_and_v_with_a_bias(layouts: tuple[str, str, str], ranks: int, pretend: Any) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    x, biases = torch.randn(5, 64), [torch.randn(size) for size in (64, 32, 32)]
    names = ["q_proj", "k_proj", "v_proj"]
    matrices = {name: matrix(layouts[n], (64, 32, 32)[n], 64, n) for n, name in enumerate(names)}
    wanted = [F.linear(x, matrices[name][2], bias) for name, bias in zip(names, biases, strict=True)]
    for rank in range(ranks):
        pretend(rank, ranks)
        made = config({name: layout for name, (layout, _, _) in matrices.items()}, {"qkv_proj": names})
        layer = QKVParallelLinear(
            64, 16, 4, 2, bias=True, params_dtype=torch.float32, quant_config=made, prefix=f"{PREFIX}.qkv_proj"
        )
        for letter, (_, tensors, _), bias in zip("qkv", matrices.values(), biases, strict=True):
            load(layer, {**tensors, "bias": bias}, letter)
        heads, copies = 64 // ranks, max(1, ranks // 2)
        kv = 32 * copies // ranks
        own = slice(rank // copies * kv, (rank // copies + 1) * kv)
        parts = [wanted[0][:, rank * heads : (rank + 1) * heads], wanted[1][:, own], wanted[2][:, own]]
        assert close(run(layer, x), torch.cat(parts, 1))
        assert not [name for name, _ in layer.named_parameters() if name in ("values", "meta", "weight")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_gate_and_up_then_down(ranks: int, pretend: Any) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    gate, up, down = matrix("nm", 96, 64, 1), matrix("bitmask", 96, 64, 2), matrix("nm", 64, 96, 3)
    made = config(
        {"gate_proj": gate[0], "up_proj": up[0], "down_proj": down[0]}, {"gate_up_proj": ["gate_proj", "up_proj"]}
    )
    x, found, held = torch.randn(3, 64), torch.zeros(3, 64), 96 // ranks
    for rank in range(ranks):
        pretend(rank, ranks)
        options = {"bias": False, "params_dtype": torch.float32, "quant_config": made}
        wide = MergedColumnParallelLinear(64, [96, 96], prefix=f"{PREFIX}.gate_up_proj", **options)
        load(wide, gate[1], 0)
        load(wide, up[1], 1)
        one, other = run(wide, x).split(held, dim=1)
        narrow = RowParallelLinear(96, 64, reduce_results=False, prefix=f"{PREFIX}.down_proj", **options)
        load(narrow, down[1])
        found += run(narrow, F.silu(one) * other)
    assert close(found, F.linear(F.silu(F.linear(x, gate[2])) * F.linear(x, up[2]), down[2]))


def test_layers_without_a_packed_matrix_are_vllms_own() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    layout, tensors, weight = matrix("bitmask", 48, 64)
    made = config({"o_proj": layout}, {})
    other = ReplicatedLinear(64, 48, bias=False, quant_config=made, prefix=f"{PREFIX}.other")
    assert type(other.quant_method) is UnquantizedLinearMethod
    own = ReplicatedLinear(64, 48, bias=False, params_dtype=torch.float32, quant_config=made, prefix=f"{PREFIX}.o_proj")
    load(own, tensors)
    x = torch.randn(2, 64)
    assert close(run(own, x), F.linear(x, weight))


def test_dummy_weights_are_refused() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    made = config({"o_proj": matrix("nm", 48, 64)[0]}, {})
    layer = ReplicatedLinear(64, 48, bias=False, quant_config=made, prefix=f"{PREFIX}.o_proj")
    with pytest.raises(CheckpointError, match=r"o_proj: meta, values did not arrive(.|\n)*dummy"):
        layer.quant_method.process_weights_after_loading(layer)


def test_packed_matrices_in_layers_that_cannot_hold_them_are_refused() -> None:
    made = config({"experts.0.up_proj": matrix("nm", 48, 64)[0]}, {})
    with pytest.raises(
        ModelError, match=r"experts.0.up_proj is packed; vLLM holds it in a Module(.|\n)*llmprune unpack"
    ):
        made.get_quant_method(nn.Module(), f"{PREFIX}.experts")
    assert made.get_quant_method(nn.Module(), f"{PREFIX}.attn") is None


def test_a_compiled_layer_gives_the_same() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    parts = matrix("nm", 96, 64, 1), matrix("dense", 96, 64, 2)
    made = config({"gate_proj": parts[0][0]}, {"gate_up_proj": ["gate_proj", "up_proj"]})
    layer = MergedColumnParallelLinear(
        64, [96, 96], bias=False, params_dtype=torch.float32, quant_config=made, prefix=f"{PREFIX}.gate_up_proj"
    )
    for number, (_, tensors, _) in enumerate(parts):
        load(layer, tensors, number)
    x = torch.randn(5, 64)
    before = run(layer, x)
    compiled = torch.compile(lambda x: layer(x)[0], backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), before)
    assert torch.equal(compiled(x[:3].contiguous()), layer(x[:3].contiguous())[0])


def test_what_attention_reads_as_weights_is_dense() -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    layout, tensors, weight = matrix("nm", 96, 64)
    layer = ColumnParallelLinear(
        64,
        96,
        bias=False,
        params_dtype=torch.float32,
        quant_config=config({"kv_b_proj": layout}, {}),
        prefix=f"{PREFIX}.kv_b_proj",
    )
    layer._cpu_skip_gemm_dispatch = True  # as vLLM's attention marks it, because it reads the weights
    load(layer, tensors)
    x = torch.randn(3, 64)
    assert close(run(layer, x), F.linear(x, weight))
    assert torch.equal(get_and_maybe_dequant_weights(layer, torch.float32), weight)


def test_a_matrix_that_no_layer_asks_for_is_refused_before_weights_are_read() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    layout = matrix("nm", 48, 64)[0]
    made = config({"o_proj": layout, "in_proj": layout}, {})
    ReplicatedLinear(64, 48, bias=False, quant_config=made, prefix=f"{PREFIX}.o_proj")
    with pytest.raises(ModelError, match=r"no layer that asks how .*in_proj is packed(.|\n)*llmprune unpack"):
        made.get_checkpoint_weight_mapper()
    ReplicatedLinear(64, 48, bias=False, quant_config=made, prefix=f"{PREFIX}.in_proj")
    made.get_checkpoint_weight_mapper()


def test_names_are_mapped_as_vllm_maps_those_of_tensors() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    layout = matrix("nm", 48, 64)[0]
    made = config({"o_proj": layout}, {})
    made.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert made.layouts == {f"language_model.{PREFIX}.o_proj": layout}
