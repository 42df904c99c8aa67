"""Generation over recorded steps writes what generation writes anyway.

CUDA graphs need a GPU. Here, the operations of a step are recorded: a replay runs no Python code of the model, it reads
and writes the same tensors, and recording fails where the model looks at a value, as with CUDA.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import save_packed
from tiny_models import build, random_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from llmprune.errors import ModelError
from llmprune.serving.decode_graphs import DecodeGraphs
from llmprune.serving.forms import Fragments
from llmprune.serving.fusion import fuse

IDS = random_ids(4, 6)
SHORT = {"max_new_tokens": 5, "do_sample": False}
LONG = {"max_new_tokens": 24, "do_sample": False}


class Operations(TorchDispatchMode):
    """Notes all operations with their tensors; the values of tensors cannot be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise RuntimeError(f"{function} waits for the device")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Recorder:
    """Records operations; each replay writes to the same tensors."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.records += 1
        function()
        with Operations() as operations:
            result = function()

        def replay() -> Tensor:
            self.replays += 1
            for operation, args, kwargs, written in operations.calls:
                news, olds = (tree_leaves(each) for each in (operation(*args, **kwargs), written))
                for new, old in zip(news, olds, strict=True):
                    if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)
            return result

        return replay


def recorded(family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel, Recorder]:
    """A stock model, the same with graphs from 8 tokens on, and its recorder."""
    stock, model, recorder = build(family, **changes), build(family, **changes), Recorder()
    DecodeGraphs(model, recorder, smallest=8)
    return stock, model, recorder


def written(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(ids, **{"eos_token_id": None, "pad_token_id": 0, **options})


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, padded on the left, and their mask."""
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, :row] = 0
    return ids * mask, mask


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "temperature": 2.0}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_writes_what_the_model_writes(batch: int, options: dict[str, Any]) -> None:
    stock, model, recorder = recorded()
    ids, mask = padded(IDS[:batch])
    for new_tokens in (5, 20, 3):
        wanted = written(stock, ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
        assert torch.equal(written(model, ids, attention_mask=mask, max_new_tokens=new_tokens, **options), wanted)
    assert recorder.replays >= 4 + 19 + 2


def test_sampling_is_not_always_the_same() -> None:
    stock, _, _ = recorded()
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10}
    assert not torch.equal(written(stock, IDS, **options), written(stock, IDS, **{**options, "do_sample": False}))


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3", "gpt2", "opt", "gpt_neox", "phi3"])
def test_serves_families_with_windows_and_without(family: str) -> None:
    stock, model, recorder = recorded(family)
    ids, mask = padded(IDS[:3])
    wanted = written(stock, ids, attention_mask=mask, **LONG)
    assert torch.equal(written(model, ids, attention_mask=mask, **LONG), wanted)
    assert recorder.replays == 23


def test_a_prompt_longer_than_the_window() -> None:
    stock, model, recorder = recorded("mistral")
    ids = random_ids(2, 21)
    assert torch.equal(written(model, ids, **SHORT), written(stock, ids, **SHORT))
    assert recorder.replays == 4


def test_serves_packed_and_fused_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragments, "refusal", lambda *_: None)
    folder = save_packed(tmp_path, hidden_size=64, intermediate_size=96) / "packed"
    stock, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    assert all(fuse(each, input_ids=IDS[:1, :1]) for each in (stock, model))
    recorder = Recorder()
    DecodeGraphs(model, recorder, smallest=8)
    assert torch.equal(written(model, IDS, **SHORT), written(stock, IDS, **SHORT))
    assert recorder.replays == 4


def test_ends_where_the_text_ends() -> None:
    stock, model, _ = recorded()
    free = written(stock, IDS, **LONG)
    ending = {"eos_token_id": int(free[2, 12])}
    wanted = written(stock, IDS, **LONG, **ending)
    assert (wanted[:, 7:] == 0).any(), "some text must end"
    assert torch.equal(written(model, IDS, **LONG, **ending), wanted)


def test_records_each_batch_and_length_once() -> None:
    _, model, recorder = recorded()
    written(model, IDS[:1], **SHORT)
    # The memory of 8 tokens was left for that of 16.
    assert (recorder.records, model.decode_graphs.recorded) == (2, [(1, 16)])
    written(model, IDS[:1], **SHORT)
    assert (recorder.records, model.decode_graphs.recorded) == (3, [(1, 16), (1, 8)])
    written(model, IDS[:1], **SHORT)
    assert recorder.records == 3


def test_moves_to_more_memory_for_a_longer_text() -> None:
    stock, model, recorder = recorded()
    for options in (SHORT, LONG, SHORT, LONG):
        assert torch.equal(written(model, IDS, **options), written(stock, IDS, **options))
    assert set(model.decode_graphs.recorded) == {(4, 8), (4, 16), (4, 32)}
    records = recorder.records
    # Less than four sequences of 32 tokens: the memory is there, so the graphs stay.
    assert torch.equal(written(model, IDS[:2], **LONG), written(stock, IDS[:2], **LONG))
    assert {(4, 8), (2, 8), (2, 32)} <= set(model.decode_graphs.recorded)
    assert recorder.records == records + 3


def test_moves_to_more_memory_for_a_longer_prompt() -> None:
    stock, model, _ = recorded()
    for ids in (IDS[:1], random_ids(1, 40), IDS[1:2]):
        assert torch.equal(written(model, ids, **SHORT), written(stock, ids, **SHORT))


def test_forgets_the_padding_of_the_last_prompts() -> None:
    stock, model, _ = recorded()
    ids, mask = padded(IDS)
    written(model, ids, attention_mask=mask, **SHORT)
    assert torch.equal(written(model, IDS, **SHORT), written(stock, IDS, **SHORT))


def test_warming_leaves_nothing_to_record() -> None:
    stock, model, recorder = recorded()
    model.decode_graphs.warm([1, 4], tokens=30)
    assert set(model.decode_graphs.recorded) == {(batch, room) for batch in (1, 4) for room in (8, 16, 32)}
    records = recorder.records
    for batch in (1, 4):
        assert torch.equal(written(model, IDS[:batch], **LONG), written(stock, IDS[:batch], **LONG))
    assert recorder.records == records


def test_what_lay_in_the_memory_does_not_matter() -> None:
    stock, model, _ = recorded()
    written(model, IDS, **LONG)
    for states in model.decode_graphs._memory.views(4, 32):
        for state in states:
            state.fill_(float("nan"))
    assert torch.equal(written(model, IDS, **LONG), written(stock, IDS, **LONG))


def test_inference_mode_leaves_nothing_behind() -> None:
    stock, model, _ = recorded()
    with torch.inference_mode():
        first = written(model, IDS, **LONG)
    assert torch.equal(first, written(stock, IDS, **LONG))
    assert torch.equal(written(model, IDS, **LONG), first)


def test_logits_are_those_of_the_model_and_stay() -> None:
    stock, model, recorder = recorded()
    options = {**LONG, "return_dict_in_generate": True, "output_logits": True}
    wanted, found = written(stock, IDS, **options), written(model, IDS, **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)
    assert recorder.replays == 23


def test_each_step_returns_logits_of_its_own() -> None:
    _, model, recorder = recorded()
    cache = written(model, IDS, **SHORT, return_dict_in_generate=True).past_key_values
    with torch.no_grad():
        first = model(IDS[:, :1], past_key_values=cache).logits
        kept = first.clone()
        model(IDS[:, 1:2], past_key_values=cache)
    assert torch.equal(first, kept)
    assert recorder.replays == 4 + 2


def test_goes_on_from_the_cache_that_it_returned() -> None:
    stock, model, _ = recorded()
    turns = []
    for each in (stock, model):
        first = written(each, IDS, **SHORT, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, random_ids(4, 9, seed=1)], dim=1)
        turns.append(written(each, ids, **LONG, past_key_values=first.past_key_values))
    assert torch.equal(turns[1], turns[0])


def test_an_overwritten_cache_is_refused() -> None:
    _, model, _ = recorded()
    old = written(model, IDS, **SHORT, return_dict_in_generate=True)
    written(model, random_ids(4, 6, seed=1), **SHORT)
    ids = torch.cat([old.sequences, IDS], dim=1)
    with pytest.raises(ModelError, match="overwritten by a later call"):
        written(model, ids, **SHORT, past_key_values=old.past_key_values)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_caller_stays_his(kind: str) -> None:
    stock, model, recorder = recorded()
    found = []
    for each in (stock, model):
        cache = (
            DynamicCache(config=each.config) if kind == "dynamic" else StaticCache(config=each.config, max_cache_len=32)
        )
        found.append(written(each, IDS, **LONG, past_key_values=cache))
        assert int(cache.get_seq_length()) == 6 + 23
    assert torch.equal(found[1], found[0])
    assert recorder.records == 0


def test_hidden_states_and_attentions_come_from_the_model() -> None:
    stock, model, recorder = recorded(attn_implementation="eager")
    options = {**LONG, "return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    wanted, found = written(stock, IDS, **options), written(model, IDS, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)
    assert len(found.attentions[-1]) == 2
    assert recorder.records == 0


def test_looking_up_the_prompt_still_works() -> None:
    stock, model, _ = recorded()
    ids = IDS[:1].repeat(1, 3)
    options = {**LONG, "prompt_lookup_num_tokens": 3}
    assert torch.equal(written(model, ids, **options), written(stock, ids, **options))


def test_a_forward_without_generate_is_the_models() -> None:
    stock, model, recorder = recorded()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)
        assert torch.equal(model(IDS, None, return_dict=False)[0], stock(IDS).logits)
    assert recorder.records == 0


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba", {}, r"layers of other kinds: LinearAttentionLayer"),
        ("openai-gpt", {}, "cannot be compiled"),
        ("llama", {"attn_implementation": "flex_attention"}, "uses the attention implementation 'flex_attention'"),
    ],
)
def test_refuses_what_it_cannot_record(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        DecodeGraphs(build(family, **changes), Recorder())


def test_says_why_recording_failed() -> None:
    # Experts one by one: which of them have work is read from the device.
    _, model, _ = recorded("mixtral")
    with pytest.raises(ModelError, match="a step of MixtralForCausalLM cannot be recorded: "):
        written(model, IDS, **SHORT)
