"""Conversations in a data set: read in either of the two usual forms, and rendered by the model's chat template.

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}      as OpenAI writes them
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}          as ShareGPT does
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.errors import CalibrationError
from llmprune.text.openings import Tokenizer

# The columns of the two forms, as data sets usually call them.
CHAT_COLUMNS = ("messages", "conversations")

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation.

    Attributes:
        where: it was read, for messages.
        messages: roles and contents, in their order.
    """

    where: str
    messages: tuple[Mapping[str, str], ...]

    @classmethod
    def read(cls, turns: Iterable[Any], where: str) -> "Conversation":
        """Read a list of turns in either form.

        Raises:
            CalibrationError: a turn is of neither form, or holds something other than text.
        """
        return cls(where, tuple(_message(turn, where) for turn in turns))


def rendered(documents: Iterable[str | Conversation], tokenizer: Tokenizer) -> Iterator[str]:
    """Documents as text, conversations through the tokenizer's chat template.

    Raises:
        CalibrationError: the tokenizer has no chat template, or it fails on a conversation.
    """
    for document in documents:
        yield document if isinstance(document, str) else _render(document, tokenizer)


def _message(turn: Any, where: str) -> dict[str, str]:
    given = turn if isinstance(turn, Mapping) else {}
    role = given.get("role") or _ROLES.get(str(given.get("from")), given.get("from"))
    content = given.get("value") if given.get("content") is None else given["content"]
    if isinstance(content, list):
        # Parts, as for models that see pictures: text is what a language model reads.
        parts = [_text_of(part) for part in content]
        content = "".join(map(str, parts)) if parts and None not in parts else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise CalibrationError(
            f"{where} has a turn that is not a message: {str(turn)[:80]}",
            expected='{"role": "user", "content": "..."} or {"from": "human", "value": "..."}, with text as content',
            fix="set column to the one that has the text, or convert the conversations",
        )
    return {"role": role, "content": content}


def _text_of(part: Any) -> str | None:
    """The text of a part of a message; None if it is something else."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _render(conversation: Conversation, tokenizer: Tokenizer) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{conversation.where} has a conversation, and the model's tokenizer has no chat template",
            expected="a column of text, or a model that has been trained on conversations",
            fix="set column to one with text, or name another text",
        )
    apply: Any = tokenizer.apply_chat_template  # type: ignore[attr-defined]
    try:
        return str(apply([dict(message) for message in conversation.messages], tokenize=False))
    except Exception as error:  # a template is a program of the checkpoint's, and may raise anything
        raise CalibrationError(
            f"{conversation.where}: the model's chat template fails: {error}",
            expected="roles that alternate as the template wants them, usually user and assistant",
            fix="remove or correct the conversation",
        ) from error
