"""What vLLM would do wrong, found before it does."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.errors import ModelError


def shadowing() -> Path | None:
    """The folder of kernels in a clone of llmprune, if `import triton_kernels` finds it; None if all is well.

    vLLM imports OpenAI's package of that name for some mixtures of experts. Python finds the folder instead if it
    starts in the root of the clone; an installed llmprune has it under another name.
    """
    try:
        spec = importlib.util.find_spec("triton_kernels")
    except (ImportError, ValueError):  # a module that was imported without a specification
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "nm_linear").is_dir():
            return Path(place)
    return None


def require_not_shadowed() -> None:
    """Refuse to serve where vLLM would take a folder of llmprune for another package.

    Raises:
        ModelError: `import triton_kernels` finds llmprune's kernels.
    """
    if (found := shadowing()) is not None:
        raise shadowed(found)


def shadowed(folder: Path) -> ModelError:
    """The error for a folder of kernels that hides the other package."""
    return ModelError(
        f"vLLM would import {folder} in place of OpenAI's package triton_kernels",
        expected="vLLM started outside a clone of llmprune",
        fix="start it in another folder, with llmprune installed (pip install .)",
    )


# Models that vLLM multiplies with rows in another order than the checkpoint has them: it reorders the tensors called
# weight, and no others.
_REORDERED = {
    "llama4": "reorders the rows of q_proj and k_proj",
    "llama4_text": "reorders the rows of q_proj and k_proj",
    "falcon": "reorders the rows of query_key_value",
    "bloom": "reorders the rows of query_key_value",
}

# Models whose blocks in place of attention do not ask for packed layers.
_UNASKED = ("mamba", "falcon_mamba", "jamba")


def require_untouched(config: Mapping[str, Any], layouts: Mapping[str, str]) -> None:
    """Refuse models whose tensors vLLM changes before a packed layer gets them.

    Args:
        config: the content of config.json.
        layouts: the name of the layout of each packed matrix.

    Raises:
        ModelError: names a matrix that would be wrong.
    """
    for part in (config, config.get("text_config") or {}):
        kind = str(part.get("model_type"))
        what = _REORDERED.get(kind, "has no packed layers there" if kind in _UNASKED else "")
        for name, layout in layouts.items() if what else ():
            if _is_touched(part, kind, name, layout):
                raise ModelError(
                    f"{name} is packed as {layout}, and vLLM's model for {kind} {what}",
                    expected="a model whose layers vLLM loads as they are",
                    fix="unpack the checkpoint (llmprune unpack) and serve it dense, or use llmprune serve",
                )


def _is_touched(config: Mapping[str, Any], kind: str, name: str, layout: str) -> bool:
    last = name.rpartition(".")[2]
    if kind == "falcon":  # with one KV head for all, rows are in vLLM's order
        grouped = bool(config.get("new_decoder_architecture")) or not config.get("multi_query", True)
        return grouped and last == "query_key_value"
    if kind == "bloom":  # rows of N:M are moved with all that belongs to them
        return last == "query_key_value" and layout not in ("nm", "int8-nm")
    if kind in _UNASKED:
        return ".mixer." in name or ".mamba." in name
    return last in ("q_proj", "k_proj")


def require_even(config: Mapping[str, Any]) -> None:
    """Refuse decoder layers that differ in size or lack a block: vLLM's models build all layers alike.

    Args:
        config: the content of config.json.

    Raises:
        ModelError: they differ.
    """
    # Not at the top of the file: `register` must stay light where no checkpoint is served.
    from llmprune.storage.packed_config import is_uneven

    if is_uneven(config):
        raise ModelError(
            "the decoder layers of this checkpoint differ in size or lack a block, and vLLM builds all layers alike",
            expected="the same sizes in every layer; vLLM would need a model class that reads per_layer_config",
            fix="serve it with llmprune serve, or prune with the same fraction in every layer "
            "(such as the recipes heads-ffn-25 and depth-25)",
        )
