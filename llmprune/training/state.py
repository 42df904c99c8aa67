"""What a training with changing masks has beside the model: masks, the weights behind them, scores, early weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmprune.errors import CheckpointError
from llmprune.storage.files import reading, write_shard
from llmprune.storage.formats.layout import from_bytes, to_bytes

# What is before the first dot of a name in the file.
_KEPT, _LATENT, _SCORE, _EARLY = "kept", "latent", "score", "early"
# Where Adam has one kernel for a step; elsewhere it passes over all scores several times.
_FUSED = ("cpu", "cuda")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class State:
    """Tensors by the names of parameters, each in the shape of its parameter.

    Attributes:
        step: optimizer steps so far.
        kept: bool, True where a weight is kept.
        latent: the weights behind the masks, of rules that are latent.
        scores: of rules that have them.
        early: all parameters that train, as they were at the step to which a lottery rewinds; empty before.
        adam: the optimizer of the scores, if they are trained.
        generator: of random choices.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], *, latent: bool, seed: int) -> None:
        self.step = 0
        self.kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        self.latent = {name: weight.detach().clone() for name, weight in weights.items()} if latent else {}
        self.scores: dict[str, Tensor] = {}
        self.early: dict[str, Tensor] = {}
        self.adam: torch.optim.Adam | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def train_scores(self, rate: float) -> None:
        """Let Adam train the scores."""
        fused = all(score.device.type in _FUSED for score in self.scores.values())
        self.adam = torch.optim.Adam(list(self.scores.values()), lr=rate, fused=fused)

    def move_to(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Bring everything to the devices that the weights are on by now."""
        for tensors in (self.kept, self.latent, self.scores):
            for name, tensor in tensors.items():
                if tensor.device != weights[name].device:
                    tensor.data = tensor.data.to(weights[name].device)

    def save(self, file: Path) -> None:
        """Write all of it.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = {f"{_KEPT}.{name}": to_bytes(mask.cpu().flatten(0, -2)) for name, mask in self.kept.items()}
        for kind, found in ((_LATENT, self.latent), (_SCORE, self.scores), (_EARLY, self.early)):
            tensors |= {f"{kind}.{name}": tensor for name, tensor in found.items()}
        if self.adam is not None:
            for name, score in self.scores.items():
                moments = self.adam.state.get(score, {})
                tensors |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        tensors["generator"] = self.generator.get_state()
        tensors["steps"] = torch.tensor(self.step)
        write_shard(file, tensors)

    def load(self, file: Path) -> None:
        """Read what `save` wrote in a training by the same rule.

        Raises:
            CheckpointError: the file cannot be read, or is of another training.
        """
        with reading(file, "check the spelling, or save the state anew"):
            stored = load_file(file)
        try:
            self._take(stored)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} does not fit the training: {error}",
                expected="the state of a training of this model by the same rule",
                fix="use the file of this training, or start again",
            ) from error

    def _take(self, stored: Mapping[str, Tensor]) -> None:
        for name, mask in self.kept.items():
            bits = from_bytes(stored[f"{_KEPT}.{name}"], mask.shape[-1])
            if bits is None:
                raise KeyError(name)
            mask.copy_(bits.view(mask.shape))
        for kind, found in ((_LATENT, self.latent), (_SCORE, self.scores)):
            for name, tensor in found.items():
                tensor.data.copy_(stored[f"{kind}.{name}"])
        self.early = {
            key.removeprefix(f"{_EARLY}."): value for key, value in stored.items() if key.startswith(f"{_EARLY}.")
        }
        if self.adam is not None:
            for name, score in self.scores.items():
                moments = {moment: stored[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in stored}
                if moments:
                    self.adam.state[score] = {
                        key: value if key == "step" else value.to(score.device) for key, value in moments.items()
                    }
        self.generator.set_state(stored["generator"])
        self.step = int(stored["steps"])
