"""What several runs on one dense model have in common: their texts, and one pass over its layers."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.measuring.perplexity import run_stream
from llmprune.models.source import Source
from llmprune.progress import Progress, Watcher, ignore
from llmprune.stream.activations import HiddenStates, LayerCalls
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.text.loading import load_texts
from llmprune.text.mix import Text
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import Tokens
from llmprune.timing import Stages

_STAGE = "dense perplexity"


class DensePass:
    """Gives every run the results of earlier runs that would be bit-identical to its own.

    All texts are kept, because tokens are small. Only the most recent final hidden states are kept: runs that share
    them are consecutive. They stay within the activation budget of the runs; the rest is on disk.
    """

    def __init__(self) -> None:
        self._tokens: dict[object, Tokens] = {}
        self._key: object = None
        self._ids = torch.empty(0)
        self._kept: tuple[HiddenStates, LayerCalls] | None = None

    def texts(
        self,
        specs: Mapping[str, Text],
        source: Source,
        tokenizer: Tokenizer,
        device: torch.device,
        watch: Watcher = ignore,
    ) -> dict[str, Tokens]:
        """Load the texts of a run that no earlier run has loaded; see `load_texts`.

        Args:
            specs: name -> text.
            source: the dense model; texts are kept for checkpoint folders only.
            tokenizer: the model's.
            device: where text is sampled.
            watch: called while text is sampled.

        Raises:
            CalibrationError: a text cannot be read or is too short.
        """
        if source.folder is None:
            return load_texts(specs, source, tokenizer, device, watch)
        # Only self-generated text depends on the device.
        keys = {
            name: (source.folder, spec, device if any(part.source == "self" for part in spec.parts) else None)
            for name, spec in specs.items()
        }
        missing = {name: specs[name] for name, key in keys.items() if key not in self._tokens}
        for name, tokens in load_texts(missing, source, tokenizer, device, watch).items():
            self._tokens[keys[name]] = tokens
        return {name: self._tokens[key] for name, key in keys.items()}

    def final_states(
        self, source: Source, texts: Mapping[str, Tokens], settings: StreamSettings, watch: Watcher, stages: Stages
    ) -> Stream | None:
        """Run the dense model over the evaluation text, or reuse the previous run's final hidden states if equal.

        Args:
            source: the model, not pruned yet.
            texts: without "evaluation", nothing is run.
            settings: of the run; `outputs` is implied.
            watch: told about each layer, or that none needs to run.
            stages: stopwatch.

        Returns:
            A finished stream of this source; None without an evaluation.
        """
        if "evaluation" not in texts:
            return None
        ids, settings = texts["evaluation"].ids, replace(settings, held_back=0, outputs=True)
        key = _key(source, settings)
        with stages(_STAGE):
            if self._kept is not None and key == self._key and torch.equal(ids, self._ids):
                watch(Progress(f"{_STAGE}: the same as in an earlier run"))
                return _finished(source, ids, settings, *self._kept)
            # Freed before the next pass, so that there are never two in memory.
            self._kept = None
            stream = run_stream(source, ids, settings, watch, _STAGE)
            self._key, self._ids, self._kept = key, ids, (stream.hidden, stream.calls)
            return stream


def _key(source: Source, settings: StreamSettings) -> object:
    """Everything that final hidden states depend on, to the bit, apart from the tokens."""
    # A model in memory is pruned in place, so it is never the same twice.
    model = source.folder or object()
    return model, source.dtype, source.layers_path, settings


def _finished(source: Source, ids: Tensor, settings: StreamSettings, hidden: HiddenStates, calls: LayerCalls) -> Stream:
    """A stream of this source as if it had run: its head is loaded from this source, so the other one can be freed."""
    stream = Stream(source, ids, settings)
    stream.hidden, stream.calls = hidden, calls
    return stream
