"""Load a checkpoint for fast generation, and generate text.

model = load("out/packed", graphs=True)
model.generate(...)
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from llmprune.errors import DeviceError, ModelError
from llmprune.kernels import cpu
from llmprune.models import boundary
from llmprune.models.checkpoint_source import require_consistent
from llmprune.models.headers import require_finite
from llmprune.models.skeleton import read_config
from llmprune.paths import user_path
from llmprune.precision import computed_in
from llmprune.serving.cpu_forms import measure_products
from llmprune.serving.decode_graphs import DecodeGraphs
from llmprune.serving.decode_layers import attach
from llmprune.serving.forms import Served
from llmprune.serving.fusion import can_fuse, fuse
from llmprune.serving.halves import keep_halves
from llmprune.serving.placement import DeviceMap, input_device, map_for, require_placement
from llmprune.storage.hub import resolve_model
from llmprune.storage.packed_config import is_recorded


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    served: Served = "auto",
    fused: bool = True,
    graphs: bool = False,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a causal LM for serving: a packed checkpoint, or any other.

    Args:
        model: "testbed", a local folder, or a hub id.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the weights, also by name; "auto": the checkpoint's. On a CPU without instructions for it, "auto"
            computes in float32 and leaves large dense weights in the checkpoint's 16 bits (`serving.halves`): to train
            them, to merge an adapter exactly or to resize the embeddings, ask for "float32".
        served: how packed matrices are held. "auto": in the fastest form; "packed": in the least memory; "dense":
            as ordinary weights; "cusparselt": as auto, with a second copy of 2:4 matrices for prefill with cuSPARSELt.
        fused: use one kernel launch for packed matrices that read the same input, and on a CPU two calls for a decoder
            layer and one token (`serving.decode_layers`); not with a device map.
        graphs: use a static cache and CUDA graphs for `generate`: see `serving.decode_graphs`.
            `model.decode_graphs.warm` records them in advance.
        device_map: shares the model out over several devices, in place of `device`: "auto", "balanced",
            "balanced_low_0", "sequential", a device, or module path -> device, as in transformers.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: there is no such model, it is not a causal LM, or graphs cannot be recorded for it.
        CheckpointError: its files are incomplete, or quantised by another library.
        NumericsError: a weight is NaN or infinite.
        DeviceError: this machine has no such device, graphs are requested on a device without them or with a device
            map, or a device map without the package accelerate.
    """
    target = require_placement(device, device_map)
    if graphs and device_map is not None:
        raise DeviceError(
            f"CUDA graphs with device_map {device_map!r}",
            expected="a model on one device, whose kernel launches a graph records",
            fix="load it without graphs, or onto one device",
        )
    if graphs and target.type != "cuda":
        raise DeviceError(
            f"CUDA graphs on the device {str(target)!r}",
            expected="a CUDA device",
            fix="load it without graphs; this device has no kernel launches to save",
        )
    folder = resolve_model(model)
    read_config(folder)
    config = boundary.read_stock_config(folder)
    packed = is_recorded(config)  # then the quantizer makes the same checks, for `from_pretrained` too
    if not packed:
        require_consistent(folder)
    stored = config.dtype or torch.float32
    halves = dtype == "auto" and target.type == "cpu" and device_map is None and stored in cpu.HALVES
    if dtype == "auto":
        dtype = computed_in(stored, target)
    _choose_served(config, served, folder)
    loaded = boundary.load_stock_model(folder, config, dtype=dtype, device_map=map_for(target, device_map))
    if not packed:
        require_finite(folder, loaded.named_parameters())
    if fused and device_map is None and can_fuse(loaded):
        fuse(loaded, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=target))
    measure_products(loaded)
    if halves and dtype == torch.float32 and cpu.unavailable() is None:
        keep_halves(loaded, stored, input_ids=torch.zeros(1, 1, dtype=torch.int64))
    if fused and device_map is None and target.type == "cpu" and cpu.unavailable() is None:
        attach(loaded)
    if graphs:
        DecodeGraphs(loaded)
    return loaded


def load_tokenizer(model: str | Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        model: as for `load`.
        chat_template: a Jinja file to use instead of the tokenizer's own template.

    Raises:
        ModelError: there is no tokenizer next to the model, or it or the template cannot be read.
    """
    tokenizer = boundary.load_tokenizer(resolve_model(model))
    if chat_template is not None:
        try:
            tokenizer.chat_template = user_path(chat_template, ModelError).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"the chat template {chat_template} cannot be read: {error}") from error
    return tokenizer


@dataclass(frozen=True, slots=True)
class Written:
    """What a model has generated, and how fast.

    Attributes:
        text: without special tokens.
        prompt_tokens: number of tokens in the prompt.
        tokens: number of generated tokens, including the end-of-text token.
        first_token_seconds: time to first token (TTFT).
        seconds: from the call to the last token.
        finish: "stop": the model has ended the text; "length": the limit on new tokens was reached; "interrupted".
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    seconds: float
    finish: Literal["stop", "length", "interrupted"]

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed after the first token; None if there is no second token."""
        return (self.tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9) if self.tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> Tensor:
    """Turn a prompt into tokens [1, length].

    Args:
        tokenizer: of the model.
        prompt: any text.
        chat: whether to treat it as a user's message and apply the chat template.

    Raises:
        ModelError: the tokenizer has no chat template, the template fails, or an empty prompt has no tokens.
    """
    if chat and tokenizer.chat_template is None:
        raise missing_template(str(tokenizer.name_or_path))
    if chat:
        message = [{"role": "user", "content": prompt}]
        with boundary.explained(
            f"the chat template of {tokenizer.name_or_path} fails",
            expected="a template that accepts a single user message",
            fix="correct it, give another with --chat-template, or prompt without chat",
        ):
            encoded = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    else:
        with boundary.explained(
            f"the tokenizer {tokenizer.name_or_path} cannot encode the prompt",
            expected="a tokenizer that encodes any text",
            fix="download the tokenizer's files again, or correct the value in tokenizer_config.json",
        ):
            encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids: Tensor = encoded["input_ids"].long()
    if ids.numel() == 0:
        if tokenizer.bos_token_id is None:
            raise ModelError("the prompt is empty, and the tokenizer has no BOS token", fix="give a prompt")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    return ids


def require_room(ids: Tensor, positions: int | None) -> int | None:
    """Refuse a prompt that leaves no position for an answer.

    Args:
        ids: the prompt, [1, length].
        positions: the most tokens, prompt and answer together, that the model can read; None: no limit.

    Returns:
        How many tokens may follow; None: no limit.

    Raises:
        ModelError: the prompt is too long.
    """
    if positions is None:
        return None
    if ids.shape[-1] >= positions:
        raise ModelError(
            f"a prompt of {ids.shape[-1]:,} tokens for a model with {positions:,} positions",
            expected=f"at most {positions - 1:,}, so that one is left for the answer",
            fix="shorten the prompt",
        )
    return positions - ids.shape[-1]


def missing_template(name: str) -> ModelError:
    """The error for a chat with a model that has no chat template."""
    return ModelError(
        f"{name} has no chat template",
        expected="a model trained for chat, with its template next to the tokenizer",
        fix="prompt it without chat, or give a Jinja file with --chat-template",
    )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to generate.

    Attributes:
        max_new_tokens: at least 1.
        temperature: at least 0; 0 is greedy. None: as the generation configuration says.
        seed: for sampling; None: a different one each time.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """The arguments for `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature is not None:
            options["do_sample"] = self.temperature > 0
        return {**options, "temperature": self.temperature} if self.temperature else options


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    sampling: Sampling,
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Generate from a prompt. Ctrl-C stops, and the text so far is returned.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        ids: the prompt, [1, length].
        sampling: how to generate.
        say: called with each piece of text as it is generated.

    Raises:
        ModelError: `generate` fails, as it does for wrong values in generation_config.json.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    streamer = _Streamer(tokenizer, say)
    ids = ids.to(input_device(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A stop string is looked for in the tokenizer's own spelling.
    stops: Any = {"tokenizer": tokenizer} if getattr(model.generation_config, "stop_strings", None) else {}
    interrupted = False
    try:
        with boundary.explained(
            f"{model.name_or_path} cannot generate",
            expected="settings with which transformers' generate writes one text, piece by piece",
            fix="correct the value in generation_config.json, or move the file out of the folder",
        ):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                pad_token_id=pad,
                **stops,
                **sampling.options(),
            )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    ended = streamer.ended(model) or streamer.tokens < sampling.max_new_tokens
    return streamer.written(ids.shape[1], "interrupted" if interrupted else "stop" if ended else "length")


class _Streamer(TextStreamer):  # type: ignore[misc] # transformers is not typed
    """Passes text on as soon as its words are complete, and records the time of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say, self._parts, self._last = say, list[str](), -1
        self._started = time.perf_counter()
        self._times: list[float] = []

    @property
    def tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self._times)

    def ended(self, model: PreTrainedModel) -> bool:
        """Whether the last token is an end-of-text token."""
        ends = model.generation_config.eos_token_id
        return self._last in (ends if isinstance(ends, list) else [ends])

    def put(self, value: Tensor) -> None:
        """Receive the prompt first, then each token."""
        if not self.next_tokens_are_prompt:
            self._times.append(time.perf_counter() - self._started)
            self._last = int(value.flatten()[-1])
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive a piece of text."""
        self._parts.append(text)
        self._say(text)

    def written(self, prompt_tokens: int, finish: Literal["stop", "length", "interrupted"]) -> Written:
        """The whole text with its timing."""
        first, last = (self._times[0], self._times[-1]) if self._times else (0.0, 0.0)
        return Written("".join(self._parts), prompt_tokens, len(self._times), first, last, finish)


def _choose_served(config: PretrainedConfig, served: Served, folder: Path) -> None:
    record = getattr(config, "quantization_config", None)
    if is_recorded(config) and isinstance(record, dict) and record.get("modules"):
        record["served"] = served
    elif served == "packed":
        raise ModelError(
            f"packed weights were requested, but {folder} is not packed",
            expected='"auto" or "dense" for a checkpoint with ordinary weights',
            fix=f"pack it first: llmprune pack {folder}",
        )
