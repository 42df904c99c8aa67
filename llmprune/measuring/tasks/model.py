"""The model class `llmprune` of lm-eval: its `hf`, with checkpoints loaded as `llmprune.serving.loader` loads them.

lm-eval finds it through the entry point group `lm_eval.models`; versions that do not look there (0.4.13) need
`register`.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype

from llmprune.errors import ModelError
from llmprune.models.boundary import load_tokenizer
from llmprune.models.skeleton import read_config
from llmprune.serving.forms import Served
from llmprune.serving.loader import load
from llmprune.serving.placement import input_device, require_placement
from llmprune.storage.hub import resolve_model

MODEL_NAME = "llmprune"

# Options of `hf` for models that it loads itself, which do not apply to our checkpoints.
_REFUSED = (
    "parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder", "trust_remote_code",
)  # fmt: skip


class LlmpruneLM(HFLM):  # type: ignore[misc] # lm-eval is not typed
    """A causal LM: packed, with layers of different sizes, or dense. Scores of dense ones equal those of `hf`.

    Args:
        pretrained: "testbed", a local folder, or a hub id.
        device: "auto", "cpu", "cuda" or "cuda:N".
        revision: of a hub id.
        served: how packed matrices are held; see `llmprune.serving.loader.load`.
        device_map: shares the model out over several devices, in place of `device`; see there.
        **options: as for `hf`: dtype, batch_size, max_length, add_bos_token, ...

    Raises:
        ModelError: there is no such model, or an option is only for models that `hf` itself loads.
        CheckpointError: its files are incomplete, or quantised by another library.
        DeviceError: this machine has no such device.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        revision: str | None = None,
        served: Served = "auto",
        device_map: str | None = None,
        **options: Any,
    ) -> None:
        if refused := [name for name in _REFUSED if options.get(name)]:
            raise ModelError(
                f"model_args {', '.join(refused)} with --model {MODEL_NAME}",
                expected="one checkpoint, on one device or shared out by device_map",
                fix="remove them, or evaluate a dense checkpoint with --model hf",
            )
        self._served, self._device_map = served, device_map
        target = str(require_placement(device, device_map))
        folder = resolve_model(pretrained, revision=None if revision == "main" else revision)
        if "tokenizer" not in options:
            load_tokenizer(folder)  # lm-eval would accept one that transformers makes up where files are missing
        # Left out, a question on stdin could be answered by whatever is piped there.
        safe = {**options, "trust_remote_code": False}
        super().__init__(str(folder), backend="causal", device=target, **safe)

    def _create_model(self, pretrained: str, dtype: Any = "auto", **options: Any) -> None:
        """Load the weights; called by `hf` once device and tokenizer are known."""
        unknown = sorted(set(options) - _KNOWN)
        if unknown:
            raise ModelError(
                f"model_args {', '.join(unknown)} with --model {MODEL_NAME}",
                expected="options of --model hf that are not passed to from_pretrained, and served",
                fix="check the spelling, or remove them",
            )
        # `load` may choose a wider dtype where `hf` does not; with the same dtype the scores are equal.
        dtype = read_config(Path(pretrained)).dtype or torch.float32 if dtype == "auto" else get_dtype(dtype)
        if self._device_map is None:
            self._model = load(pretrained, device=str(self.device), dtype=dtype, served=self._served)
            return
        model = load(pretrained, dtype=dtype, served=self._served, device_map=self._device_map)
        self._model, self._device = model, input_device(model)
        # lm-eval moves models to its own device, even those that accelerate has shared out.
        model.to = lambda *_, **__: model


# What `hf` always passes to `_create_model`; anything else was meant for `from_pretrained`.
_KNOWN = {
    "revision", "trust_remote_code", "parallelize", "tp_plan", "gpus", "max_memory_per_gpu", "max_cpu_memory",
    "offload_folder", "peft", "delta", "autogptq", "gptqmodel", "gguf_file", "quantization_config", "subfolder",
}  # fmt: skip


def register() -> None:
    """Register the class with lm-eval, unless it has found it itself; a second call changes nothing."""
    # Not by the decorator: with it, lm-eval refuses to replace an entry point by the class that it loads.
    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=f"{__name__}:{LlmpruneLM.__name__}")
