"""What all parts of one run share and never change."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers

from llmprune import __version__
from llmprune.devices import map_large_blocks, resolve_device
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint
from llmprune.models.source import Source
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.dense_pass import DensePass
from llmprune.pruning.forecast.memory import pruning_needs
from llmprune.pruning.forecast.shares import expected_shares
from llmprune.pruning.jobs import Job
from llmprune.pruning.tracking import require_tracker
from llmprune.ranks import SINGLE, Ranks
from llmprune.recipe.recipe import Recipe
from llmprune.stream.guard import MemoryGuard, sampling_needs
from llmprune.stream.stream import StreamSettings
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import Tokens
from llmprune.timing import Stages


@dataclass(frozen=True, slots=True)
class Run:
    """The context of one run.

    Attributes:
        recipe: what to do.
        settings: of every stream of the run.
        watch: told about every step; as a context manager it turns running out of memory into a `DeviceError`.
        dense: results of earlier runs on the same dense model.
        stages: stopwatch.
        started: when the run began, by `time.perf_counter`.
        ranks: the processes of the run.
    """

    recipe: Recipe
    settings: StreamSettings
    watch: MemoryGuard
    dense: DensePass
    stages: Stages = field(default_factory=Stages)
    started: float = field(default_factory=time.perf_counter)
    ranks: Ranks = SINGLE

    @classmethod
    def begin(
        cls, recipe: Recipe, watch: Watcher = ignore, dense: DensePass | None = None, ranks: Ranks = SINGLE
    ) -> "Run":
        """Start the clock, and prepare the process for large blocks of memory.

        Args:
            recipe: what to do.
            watch: told about every step.
            dense: shared by runs on one dense model; default: not shared.
            ranks: the processes of the run, of which only the first is watched.

        Raises:
            LlmpruneError: as for `require_runnable`.
        """
        device = require_runnable(recipe)
        if device.type == "cpu":
            # Before the first text is sampled: what the heap has grown to once, it takes large blocks from.
            map_large_blocks()
        settings = StreamSettings(device, recipe.batch_size, recipe.held_back, int(recipe.activation_budget))
        guard = MemoryGuard(settings, watch if ranks.first else ignore)
        return cls(recipe, settings, guard, dense or DensePass(), ranks=ranks)

    @property
    def shared(self) -> StreamSettings:
        """The settings of streams whose batches the processes share; each needs all of them to take part."""
        return replace(self.settings, ranks=self.ranks)

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return self.settings.device

    def fitted(self, positions: int | None) -> "Run":
        """The same run with the lengths of its texts resolved, for a model with this many positions; None: no limit."""
        return replace(self, recipe=self.recipe.fitted(positions, self.device.type))

    def unrotated(self) -> "Run":
        """The same run without a rotation."""
        return replace(self, recipe=self.recipe.model_copy(update={"rotation": None}))

    def open(self, folder: Path) -> CheckpointSource:
        """Open a checkpoint in the dtype that this recipe computes in."""
        return open_checkpoint(folder, self.device, self.recipe.compute_dtype, self.recipe.decoder_layers)

    def texts(self, source: Source, jobs: Sequence[dict[str, Job]], tokenizer: Tokenizer) -> dict[str, Tokens]:
        """Read, tokenise or sample the recipe's texts.

        Args:
            source: the dense model.
            jobs: what is done to each layer's matrices, for the message if the run is later out of memory.
            tokenizer: the model's.

        Raises:
            CalibrationError: a text cannot be read or is too short.
        """
        # The calibration text last: it is the one that is read or sampled first.
        for name, spec in reversed(self.recipe.texts.items()):
            shares = expected_shares(self.recipe, source, jobs, self.device)
            held_back = f", with {self.recipe.held_back} held back" if name == "calibration" else ""
            self.watch(Progress(f"{name} text", step=spec.summary + held_back, shares=shares))
        if any(part.source == "self" for spec in self.recipe.texts.values() for part in spec.parts):
            self.watch.expected = lambda: sampling_needs(source)
        with self.stages("text"):
            texts = self.dense.texts(self.recipe.texts, source, tokenizer, self.device, self.watch)
        self.watch.expected = partial(pruning_needs, source, jobs, texts, self.settings, self.recipe)
        return texts


def require_runnable(recipe: Recipe) -> torch.device:
    """The device of a run, if there is all that it needs on this machine.

    Raises:
        DeviceError: the recipe's device is not available.
        MissingPackageError: its tracker is not installed.
    """
    require_tracker(recipe.report_to)
    return resolve_device(recipe.device)


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the result."""
    return {"llmprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
