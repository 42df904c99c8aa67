"""Text that a model writes itself."""

from collections import Counter

import pytest
import torch
from documents import BOS, TESTBED
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmprune.errors import NumericsError
from llmprune.text.generated import generate_text
from llmprune.text.scripts import Script
from llmprune.text.tokens import TextSpec


def documents(bos):
    """One script: every document begins with this token, or with nothing."""
    return (Script(((),) if bos is None else ((bos,),)),)


@pytest.fixture(scope="module")
def testbed():
    return AutoModelForCausalLM.from_pretrained(TESTBED, dtype=torch.float32)


def tiny_model(vocabulary=32, *, positions=64, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=positions, **sizes, num_key_value_heads=1, **settings
    )
    model = LlamaForCausalLM(config).eval()
    # A fresh model is nearly uniform; sharper logits make a mistake visible.
    model.lm_head.weight.data *= 20
    return model


def test_generated_text_follows_the_seed_and_not_the_global_state(testbed):
    spec = TextSpec(samples=3, length=24, seed=3)
    torch.manual_seed(1)
    first = generate_text(testbed, spec, documents(BOS))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = generate_text(testbed, spec, documents(BOS))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, generate_text(testbed, TextSpec(samples=3, length=24, seed=4), documents(BOS)))
    assert first.shape == (3, 24)
    assert first.dtype == torch.int64
    assert (first[:, 0] == BOS).all()
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_generated_text_is_likely_text(testbed):
    """The mean log-likelihood of the samples agrees with the entropy of the distributions that they came from."""
    ids = generate_text(testbed, TextSpec(samples=8, length=64, top_p=1.0), documents(BOS))
    with torch.no_grad():
        logs = testbed(ids).logits[:, :-1].log_softmax(-1)
    likelihood = logs.gather(-1, ids[:, 1:, None]).mean()
    entropy = (logs.exp() * -logs).sum(-1).mean()
    assert abs(float(likelihood + entropy)) < 0.25


@pytest.mark.parametrize("bos", [3, None])
def test_cached_sampling_equals_sampling_without_cache(bos):
    model, length, temperature = tiny_model(eos_token_id=None), 20, 0.8
    ids = generate_text(
        model, TextSpec(samples=3, length=length, seed=11, temperature=temperature, top_p=1.0), documents(bos)
    )
    draws = torch.rand(3, length, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for row, draw in zip(ids.tolist(), draws, strict=True):
        assert row[0] == (int(draw[0] * 32) if bos is None else bos)
        for position in range(1, length):
            with torch.no_grad():
                logits = model(torch.tensor([row[:position]]), use_cache=False).logits[0, -1]
            cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
            assert row[position] == int((cumulative <= draw[position]).sum())


def test_sampling_does_not_depend_on_the_batch():
    model, spec = tiny_model(), TextSpec(samples=5, length=16)
    assert torch.equal(
        generate_text(model, spec, documents(1), batch=2), generate_text(model, spec, documents(1), batch=5)
    )


def test_models_without_a_cache_are_sampled_too(monkeypatch):
    model, spec = tiny_model(), TextSpec(samples=2, length=12)
    cached = generate_text(model, spec, documents(1))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **_: forward(input_ids, use_cache=False))
    assert torch.equal(generate_text(model, spec, documents(1)), cached)


def test_sampling_frequencies_follow_the_distribution():
    model = tiny_model(4, eos_token_id=None)
    model.lm_head.weight.data.zero_()
    counts = Counter(
        generate_text(model, TextSpec(samples=100, length=41), documents(0), batch=100)[:, 1:].flatten().tolist()
    )
    # 4000 draws of four equal tokens: 1000 each, with a standard deviation of 27.
    assert all(abs(counts[token] - 1000) < 110 for token in range(4))


def test_low_temperature_is_greedy():
    model = tiny_model(eos_token_id=None)
    ids = generate_text(model, TextSpec(samples=1, length=16, temperature=1e-4), documents(1))
    with torch.no_grad():
        assert ids[0, 1:].tolist() == model(ids).logits[0, :-1].argmax(-1).tolist()


@pytest.mark.parametrize("ends", [5, [5, 6]])
def test_a_bos_follows_every_eos(ends):
    model = tiny_model(8, eos_token_id=ends)
    model.lm_head.weight.data.zero_()
    ids = generate_text(model, TextSpec(samples=8, length=64), documents(2))
    ended = torch.isin(ids[:, :-1], torch.tensor(ends))
    assert ended.sum() > 40
    assert (ids[:, 1:][ended] == 2).all()
    # Tokens after a BOS are sampled again, not all the same.
    assert len(set(ids[:, 1:][ids[:, :-1] == 2].tolist())) == 8


def test_one_token_for_bos_and_eos_is_not_repeated_for_ever():
    model = tiny_model(8, eos_token_id=5)
    model.lm_head.weight.data.zero_()
    ids = generate_text(model, TextSpec(samples=8, length=64), documents(5))
    assert len(set(ids[:, 1:][ids[:, :-1] == 5].tolist())) == 8


def test_no_bos_starts_from_seeded_tokens_and_runs_through_eos():
    model = tiny_model(8, eos_token_id=5)
    model.lm_head.weight.data.zero_()
    ids = generate_text(model, TextSpec(samples=64, length=8), documents(None), batch=64)
    assert set(ids[:, 0].tolist()) == set(range(8))
    assert len(set(ids[:, 1:][ids[:, :-1] == 5].tolist())) == 8


def test_dropout_is_off_while_sampling_and_on_again_after():
    model = tiny_model(attention_dropout=0.9)
    spec = TextSpec(samples=2, length=16)
    expected = generate_text(model, spec, documents(1))
    assert torch.equal(generate_text(model.train(), spec, documents(1)), expected)
    assert model.training


def test_models_without_a_limit_of_positions():
    config = BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ids = generate_text(BloomForCausalLM(config), TextSpec(samples=1, length=12), documents(1))
    assert ids.shape == (1, 12)


def test_a_token_without_probability_is_never_drawn(monkeypatch):
    model = tiny_model(8, eos_token_id=None)
    forward = model.forward

    def refuse_token_0(**inputs):
        output = forward(**inputs)
        output.logits[..., 0] = -torch.inf
        return output

    monkeypatch.setattr(model, "forward", refuse_token_0)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    assert generate_text(model, TextSpec(samples=1, length=8), documents(3)).tolist() == [[3, 1, 1, 1, 1, 1, 1, 1]]


def test_logits_that_are_not_finite():
    model = tiny_model()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NumericsError, match=r"lm_head\.weight contains NaN or infinity: .* 2 of 2 sequences"):
        generate_text(model, TextSpec(samples=2, length=8), documents(1))
