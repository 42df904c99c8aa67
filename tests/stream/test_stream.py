"""The stream's own promises: what the statistics see, what the layers are handed, and whose fault an error is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from streams import IDS, final_states, in_turn, observe, stream, walk, wired
from tiny_models import build, random_ids, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import ModelError, NumericsError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.statistics import ColumnNorm, Gram
from llmprune.stream.activations import HiddenStates, LayerCalls
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.windows import windows


def grams(model: PreTrainedModel, **settings: Any) -> dict[str, Gram]:
    first = next(iter(stream(model, **settings)))
    return {name: group.statistics for group in observe(first) for name in group.names}


def test_a_single_layer_is_streamed() -> None:
    model = build("llama", num_hidden_layers=1)
    run = stream(model, outputs=True)
    assert [layer.name for layer in run] == ["model.layers.0"]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in run.batches]
    assert all(torch.equal(*pair) for pair in zip([x for _, (x,) in run.logits(run.hidden)], expected, strict=True))


def test_budget_zero_puts_hidden_states_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = stream(build("llama"), activation_budget=0)
    next(iter(run))
    assert run.hidden.resident_bytes == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(run.batches) == 3
    run.hidden = HiddenStates(0)
    assert list(tmp_path.rglob("*.safetensors")) == []
    spilled, resident = (final_states(build("gemma3"), activation_budget=b) for b in (0, 1 << 30))
    assert all(torch.equal(*pair) for pair in zip(spilled, resident, strict=True))


def test_hidden_states_move_between_memory_and_disk() -> None:
    states = HiddenStates(100)
    states[0], states[1] = torch.ones(20), torch.ones(20)
    assert (len(states), states.resident_bytes) == (2, 80)
    states[1] = torch.zeros(5)
    assert (len(states), states.resident_bytes) == (2, 100)
    states[0] = torch.full((40,), 2.0)
    assert states.resident_bytes == 20
    assert states[0].tolist() == [2.0] * 40
    assert states[1].tolist() == [0.0] * 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "jetmoe", "mamba"])
@pytest.mark.parametrize("length", [12, 1])
def test_statistics_do_not_depend_on_the_batch_size(family: str, length: int) -> None:
    """A batch of one token leaves most experts without any."""
    one, three = (grams(build(family), ids=random_ids(12, length), batch_size=size) for size in (1, 3))
    assert one.keys() == three.keys()
    for name, gram in one.items():
        assert gram.tokens == three[name].tokens
        torch.testing.assert_close(gram.products, three[name].products, rtol=1e-4, atol=1e-5)


def test_held_back_rows_never_enter_the_statistics() -> None:
    without = grams(build("llama"), ids=IDS[:3])
    with_others = grams(build("llama"), held_back=2)
    assert all(torch.equal(gram.products, with_others[name].products) for name, gram in without.items())
    run = stream(build("llama"), held_back=2)
    assert [len(batch) for batch in run.batches] == [2, 1, 2]
    group = observe(next(iter(run)))[0]
    assert torch.cat(group.held_back).shape == (24, 32)


def test_without_statistics_nothing_is_summed() -> None:
    groups = observe(next(iter(stream(build("llama")))), None)
    assert all(group.statistics is None for group in groups)
    assert len(groups) == 4


def test_matrices_that_need_less_share_a_gram() -> None:
    layer = next(iter(stream(build("llama"))))
    prefix = "model.layers.0.self_attn."
    needs: dict[str, Any] = {f"{prefix}q_proj": Gram, f"{prefix}k_proj": ColumnNorm, f"{prefix}v_proj": None}
    (group,) = layer.observe(needs)
    assert group.names == list(needs)
    first, second = layer.observe({f"{prefix}q_proj": ColumnNorm, f"{prefix}k_proj": Gram})
    assert isinstance(first.statistics, ColumnNorm)
    assert isinstance(second.statistics, Gram)
    torch.testing.assert_close(first.statistics.squares, second.statistics.squares)


def test_only_named_matrices_are_watched() -> None:
    layer = next(iter(stream(build("mixtral"))))
    name = "model.layers.0.mlp.experts.2.gate_up_proj"
    (group,) = layer.observe({name: Gram})
    assert group.names == [name]


def test_watching_some_experts_of_a_product_over_all() -> None:
    model = build("llama4")
    layer = next(layer for layer in stream(model) if layer.index == 1)
    whole = {name: group for group in observe(layer) for name in group.names}
    name = "model.layers.1.feed_forward.experts.2.down_proj"
    (group,) = layer.observe({name: Gram})
    assert torch.equal(group.statistics.products, whole[name].statistics.products)
    assert 0 < group.statistics.tokens < IDS.numel()


def test_stopping_early_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second batch on, a layer runs only as far as its last matrix that is watched."""
    calls = 0
    linear = F.linear

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return linear(*args)

    layer = next(iter(stream(build("llama"))))
    whole = observe(layer)
    name = "model.layers.0.self_attn.q_proj"
    for module in layer.module.modules():
        if isinstance(module, nn.Linear):
            monkeypatch.setattr(module, "forward", lambda x, m=module: counted(x, m.weight, m.bias))
    (group,) = layer.observe({name: Gram})
    assert calls == 7 + 1 + 1
    assert torch.equal(group.statistics.products, whole[0].statistics.products)


def test_a_matrix_that_is_used_twice_is_summed_twice() -> None:
    run = stream(wired(lambda block, x: block.linear(block.linear(x).tanh()), in_turn))
    layer = next(iter(run))
    (group,) = observe(layer)
    inputs = torch.cat([run.hidden[batch] for batch in range(3)]).reshape(-1, 32)
    both = torch.cat([inputs, layer.module.linear(inputs).tanh()])
    assert group.statistics.tokens == len(both)
    torch.testing.assert_close(group.statistics.products, both.T @ both)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("visit", [observe, lambda layer: layer.weight(f"{layer.name}.mlp.up_proj")])
def test_a_weight_that_is_not_finite_is_named(value: float, visit: Callable[[ResidentLayer], Any]) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(NumericsError, match=r"model\.layers\.1: the parameter mlp\.up_proj\.weight holds 1 value"):
        walk(stream(model), visit)


def test_an_input_that_is_not_finite_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.bias.fill_(1e30)
        model.model.layers[1].mlp.up_proj.bias.fill_(1e30)
    with pytest.raises(
        NumericsError, match=r"model\.layers\.1: the input of model\.layers\.1\.mlp\.down_proj holds 48 "
    ):
        walk(stream(model), observe)


def test_an_output_that_is_not_finite_names_the_layer() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias.fill_(3e38)
        model.model.layers[1].self_attn.o_proj.bias.fill_(3e38)
    with pytest.raises(NumericsError, match=r"model\.layers\.1: the output of model\.layers\.1"):
        walk(stream(model, outputs=True), lambda layer: None)


def test_unused_matrices_are_named_with_a_way_out() -> None:
    class Unused(nn.Linear):
        pass

    model = build("llama")
    model.model.layers[0].spare = nn.ModuleList([Unused(4, 4), Unused(4, 4)])
    with pytest.raises(ModelError, match=r"layers\.0\.spare\.0 was not used in any matmul .*and 1 more") as caught:
        observe(next(iter(stream(model))))
    assert caught.value.fix == 'leave them dense: exclude: ["*.spare.0", "*.spare.1"]'


def test_a_layout_that_was_guessed_wrong_is_refused() -> None:
    """A square weight that is stored the other way round would pass every check of shapes."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.rand(2, 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x + sum(x @ weight for weight in self.up)

    model = build("llama")
    model.model.layers[0].mlp = Mixture()
    with pytest.raises(ModelError, match=r"the layout of model\.layers\.0\.mlp\.0\.up is unknown") as caught:
        observe(next(iter(stream(model))))
    assert 'exclude: ["*.mlp.*.up"]' in caught.value.fix


# Models whose layers are wired in ways of their own.


def test_equal_arguments_are_stored_once() -> None:
    calls = LayerCalls(torch.device("cpu"))
    calls.learn(torch.zeros(1))
    for batch in range(2):
        mask = torch.ones(4)
        for layer in range(3):
            calls.record(layer, batch, (mask, {"inner": [mask.clone()]}), {"mask": torch.ones(4), "flag": True})
        calls.end_batch()
    assert calls.nbytes == 16
    (args, kwargs) = calls.get(2, 1)
    assert torch.equal(args[0], torch.ones(4))
    assert kwargs["flag"] is True


def test_an_abandoned_stream_lets_go(tmp_path: Path) -> None:
    source = CheckpointSource(save(build("llama"), tmp_path))
    layers = iter(Stream(source, IDS, StreamSettings(batch_size=2)))
    next(layers)
    layers.close()
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert all("forward" not in vars(layer) for layer in source.layers)


def test_hooks_of_a_dispatched_model_survive() -> None:
    """Accelerate keeps its hooks in a `forward` of the instance."""
    model = build("llama")
    seen = []
    layer = model.model.layers[0]
    original = layer.forward

    def hooked(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden_states.shape)
        return original(hidden_states, *args, **kwargs)

    layer.forward = hooked
    walk(stream(model), observe)
    assert layer.forward is hooked
    assert seen


def test_logits_leave_gradients_as_they_are() -> None:
    run = stream(build("llama"), outputs=True)
    walk(run, lambda layer: None)
    with torch.enable_grad():
        for _ in zip(run.logits(run.hidden), run.logits(run.hidden), strict=True):
            assert torch.is_grad_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("shape", "most", "parts"),
    [
        ((3, 5), 15, [(0, 3, 0, 5)]),
        ((3, 5), 14, [(0, 2, 0, 5), (2, 3, 0, 5)]),
        ((2, 5), 5, [(0, 1, 0, 5), (1, 2, 0, 5)]),
        ((2, 5), 4, [(0, 1, 0, 3), (0, 1, 3, 5), (1, 2, 0, 3), (1, 2, 3, 5)]),
        ((1, 3), 1, [(0, 1, 0, 1), (0, 1, 1, 2), (0, 1, 2, 3)]),
    ],
)
def test_windows_cover_a_batch_once_and_in_order(
    shape: tuple[int, int], most: int, parts: list[tuple[int, int, int, int]]
) -> None:
    found = list(windows(0, shape, most))
    assert [(w.samples.start, w.samples.stop, w.positions.start, w.positions.stop) for w in found] == parts
    assert [w.is_whole for w in found] == [len(parts) == 1] * len(parts)


def test_the_logits_of_a_window_take_no_more_than_the_limit() -> None:
    run = stream(build("llama"), outputs=True)
    walk(run, lambda layer: None)
    done: list[tuple[int, int]] = []
    limit = 4 * 128 * 5
    sizes = [
        logits.numel() * 4
        for _, (logits,) in run.logits(run.hidden, limit_bytes=limit, watch=lambda *d: done.append(d))
    ]
    assert max(sizes) <= limit < 4 * 128 * 12
    assert done[-1] == (60, 60)
    assert len(done) == len(sizes) == 5 * 3


def test_hidden_states_in_a_shape_of_their_own_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five samples of five tokens, it's not clear which dimension is which where the hidden size is five, too."""
    ids = random_ids(5, 5)
    heads_of_8 = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    run = stream(build("llama", hidden_size=5, **heads_of_8), ids, batch_size=5, outputs=True)
    walk(run, lambda layer: None)
    heads: list[tuple[int, ...]] = []
    head = run.head
    monkeypatch.setattr(run, "head", lambda ids, final: (heads.append(tuple(ids.shape)), head(ids, final))[1])
    whole = [logits for _, (logits,) in run.logits(run.hidden)]
    parts = [logits for _, (logits,) in run.logits(run.hidden, limit_bytes=4 * 128 * 3)]
    assert heads == [(5, 5), (5, 5)]
    assert len(parts) == 10
    assert torch.equal(torch.cat(parts, 1).reshape(whole[0].shape), whole[0])
