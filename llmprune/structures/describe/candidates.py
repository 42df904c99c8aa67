"""Changes of a config that might make a structure smaller: integers that could be its size."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from llmprune.models.uneven import Changes, text_part

# Names that configs use for the number of query heads and of KV heads.
_HEADS = {"num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"}
_HEADS |= {"num_key_value_heads", "num_kv_heads", "kv_n_heads"}
# If None, the width is derived from the hidden size.
_IMPLIED_WIDTHS = ("n_inner", "ffn_hidden_size", "intermediate_size")
_WIDTH_WORDS = ("intermediate", "ffn", "inner", "mlp", "ff_")


@dataclass(frozen=True, slots=True)
class Request:
    """All cuts of one kind of structure to the same number of groups."""

    kind: str
    consumer: str
    groups: int
    columns: int
    kept: int


def candidates(config: PretrainedConfig, request: Request) -> Iterator[Changes]:
    """Changes that might satisfy the request, the most plausible first."""
    known = integers(config)
    scaled = {path: value * request.kept // request.groups for path, value in known.items()}
    whole = [path for path, value in known.items() if value * request.kept % request.groups == 0]
    if request.kind == "heads":
        yield from _head_candidates(config, request, known, {path: scaled[path] for path in whole})
    elif request.kind == "experts":
        equal = [p for p in whole if known[p] == request.groups and "expert" in p[-1] and "per_tok" not in p[-1]]
        yield dict.fromkeys(equal, request.kept)
        yield from ({path: request.kept} for path in equal if len(equal) > 1)
    else:
        text = text_part(config.to_dict(), config)
        named = [path for path in whole if any(word in path[-1] for word in _WIDTH_WORDS)]
        exact = [path for path in named if known[path] == request.groups]
        implied = [(key,) for key in _IMPLIED_WIDTHS if key in text and text[key] is None]
        for path in dict.fromkeys([*exact, *implied, *named]):
            yield {path: scaled.get(path, request.kept)}


def _head_candidates(config: PretrainedConfig, request: Request, known: Changes, scaled: Changes) -> Iterator[Changes]:
    counts = [path for path in scaled if path[-1] in _HEADS]
    queries = max((known[path] for path in counts), default=request.groups)
    size = request.groups * request.columns // queries
    derived = isinstance(getattr(type(config), "head_dim", None), property)
    unset = not derived and text_part(config.to_dict(), config).get("head_dim") is None
    explicit = {("head_dim",): size} if unset else {}
    for chosen in (counts, *([path] for path in counts)):
        changes = {path: scaled[path] for path in chosen}
        if changes:
            yield changes | explicit
            yield changes


def integers(config: PretrainedConfig, least: int = 2) -> Changes:
    """Every integer of the text config and of the mappings in it, except small ones and rotary settings."""
    found: Changes = {}
    for key, value in text_part(copy.deepcopy(config.to_dict()), config).items():
        if isinstance(value, dict) and "rope" not in key:
            found |= {
                (key, inner): number for inner, number in value.items() if type(number) is int and number >= least
            }
        elif (
            isinstance(value, list) and len(set(map(repr, value))) == 1 and type(value[0]) is int and value[0] >= least
        ):
            found[(key,)] = value[0]
        elif type(value) is int and value >= least:
            found[(key,)] = value
    return found
