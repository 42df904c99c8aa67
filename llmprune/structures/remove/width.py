"""Narrow the hidden width: one set of residual-stream channels for the whole model, and the config for it.

There is no table of the names that families use for their sizes, or of the dimensions that are the hidden width. The
model is built twice without weights, from the config and from one with fewer channels; each dimension that differs is
hidden width, and nothing else may differ: no module, number, buffer or other size. Sizes that are derived from the
hidden width unless the config sets them (of a head, of an FFN) are then set explicitly. Finally, both models must
compute the same on random weights.
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.boundary import one_line
from llmprune.models.differences import Expected, Shape, differences, shape_differences
from llmprune.models.uneven import UNBUILDABLE, Changes, build_decoder, changed, text_part
from llmprune.structures.find.width_probe import Norm, find_norms, first_deviation

# If None, they are derived from the hidden size, times this factor.
_IMPLIED_WIDTHS = {"n_inner": 4, "ffn_hidden_size": 4, "intermediate_size": 4}

# How many narrower models are built in order to see which dimensions are hidden width.
_MOST_TRIED = 8


@dataclass(frozen=True, slots=True, eq=False)
class Width:
    """A smaller hidden width of one model.

    Attributes:
        config: of the smaller model.
        size: number of hidden channels of the full model.
        kept: that of the smaller one.
        places: name of a parameter in the whole model -> its dimensions that are hidden width; tied parameters are
            listed under all their names.
        norms: name of a module in the whole model -> the norm over hidden channels that it computes.
    """

    config: PretrainedConfig
    size: int
    kept: int
    places: Mapping[str, tuple[int, ...]]
    norms: Mapping[str, Norm]


def plan_width(config: PretrainedConfig, kept: int, multiple: int = 64, path: str | None = None) -> Width:
    """Find the config of the model with fewer hidden channels, and the dimensions of parameters that shrink.

    If the config sets an epsilon that only norms over hidden channels read, it becomes eps * size / kept, so that its
    effect on a norm is unchanged.

    Args:
        config: of the full model, with or without `per_layer_config`.
        kept: number of hidden channels to keep, in [1, hidden size).
        multiple: if `kept` is refused, the suggested alternatives are multiples of this where possible.
        path: dotted name of the decoder layers; None: they are searched for.

    Raises:
        ModelError: `kept` is out of range, the config does not accept it (the message suggests other numbers), or
            something other than shapes would change (the message says what).
    """
    search = _Search(config, path)
    if not 1 <= kept < search.size:
        raise ModelError(f"{kept} of {search.size} hidden channels are to be kept", expected=f"1 to {search.size - 1}")
    found = search.fit(kept)
    if found.changes and found.reason:
        raise _refused(config, kept, f"with {_shown(found.changes)}, {found.reason}")
    if found.reason:
        raise _not_accepted(search, kept, found.reason, multiple)
    smaller = search.built(found.changes)
    norms = find_norms(smaller, found.places)
    if deviation := first_deviation(search.before, smaller, found.places, list(norms)):
        raise _refused(config, kept, f"with {_shown(found.changes)}, {deviation}")
    adjusted = _with_epsilon(changed(config, found.changes), search.size / kept, smaller, norms, path)
    return Width(adjusted, search.size, kept, _with_tied_names(search.before, found.places), norms)


def hidden_places(config: PretrainedConfig, path: str | None = None) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Find the hidden width of a model, and every dimension of its parameters that is hidden width.

    Args:
        config: of the model.
        path: dotted name of the decoder layers; None: they are searched for.

    Returns:
        The number of hidden channels; and parameter in the whole model -> dimensions, tied parameters under all names.

    Raises:
        ModelError: no narrower model, which would show them, can be built from the config.
    """
    search = _Search(config, path)
    # Any narrower model shows them: halves first, which most restrictions (heads, groups, multiples) allow.
    refusal = ""
    tried = dict.fromkeys([search.size // 2, search.size * 3 // 4, *range(64, search.size, 64), search.size - 1])
    for kept in itertools.islice((kept for kept in tried if 0 < kept < search.size), _MOST_TRIED):
        found = search.fit(kept, shapes_only=True)
        if found.changes and not found.reason:
            return search.size, _with_tied_names(search.before, found.places)
        refusal = refusal or found.reason
    raise ModelError(
        f"the hidden channels of {type(config).__name__} cannot be told apart from its other sizes: {refusal}",
        expected="a model in which a smaller hidden_size changes no other size",
    )


def shrink_width(
    tensors: Mapping[str, Tensor], width: Width, channels: Sequence[int], factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Keep some hidden channels of parameters, and scale the gains of norms.

    Args:
        tensors: name in the whole model -> parameter at full size.
        width: which dimensions are hidden width.
        channels: the channels to keep, ascending; `width.kept` of them.
        factors: norm -> the factor applied to its gain, for all of `width.norms`.

    Returns:
        All tensors; those without hidden channels are the same objects, the others are new, with the same dtype.

    Raises:
        PatternError: the channels are not as described.
        NumericsError: a factor is missing, not positive or not finite.
    """
    _check(width, channels, factors)
    scaled = {norm.gain: (factors[name], norm.offset) for name, norm in width.norms.items()}
    result = dict(tensors)
    for name, tensor in tensors.items():
        for dim in width.places.get(name, ()):
            result[name] = result[name].index_select(dim, torch.tensor(channels, device=tensor.device))
        if name in scaled:
            factor, offset = scaled[name]
            gain = (result[name].double() + offset) * factor - offset
            result[name] = gain.to(tensor.dtype)
    return result


def _check(width: Width, channels: Sequence[int], factors: Mapping[str, float]) -> None:
    ascending = list(channels) == sorted(set(channels))
    if not ascending or len(channels) != width.kept or not 0 <= channels[0] <= channels[-1] < width.size:
        raise PatternError(
            f"{len(channels)} hidden channels: {list(channels)[:8]}",
            expected=f"{width.kept} ascending numbers below {width.size}",
        )
    for name in width.norms:
        if not 0 < factors.get(name, math.nan) < math.inf:
            raise NumericsError(
                f"the gain of {name} is to be multiplied by {factors.get(name)}", expected="a positive number"
            )


@dataclass(frozen=True, slots=True)
class _Fit:
    """Changes of a config and their effect; no changes if none of them gives a model.

    Attributes:
        changes: of the config.
        places: the dimensions that become smaller.
        reason: why it does not fit; empty if it does.
        problems: number of such reasons.
    """

    changes: Changes
    places: dict[str, tuple[int, ...]]
    reason: str = ""
    problems: int = 0


class _Search:
    """Tries changes of a config that might narrow the hidden width."""

    def __init__(self, config: PretrainedConfig, path: str | None) -> None:
        self.config = config
        size = getattr(config.get_text_config(decoder=True), "hidden_size", None)
        if type(size) is not int:
            raise ModelError(f"the hidden_size of {type(config).__name__} is {size}", expected="a number of channels")
        self.size: int = size
        self._decoder = build_decoder(config, torch.float32, path)
        self.before = self._decoder.model

    def built(self, changes: Changes) -> PreTrainedModel:
        """The model built from a changed config."""
        return build_decoder(changed(self.config, changes), torch.float32, self._decoder.path).model

    def fit(self, kept: int, *, shapes_only: bool = False) -> _Fit:
        """The first changes that fit, or those with the fewest problems.

        Args:
            kept: number of hidden channels.
            shapes_only: whether numbers and buffers (a scale that is derived from the hidden size) may change.
        """
        best = _Fit({}, {})
        for changes in self._candidates(kept):
            try:
                model = self.built(changes)
            except UNBUILDABLE as error:
                best = best if best.reason else _Fit({}, {}, one_line(error), sys.maxsize)
                continue
            places, problems = _compare(self.before, model, self.size, kept, shapes_only)
            if not problems:
                return _Fit(changes, places)
            if not best.reason or len(problems) < best.problems:
                best = _Fit(changes, places, problems[0], len(problems))
        return best

    def _candidates(self, kept: int) -> Iterator[Changes]:
        """The hidden size alone or with attributes of the same value; then also with the sizes derived from it."""
        config = self.config.get_text_config(decoder=True)
        text = text_part(self.config.to_dict(), self.config)
        own = (config.attribute_map.get("hidden_size", "hidden_size"),)
        others = [path for path, value in _integers(text) if value == self.size and path != own]
        together = dict.fromkeys([(), tuple(others), *((path,) for path in others)])
        implied: list[Changes] = [{}]
        derived = isinstance(getattr(type(config), "head_dim", None), property)
        if text.get("head_dim") is None and not derived and hasattr(config, "num_attention_heads"):
            implied.append({("head_dim",): self.size // config.num_attention_heads})
        inner = {(key,): self.size * times for key, times in _IMPLIED_WIDTHS.items() if key in text and not text[key]}
        implied += [inner | pins for pins in implied] if inner else []
        for pins, paths in itertools.product(implied, together):
            yield dict.fromkeys([own, *paths], kept) | pins


def _integers(text: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every integer of a text config and of the mappings in it, with its path."""
    for key, value in text.items():
        if type(value) is int:
            yield (key,), value
        elif isinstance(value, dict):
            yield from (((key, inner), number) for inner, number in value.items() if type(number) is int)


def _compare(
    before: PreTrainedModel, after: PreTrainedModel, size: int, kept: int, shapes_only: bool
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The dimensions that are hidden width, and all other differences."""
    places: dict[str, tuple[int, ...]] = {}

    def narrowed(name: str, full: Shape, narrow: Shape) -> Shape:
        dims = tuple(dim for dim, pair in enumerate(zip(full, narrow, strict=False)) if pair == (size, kept))
        if dims:
            places[name] = dims
        return tuple(kept if dim in dims else length for dim, length in enumerate(full))

    def same(key: str, value: Any, new: Any) -> bool:
        return value is None or value == new or _narrowed(value, new, size, kept)

    compare = shape_differences if shapes_only else differences
    return places, list(compare(before, after, Expected(parameter=narrowed, value=same)))


def _narrowed(before: Any, after: Any, size: int, kept: int) -> bool:
    """Whether a number, or each of several, is the hidden size before and after, or unchanged."""
    if isinstance(before, tuple):
        pairs = zip(before, after, strict=False)
        return len(before) == len(after) and all(one == other or (one, other) == (size, kept) for one, other in pairs)
    return type(before) is int and (before, after) == (size, kept)


def _with_epsilon(
    config: PretrainedConfig, ratio: float, model: PreTrainedModel, norms: Mapping[str, Norm], path: str | None
) -> PretrainedConfig:
    """The config with larger epsilons, if only norms over hidden channels read them.

    Args:
        config: of the smaller model.
        ratio: the factor for the epsilons.
        model: built from it.
        norms: modules that are norms over hidden channels.
        path: dotted name of the decoder layers; None: they are searched for.
    """
    for key, value in text_part(config.to_dict(), config).items():
        if "eps" in key and type(value) is float:
            adjusted = copy.deepcopy(config)
            setattr(adjusted.get_text_config(decoder=True), key, value * ratio)
            other = dict(build_decoder(adjusted, torch.float32, path).model.named_modules())
            reading = {name for name, module in model.named_modules() if _numbers(module) != _numbers(other[name])}
            if reading and reading <= norms.keys():
                config = adjusted
    return config


def _numbers(module: nn.Module) -> dict[str, float]:
    return {key: value for key, value in vars(module).items() if type(value) is float}


def _with_tied_names(model: PreTrainedModel, places: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    known = {id(model.get_parameter(name)): dims for name, dims in places.items()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: known[id(parameter)] for name, parameter in everything if id(parameter) in known}


def _refused(config: PretrainedConfig, kept: int, reason: str) -> ModelError:
    return ModelError(
        f"the hidden width of {type(config).__name__} cannot be {kept}: {reason}",
        expected="a model in which fewer hidden channels change nothing but the shapes",
        fix="leave the hidden width out of the recipe, and remove heads, FFN channels or layers",
    )


def _not_accepted(search: _Search, kept: int, reason: str, multiple: int) -> ModelError:
    """The error for a number that the config does not accept, with the nearest ones that it does."""
    multiples = range(multiple, search.size, multiple)
    nearest = [
        sorted(counts, key=lambda count: (abs(count - kept), count)) for counts in (multiples, range(1, search.size))
    ]
    taken: list[int] = []
    for counts, most in zip(nearest, (4, 64), strict=True):
        taken = taken or list(itertools.islice((c for c in counts[:most] if not search.fit(c).reason), 2))
    return ModelError(
        f"{type(search.config).__name__} does not accept a hidden size of {kept}: {reason}",
        expected=" or ".join(map(str, sorted(taken))) or "no other number works either",
        fix="choose another hidden width" if taken else "leave the hidden width out of the recipe",
    )


def _shown(changes: Changes) -> str:
    return ", ".join(f"{'.'.join(path)}={value}" for path, value in changes.items())
