"""Describe the smaller model: which attributes of config.json change, found by search and verified.

There is no table of the names that families use for their sizes. Integers of the config that could be a size are
changed, the model is built from the changed config without weights, and the change is accepted if every parameter then
has exactly its reduced shape and nothing else differs: no other shape, no buffer (rotary frequencies), no scale.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from llmprune.errors import ModelError
from llmprune.models.boundary import one_line
from llmprune.models.decoder import Decoder
from llmprune.models.differences import Expected, Shape, module_differences, shape_differences
from llmprune.models.uneven import (
    UNBUILDABLE,
    Changes,
    build_decoder,
    changed,
    nested,
    with_per_layer,
)
from llmprune.structures.describe.audit import contradictory_counts, run_failures
from llmprune.structures.describe.candidates import Request, candidates
from llmprune.structures.describe.equals import equal_config
from llmprune.structures.remove.cuts import Cut, removed_indices

# Per request, the most plausible first: each try builds the whole model without weights.
_MOST_TRIES = 40


def smaller_config(
    config: PretrainedConfig, cuts: Mapping[int, Sequence[Cut]], path: str | None = None
) -> PretrainedConfig:
    """The config of the model after the same cuts in all layers.

    Args:
        config: of the model at full size.
        cuts: layer -> what is removed there.
        path: dotted name of the decoder layers; None: they are searched for.

    Returns:
        Of the same class; if that refuses the sizes, of an equivalent one that accepts them (see `equals`).

    Raises:
        ModelError: no change of the config gives these shapes; the message says what was tried.
    """
    return _described(_smaller, _Search(config, cuts, path))


def uneven_config(
    config: PretrainedConfig, cuts: Mapping[int, Sequence[Cut]], path: str | None = None
) -> PretrainedConfig:
    """A config with `per_layer_config`, for layers that have been shrunk differently.

    Args:
        config: of the model at full size.
        cuts: layer -> what is removed there; the number of groups may differ from layer to layer.
        path: dotted name of the decoder layers; None: they are searched for.

    Returns:
        Of the same class; if that refuses the sizes, of an equivalent one that accepts them (see `equals`).

    Raises:
        ModelError: no change of the config gives a layer its shapes; the message says what was tried.
    """
    with_per_layer(config, {"0": {}})  # refuses an architecture that defines the key itself
    return _described(_uneven, _Search(config, cuts, path))


def _described(describe: Callable[["_Search"], PretrainedConfig], search: "_Search") -> PretrainedConfig:
    """What `describe` finds for the config, or for an equivalent one if the config's class refuses sizes."""
    try:
        return describe(search)
    except ModelError as error:
        # Another class can only help if the class itself refuses the sizes; other errors are about the shapes.
        if not search.refused:
            raise
        try:
            equal = equal_config(search.config, search.path)
            if equal is None:
                raise error
            return describe(_Search(equal, search.cuts, search.path))
        except ModelError as other:
            if other.what == error.what:
                raise error from None
            raise ModelError(error.what, expected=error.expected, fix=f"{error.fix}; {other.what}") from other


def _smaller(search: "_Search") -> PretrainedConfig:
    changes: Changes = {}
    # Each request is satisfied separately first, so that its changes do not depend on the others'; then all changes are
    # checked together, in all layers: two attributes may depend on one another.
    for requests in search.joined(list(search.cuts)):
        changes |= requests
    if differences := search.differences(changes, everything=True) or search.other_differences(changes, None):
        raise ModelError(
            f"no config describes the smaller model: with {_shown(changes)}, {differences[0]}",
            expected="the same widths in every layer with such a structure, and sizes that the config can express",
            fix="remove the same number of groups from these structures in all layers, or use a budget",
        )
    smaller = changed(search.config, changes)
    if problems := [*contradictory_counts(smaller), *run_failures(search.built(changes))]:
        raise ModelError(
            f"the smaller model would not work: with {_shown(changes)}, {problems[0]}", fix="remove fewer groups"
        )
    return smaller


def _uneven(search: "_Search") -> PretrainedConfig:
    per_layer: dict[str, Any] = {}
    found: dict[tuple[object, ...], Changes] = {}
    for layer in sorted(search.cuts):
        # Layers that lose the same numbers from the same shapes need the same attributes: one search is enough for all.
        key = search.signature(layer)
        if key not in found:
            found[key] = {}
            for part in search.joined([layer]):
                found[key] |= part
            if differences := search.other_differences(found[key], [layer]):
                raise ModelError(f"no config describes layer {layer}: with {_shown(found[key])}, {differences[0]}")
        if found[key]:
            per_layer[str(layer)] = nested(found[key])
    return with_per_layer(search.config, per_layer)


class _Search:
    """Tries changes of a config against the required shapes."""

    def __init__(self, config: PretrainedConfig, cuts: Mapping[int, Sequence[Cut]], path: str | None) -> None:
        self.config, self.cuts = config, cuts
        self._before = build_decoder(config, path=path)
        self.path, layers = self._before.path, self._before.layers
        if outside := [layer for layer in cuts if not 0 <= layer < len(layers)]:
            raise ModelError(f"there is no layer {outside[0]}", expected=f"layers below {len(layers)}")
        self._built: dict[str, Decoder | str] = {}
        self._gone: dict[object, dict[tuple[str, int], int]] = {}

    @property
    def refused(self) -> bool:
        """Whether the config's class has refused values that were tried."""
        return any(isinstance(model, str) for model in self._built.values())

    def signature(self, layer: int) -> tuple[object, ...]:
        """A key that is equal for layers that need the same changes."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self._before.layers[layer].named_parameters())
        return (tuple(self._requests([layer])), shapes)

    def joined(self, layers: Sequence[int]) -> Iterator[Changes]:
        """The changes for each request; requests that no change satisfies alone are tried together.

        Raises:
            ModelError: nothing fits.
        """
        alone: list[Request] = []
        for request in self._requests(layers):
            found = self._first_fit([request], layers)
            # One attribute may determine two sizes (a shared expert's width is derived from that of the routed ones):
            # neither request is satisfied without the other, so they are tried together.
            if found is None:
                alone.append(request)
            else:
                yield found
        # Only requests for equal shares of one kind can depend on each other.
        for _, group in itertools.groupby(alone, lambda r: (r.kind, r.kept / r.groups)):
            requests = list(group)
            found = self._first_fit(requests, layers) if len(requests) > 1 else None
            if found is None:
                raise self._nothing_fits(requests, layers)
            yield found

    def _requests(self, layers: Sequence[int]) -> list[Request]:
        cuts = [cut for layer in layers for cut in self.cuts.get(layer, ()) if cut.removed]
        found = [(cut.structure, cut.kept) for cut in cuts]
        return list(dict.fromkeys(Request(s.kind, s.consumer, s.groups, s.columns, kept) for s, kept in found))

    def _first_fit(self, requests: list[Request], layers: Sequence[int]) -> Changes | None:
        for changes in self._candidates(requests):
            if not self.differences(changes, layers, requests):
                return changes
        return None

    def _candidates(self, requests: list[Request]) -> list[Changes]:
        found = [changes for request in requests for changes in candidates(self.config, request)]
        unique = {repr(changes): changes for changes in found}
        return list(unique.values())[:_MOST_TRIES]

    def differences(
        self,
        changes: Changes,
        layers: Sequence[int] = (),
        requests: Sequence[Request] | None = None,
        *,
        everything: bool = False,
    ) -> list[str]:
        """How the shapes of a changed config differ from the required ones.

        Args:
            changes: of the config.
            layers: the layers to compare.
            requests: the cuts to apply; None: all of them.
            everything: compare all layers and everything outside them.
        """
        decoder = self._build(changes)
        if isinstance(decoder, str):
            return [decoder]
        expected = Expected(
            parameter=lambda name, before, after: self._shrunk(name, before, requests),
            inside=lambda name: everything or self._before.place(name)[0] in layers,
        )
        return list(shape_differences(self._before.model, decoder.model, expected))

    def other_differences(self, changes: Changes, layers: Sequence[int] | None) -> list[str]:
        """Buffers and numbers in modules, of some layers or all (None), that change although they should not."""
        expected = Expected(
            buffer=self._shrunk,
            # Integers are sizes, which are checked by the shapes; floats are scales and epsilons.
            value=lambda key, before, after: not isinstance(before, float) or before == after,
            inside=lambda name: layers is None or self._before.place(name)[0] in layers,
        )
        return list(module_differences(self._before.model, self.built(changes).model, expected))

    def _shrunk(self, name: str, shape: Shape, requests: Sequence[Request] | None = None) -> Shape:
        """The shape of a tensor after some of the cuts; None: all of them."""
        layer, inner = self._before.place(name)
        key = layer, None if requests is None else tuple(requests)
        if key not in self._gone:
            cuts = [] if layer is None else self.cuts.get(layer, ())
            # Cached by layer and requests, because every name of every try needs it.
            asked = [cut for cut in cuts if requests is None or self._request(cut) in requests]
            self._gone[key] = {place: len(gone) for place, gone in removed_indices(asked).items()}
        return tuple(size - self._gone[key].get((inner, dim), 0) for dim, size in enumerate(shape))

    def _request(self, cut: Cut) -> Request:
        structure = cut.structure
        return Request(structure.kind, structure.consumer, structure.groups, structure.columns, cut.kept)

    def _build(self, changes: Changes) -> Decoder | str:
        # Candidates of several requests and the final check are often the same change.
        key = repr(sorted(changes.items()))
        if key not in self._built:
            try:
                self._built[key] = build_decoder(changed(self.config, changes), path=self.path)
            except UNBUILDABLE as error:
                self._built[key] = f"the model cannot be built: {one_line(error)}"
        return self._built[key]

    def built(self, changes: Changes) -> Decoder:
        """The model of a changed config that is known to fit."""
        decoder = self._build(changes)
        assert isinstance(decoder, Decoder), decoder
        return decoder

    def _nothing_fits(self, requests: list[Request], layers: Sequence[int]) -> ModelError:
        request = requests[0]
        tried = [f"{_shown(c)}: {self.differences(c, layers, requests)[0]}" for c in self._candidates(requests)[:4]]
        return ModelError(
            f"no attribute of {type(self.config).__name__} makes {request.consumer} smaller: {request.kept} of "
            f"{request.groups} groups ({request.kind})",
            expected="one that gives every parameter its reduced shape; tried "
            + ("; ".join(tried) or "nothing: no attribute has such a value"),
            fix=f"remove a different number of groups, or leave {request.kind} out of the recipe",
        )


def _shown(changes: Changes) -> str:
    return ", ".join(f"{'.'.join(path)}={value}" for path, value in changes.items()) or "no change"
