"""Tensors of a checkpoint that transformers does not build, when the rest of the model becomes smaller.

A draft head for multi-token prediction (MTP) has the sizes that config.json gives for the decoder layers. It is never
computed here, so nothing is known about which of its channels matter: it is dropped, together with the number of its
layers in config.json. The towers of other modalities have sizes of their own, and are kept unless the hidden width
changes. Anything else is refused, because an engine may build it from the sizes that change.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.errors import ModelError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.recipe.structures import Structures
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import listed, read_json
from llmprune.units import format_size

# Parts of the names, between dots and underscores: of a draft head's tensors, and of its keys in config.json.
_WORDS = {"mtp", "nextn"}
# Nested configs that describe no tower.
_NO_TOWERS = {"text_config", "quantization_config", "generation_config"}


@dataclass(frozen=True, slots=True)
class DraftHead:
    """A draft head that is dropped.

    Attributes:
        keys: the names of its tensors in the checkpoint.
        nbytes: their size.
        counts: the names of the keys in config.json that count its layers; empty where there are none.
    """

    keys: tuple[str, ...]
    nbytes: int
    counts: tuple[str, ...]

    def __str__(self) -> str:
        """A sentence about it."""
        said = f"; {', '.join(self.counts)} in config.json becomes 0" if self.counts else ""
        return (
            f"The draft head (MTP) is dropped: {len(self.keys)} tensors, {format_size(self.nbytes)}, such as "
            f"{self.keys[0]}, which transformers does not build and which would not fit the smaller model{said}."
        )

    def without(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json for a model without it."""
        text = config.get("text_config")
        parts = [config] if not isinstance(text, Mapping) else [config, text]
        # Where the file leaves the number to its default, the default may be 1.
        absent = not any(name in part for part in parts for name in self.counts)
        whole, *inner = (
            {**part, **{name: 0 for name in self.counts if name in part or (absent and part is parts[-1])}}
            for part in parts
        )
        return whole if not inner else {**whole, "text_config": inner[0]}


def find_draft_head(dense: CheckpointSource, spec: Structures) -> DraftHead | None:
    """Find the draft head that has to go when structures are removed; None if there is none.

    Raises:
        ModelError: the checkpoint has other tensors that transformers does not build, and nothing says whether they
            fit the smaller model.
    """
    outside = [key for key in dense.ignored_keys() if not _has_module(dense, key)]
    draft = [key for key in outside if _is_extra_layer(dense, key) or _WORDS & _words(key)]
    counts = tuple(dict.fromkeys(_counts(dense)))
    if others := [key for key in outside if key not in draft]:
        _require_unaffected(dense, spec, others)
    if (unnamed := [key for key in draft if not _WORDS & _words(key)]) and not counts:
        raise _unknown(dense, unnamed, "and no key of config.json counts these layers")
    nbytes = sum(dense.stored[key].nbytes for key in draft)
    return DraftHead(tuple(draft), nbytes, counts) if draft else None


def _has_module(dense: CheckpointSource, key: str) -> bool:
    """Whether the tensor belongs to a module of the model, which computes its values itself."""
    module = dense.targets[key][0].rpartition(".")[0]
    return module == "" or any(name == module for name, _ in dense.model.named_modules())


def _is_extra_layer(dense: CheckpointSource, key: str) -> bool:
    inside = dense.targets[key][0].removeprefix(f"{dense.layers_path}.")
    return inside != dense.targets[key][0] and inside.split(".")[0].isdecimal()


def _words(name: str) -> set[str]:
    return set(name.replace(".", "_").split("_"))


def _counts(dense: CheckpointSource) -> Iterator[str]:
    """The keys that say how many layers a draft head has: as config.json has them, or as transformers adds them."""
    written = read_json(dense.folder / CONFIG_NAME)
    texts = (written, written.get("text_config"), dense.config.get_text_config(decoder=True).to_dict())
    for part in texts:
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if _WORDS & _words(key) and isinstance(value, int) and not isinstance(value, bool) and value:
                yield key


def _require_unaffected(dense: CheckpointSource, spec: Structures, keys: Sequence[str]) -> None:
    """Refuse tensors that may depend on the sizes that change."""
    written = read_json(dense.folder / CONFIG_NAME)
    towers = {key for key, value in written.items() if isinstance(value, Mapping) and key.endswith("_config")}
    if not towers - _NO_TOWERS:
        raise _unknown(dense, keys, "and nothing says whether they would fit the smaller model")
    hidden = dense.config.get_text_config(decoder=True).hidden_size
    if spec.width is not None and (wide := [key for key in keys if hidden in dense.stored[key].shape]):
        raise _unknown(dense, wide, f"and their {hidden} channels may be those that are removed")


def _unknown(dense: CheckpointSource, keys: Sequence[str], why: str) -> ModelError:
    return ModelError(
        f"{dense.folder} has tensors that transformers does not build ({listed(list(keys), most=1)}), {why}",
        expected="a checkpoint whose tensors are those of the model, apart from a draft head (mtp) or other towers",
        fix="load it with transformers, save it with save_pretrained, which leaves them out, and prune that copy; or "
        "prune weights only, which keeps them",
    )
