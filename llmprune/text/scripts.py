"""What self-generated sequences begin with, and what follows each end-of-sequence token.

A base model continues from whatever separates documents. An instruction-tuned model has seen little else than
conversations since, and writes word salad from a bare separator; where there is a chat template, half of the sequences
are conversations instead: the template's beginning of a user's turn, a request that the model makes up, the template's
beginning of an answer, the answer, and so on (Xu et al. 2024, Magpie, arXiv 2406.08464, section 2).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llmprune.text.openings import Tokenizer, encoded, opening_of

# How vocabularies spell what separates documents in pretraining, where fine-tuning has given the model another EOS.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>")

# Stand for the user's words and the model's: letters that no template has.
_USER, _ANSWER = "\ue000user\ue000", "\ue000answer\ue000"


@dataclass(frozen=True, slots=True)
class Script:
    """What is put into a sequence instead of being sampled.

    Attributes:
        segments: tokens at the beginning, then after the first end-of-sequence token, after the second, and so on, from
            the front again after the last. An end-of-sequence token that a segment begins with is not repeated.
    """

    segments: tuple[tuple[int, ...], ...]


# Without any token to begin with, a sequence begins with a random one.
UNSCRIPTED = Script(((),))


def scripts_of(tokenizer: Tokenizer) -> tuple[Script, ...]:
    """The scripts that suit a model, to be dealt out to its sequences in turn: documents, and conversations.

    Args:
        tokenizer: the model's; without a chat template, or with one that fails (see `template_problem`), there are no
            conversations.
    """
    conversation = _conversation(tokenizer) if template_problem(tokenizer) is None else None
    documents = Script((_separator(tokenizer, conversation is not None),))
    return (documents,) if conversation is None else (documents, conversation)


def template_problem(tokenizer: Tokenizer) -> str | None:
    """Why no conversations are sampled although the tokenizer has a chat template; None if they are, or it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        asked, _ = _rendered(tokenizer)
    except Exception as error:  # noqa: BLE001 - a template is a program of the checkpoint's, and may raise anything
        reason = f"it fails: {' '.join(str(error).split())[:200] or type(error).__name__}"
    else:
        if _USER in asked:
            return None
        reason = "it leaves out the user's words"
    return f"self-generated text has no conversations, because the chat template cannot be used: {reason}"


def _separator(tokenizer: Tokenizer, chats: bool) -> tuple[int, ...]:
    """The tokens before a document: the tokenizer's own opening, or else a token that separates documents."""
    if opening := opening_of(tokenizer):
        return opening
    known: Collection[str] = getattr(tokenizer, "all_special_tokens", ())
    # The EOS of a model that chats ends turns, not documents.
    spelled: Any = next((token for token in _SEPARATORS if chats and token in known), None)
    if spelled is not None:
        return (int(tokenizer.convert_tokens_to_ids(spelled)),)  # type: ignore[attr-defined]
    for token in (getattr(tokenizer, "eos_token_id", None), tokenizer.bos_token_id):
        if token is not None:
            return (int(token),)
    return ()


def _conversation(tokenizer: Tokenizer) -> Script | None:
    """The script of conversations of one request and one answer each."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked, answered = _rendered(tokenizer)
    before, _, between = asked.partition(_USER)
    after = answered.partition(_ANSWER)[2]

    def encode(text: str) -> tuple[int, ...]:
        return tuple(encoded(tokenizer, [text])[0]) if text else ()

    first, answer = encode(before), encode(between)
    # The end of an answer is sampled; what the template writes after it comes before the next conversation.
    return Script((first, answer, encode(after) + first, answer))


def _rendered(tokenizer: Tokenizer) -> tuple[str, str]:
    """A request as the chat template writes it, up to where the answer begins; and with its answer."""
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    render: Any = tokenizer.apply_chat_template  # type: ignore[attr-defined]
    asked = render(messages[:1], tokenize=False, add_generation_prompt=True)
    return str(asked), str(render(messages, tokenize=False))
