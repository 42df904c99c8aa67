"""What tokenizers put in front of a text, and what self-generated sequences begin with and go on by."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from documents import BOS, TESTBED, without_opening
from test_generated import tiny_model
from tiny_models import tokenizer as words
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmprune.text.generated import generate_text
from llmprune.text.openings import named, opening_of
from llmprune.text.scripts import UNSCRIPTED, Script, scripts_of
from llmprune.text.tokens import TextSpec

EOS = 1
CHATML = (
    "{% for message in messages %}{{ 'a' + message['role'] + ':' + message['content'] + '</s>' + 'b' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'aassistant:' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TESTBED)


class Added:
    """A tokenizer of letters that adds tokens before and after."""

    bos_token_id = 7

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def __call__(self, text: list[str], *, add_special_tokens: bool = True, **options: Any) -> Mapping[str, Any]:
        ids = [[ord(letter) for letter in one] for one in text]
        return {"input_ids": [[*self.before, *own, *self.after] if add_special_tokens else own for own in ids]}


@pytest.mark.parametrize(("before", "after"), [([7], []), ([7], [8]), ([], [8]), ([], []), ([5, 6], [8])])
def test_the_opening_is_what_is_added_in_front(before: list[int], after: list[int]) -> None:
    assert opening_of(Added(before, after)) == tuple(before)


def test_the_tokenizer_is_asked_and_not_its_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert opening_of(tokenizer) == (BOS,)
    assert named(tokenizer, (BOS,)) == ["<s>"]
    assert named(Added([], []), (7,)) == ["7"]
    assert opening_of(without_opening(tokenizer)) == ()
    assert tokenizer.bos_token_id == BOS


def test_a_vocabulary_without_the_probe_says_what_it_adds_to_nothing() -> None:
    assert opening_of(words()) == tuple(words()("")["input_ids"])


def test_documents_begin_with_the_opening_or_with_what_separates_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    assert scripts_of(tokenizer) == (Script(((BOS,),)),)
    assert scripts_of(without_opening(tokenizer)) == (Script(((EOS,),)),)
    tokenizer.eos_token = None
    assert scripts_of(tokenizer) == (Script(((BOS,),)),)
    tokenizer.bos_token = None
    assert scripts_of(tokenizer) == (UNSCRIPTED,)


def test_half_of_the_sequences_of_a_model_that_chats_are_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    documents, conversation = scripts_of(without_opening(tokenizer))

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    # EOS ends the turns here; no other special token separates documents but </s> itself.
    assert documents == Script(((EOS,),))
    user, answer = ids("auser:"), (EOS, *ids("baassistant:"))
    assert conversation.segments == (user, answer, (EOS, *ids("b"), *user), answer)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% for", "fixed"])
def test_a_template_that_fails_leaves_documents(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    assert scripts_of(tokenizer) == (Script(((BOS,),)),)


def test_scripts_are_dealt_out_and_followed() -> None:
    model = tiny_model(8, eos_token_id=5)
    model.lm_head.weight.data.zero_()
    scripts = (Script(((1,),)), Script(((2, 3), (5, 4))))
    ids = generate_text(model, TextSpec(samples=6, length=200, top_p=1.0), scripts, batch=4)
    assert (ids[::2, 0] == 1).all()
    assert (ids[1::2, :2] == torch.tensor([2, 3])).all()
    for row, segments in zip(ids.tolist(), scripts * 3, strict=True):
        ends = [place for place, token in enumerate(row[:-3]) if token == 5]
        assert len(ends) > 5
        turns = [segments.segments[(turn + 1) % len(segments.segments)] for turn in range(len(ends))]
        for end, turn in zip(ends, turns, strict=True):
            expected = [token for token in turn if token != 5]
            assert row[end + 1 : end + 1 + len(expected)] == expected


def test_top_p_leaves_the_unlikely_out() -> None:
    model = tiny_model(8, eos_token_id=None)
    ids = generate_text(model, TextSpec(samples=16, length=32, top_p=0.5), (Script(((1,),)),))
    with torch.no_grad():
        probabilities = model(ids).logits[:, :-1].double().softmax(-1)
    chosen = probabilities.gather(-1, ids[:, 1:, None])
    # What is more likely than a chosen token has less than half of the probability.
    assert float((probabilities * (probabilities > chosen)).sum(-1).max()) < 0.5
    assert len(set(ids.flatten().tolist())) > 2


def test_sampling_tells_how_far_it_is() -> None:
    told: list[int] = []
    generate_text(tiny_model(), TextSpec(samples=5, length=8), batch=2, watch=told.append)
    assert told == sorted(told)
    assert told[-1] == 40
