"""Individual query heads of grouped-query attention, the same number removed from each KV head."""

import pytest
import torch
from shrinking import Cuts, logits, masked_logits, shrunk_state
from tiny_models import FAMILIES, build, every_family, known, random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.errors import ModelError, PatternError
from llmprune.models.decoder import Decoder
from llmprune.models.uneven import build_decoder
from llmprune.structures.describe.audit import audit
from llmprune.structures.describe.configuration import smaller_config, uneven_config
from llmprune.structures.find.discovery import Structure, find_query_heads, find_structures
from llmprune.structures.remove.cuts import Cut
from llmprune.structures.remove.problem import RemovalSettings
from llmprune.structures.remove.solver import remove_groups

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SINGLE = "already single query heads"
NORMED = "is normalised over all groups"
FIXED = "fixed"  # exact, but the config cannot express it
NONE = "none"
# The other families' query heads go exactly.
EXCEPTIONS = {
    **dict.fromkeys(
        ("openai-gpt", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox", "gpt_neox-sequential"), SINGLE
    ),
    **dict.fromkeys(("opt", "opt-350m", "bloom", "falcon-7b", "falcon-rw", "mpt", "xglm", "jetmoe"), SINGLE),
    **dict.fromkeys(("deepseek_v3", "deepseek_v4", "glm_moe_dsa"), SINGLE),
    **dict.fromkeys(("falcon-40b", "dbrx", "recurrent_gemma"), FIXED),
    # Layers that read the keys and values of others have none to tell their query heads by.
    **dict.fromkeys(("gemma3n", "gemma4"), FIXED),
    **dict.fromkeys(("olmo2", "olmoe", "zaya"), NORMED),
    "stablelm": "different shares of self_attn.q_layernorm",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv"), NONE),
}


def equal_cuts(found: list[list[Structure]], removed: int = 1) -> Cuts:
    """Cuts of so many query heads of each key and value head, other ones in each group and layer."""
    cuts: Cuts = {}
    for layer, structures in enumerate(found):
        for structure in structures:
            length = structure.groups // structure.partitions
            gone = [
                run * length + (run + layer + step) % length
                for run in range(structure.partitions)
                for step in range(removed)
            ]
            if structure.refusal is None:
                cuts.setdefault(layer, []).append(Cut(structure, tuple(gone)))
    return cuts


def check_exactness(model: PreTrainedModel, cuts: Cuts) -> None:
    config = smaller_config(model.config, cuts)
    state = shrunk_state(model, cuts)
    assert audit(config, {name: tensor.shape for name, tensor in state.items()}) == []
    small = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    small.load_state_dict(state)
    ids = random_ids(2, 20)
    dense, masked = logits(model, ids), masked_logits(model, cuts, ids)
    scale = float(dense.abs().max())
    assert float((logits(small, ids) - masked).abs().max()) < 2e-6 * scale
    assert float((dense - masked).abs().max()) > 1e-2 * scale, "what was removed had no effect"


@every_family
def test_the_shrunk_model_computes_what_the_masked_one_does(family: str) -> None:
    if not known(family):
        pytest.skip(f"this transformers does not know {FAMILIES[family][0]}")
    model = build(family)
    found = find_query_heads(Decoder.find(model))
    expected = EXCEPTIONS.get(family)
    refusals = [structure.refusal for structures in found for structure in structures if structure.refusal]
    if expected is None:
        assert not refusals
        check_exactness(model, equal_cuts(found))
    elif expected == FIXED:
        with pytest.raises(ModelError, match=r"^no (attribute|config)"):
            smaller_config(model.config, equal_cuts(found))
    elif expected == NONE:
        assert found == [[] for _ in found]
    else:
        assert equal_cuts(found) == {}
        assert any(expected in refusal for refusal in refusals)


def test_keys_and_values_stay() -> None:
    structure = find_query_heads(Decoder.find(build("llama")))[0][0]
    assert (structure.kind, structure.groups, structure.columns, structure.partitions) == ("heads", 4, 8, 2)
    index = torch.arange(32).view(4, 8).tolist()
    assert [(part.name, part.dim, part.index.tolist()) for part in structure.slices] == [
        ("self_attn.q_proj.weight", 0, index),
        ("self_attn.q_proj.bias", 0, index),
        ("self_attn.o_proj.weight", 1, index),
    ]


def test_rows_of_a_fused_matrix() -> None:
    """Falcon puts the query heads of each group before its key and value."""
    structure = find_query_heads(Decoder.find(build("falcon-40b")))[0][0]
    rows = structure.slices[0].index
    assert structure.slices[0].name == "self_attention.query_key_value.weight"
    assert rows[:, 0].tolist() == [0, 8, 32, 40]


@pytest.mark.parametrize("removed", [1, 2, 3])
def test_four_query_heads_of_each_key_and_value(removed: int) -> None:
    model = build("qwen3", num_attention_heads=8, num_key_value_heads=2)
    cuts = equal_cuts(find_query_heads(Decoder.find(model)), removed)
    config = smaller_config(model.config, cuts)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8 - 2 * removed, 2)
    check_exactness(model, cuts)


def test_layers_may_lose_different_numbers() -> None:
    model = build("qwen3", num_attention_heads=8, num_key_value_heads=2)
    found = find_query_heads(Decoder.find(model))
    cuts = {0: equal_cuts(found, 1)[0], 1: equal_cuts(found, 3)[1]}
    small = build_decoder(uneven_config(model.config, cuts)).model
    small.load_state_dict(shrunk_state(model, cuts), assign=True)
    ids = random_ids(2, 20)
    assert torch.allclose(logits(small, ids), masked_logits(model, cuts, ids), rtol=0, atol=2e-6)


def test_each_key_and_value_keeps_as_many() -> None:
    structure = find_query_heads(Decoder.find(build("llama")))[0][0]
    with pytest.raises(PatternError, match="0 to 1 of each 2 groups"):
        Cut(structure, (0,))
    with pytest.raises(PatternError, match="0 to 2 of each 2"):
        Cut(structure, (2, 3))


def test_the_solver_takes_the_partitions() -> None:
    structure = find_query_heads(Decoder.find(build("llama")))[0][0]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :16] *= 0.01  # alone, the first two heads would go
    settings = RemovalSettings(partitions=structure.partitions)
    removal = remove_groups(torch.eye(32, dtype=torch.float64), x.T @ x, structure.columns, 2, settings)
    assert Cut(structure, tuple(removal.removed.tolist())).kept == 2


def test_whole_groups_are_found_as_before() -> None:
    """One query head a key and value: both searches would remove the same."""
    model = build("qwen3", num_key_value_heads=4)
    assert SINGLE in str(find_query_heads(Decoder.find(model))[0][0].refusal)
    whole = next(s for s in find_structures(Decoder.find(model))[0] if s.kind == "heads")
    assert (whole.groups, whole.columns, whole.partitions) == (4, 16, 1)
