"""What writes the output of an MLP: a map of it is absorbed exactly, or the layer is refused with the reason."""

import pytest
import torch
from streams import stream
from tiny_models import build, every_family, known

from llmprune.models.decoder import Decoder
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.find.mlp_outputs import find_mlp_outputs
from llmprune.structures.replacing import absorb, run_layer

CHANGED = "is changed before it is added"
NO_MLP = "has no MLP"
# family -> why the first layer's MLP cannot take up a map.
REFUSED = {
    **dict.fromkeys(["gemma2", "gemma3", "gemma3-vision", "gemma3n", "gemma4", "olmo2", "glm4"], CHANGED),
    **dict.fromkeys(["openai-gpt", "opt-350m", "deepseek_v4", "rwkv"], CHANGED),
    **dict.fromkeys(["mamba", "mamba2", "falcon_mamba", "nemotron_h"], NO_MLP),
    "zaya": "layers pass each other more than hidden states",
}


@every_family
def test_a_map_is_absorbed_exactly(family: str) -> None:
    """Random weights: the layer with the map in its matrices gives x + T m."""
    if not known(family):
        pytest.skip("not in this version of transformers")
    model = build(family)
    found = find_mlp_outputs(Decoder.find(model))
    refusal = found[0].refusal
    assert (refusal is not None) == (family in REFUSED), refusal
    if refusal is not None:
        assert REFUSED[family] in refusal
        return
    run = stream(model)
    run.capture()
    layer = ResidentLayer(run, 0)
    linear = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 32**0.5
    with torch.no_grad():
        whole = run_layer(layer, run.hidden, 0)
        rest = run_layer(layer, run.hidden, 0, without=(*found[0].matrices, *found[0].biases))
        absorb(layer, found[0], linear)
        wanted = rest + (whole - rest) @ linear.float().T
        assert not torch.allclose(whole, wanted, rtol=0, atol=1e-3)
        assert torch.allclose(run_layer(layer, run.hidden, 0), wanted, rtol=1e-4, atol=1e-5)
    assert layer.replaced == {*found[0].matrices, *found[0].biases}


def test_every_matrix_that_contributes_is_found() -> None:
    found = find_mlp_outputs(Decoder.find(build("qwen2_moe")))
    assert found[0].matrices == ("mlp.shared_expert.down_proj.weight", "mlp.experts.down_proj")
    assert find_mlp_outputs(Decoder.find(build("llama")))[1].biases == ("mlp.down_proj.bias",)
