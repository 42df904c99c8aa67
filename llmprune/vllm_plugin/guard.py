"""A clone of llmprune has a folder of the same name as a package that vLLM imports."""

import importlib.util
from pathlib import Path

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
