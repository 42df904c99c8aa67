"""Names of optimizers: those that a training of ours takes, and what is said of the others before anything is read."""

from pathlib import Path

import pytest
import torch
from transformers.training_args import OptimizerNames

from llmprune import RecoveryOptions
from llmprune.errors import RecoveryError
from llmprune.recovery.optimizers import constructing
from llmprune.recovery.training import Schedule, WeightsTrainer, arguments_for

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lom", "use adamw_torch"),
        ("adamw", r"did you mean adamw_torch\?"),
        ("adam_torch", r"transformers has no optimizer 'adam_torch'(.|\n)*did you mean adamw_torch"),
        ("xyz", r"transformers has no optimizer 'xyz'(.|\n)*use adamw_torch"),
        ("apollo_adamw", "apollo_adamw is not offered: it needs optim_target_modules"),
        ("apollo_adamw_layerwise", "optim_target_modules"),
        ("lomo", "steps inside the backward pass"),
        ("adalomo", "steps inside the backward pass"),
        ("schedule_free_adamw", "has other weights for training than those that are scored"),
        ("galore_adamw", "would bring pruned weights back"),
    ],
)
def test_names_that_are_refused(name: str, words: str) -> None:
    with pytest.raises(RecoveryError, match=words):
        RecoveryOptions(optimizer=name)


def test_an_optimizer_is_refused_with_the_arguments_if_it_cannot_be_made(tmp_path: Path) -> None:
    """Whatever is not installed here says so at once; no other error comes through."""
    made, refused = [], []
    for kind in OptimizerNames:
        try:
            options = RecoveryOptions(optimizer=kind.value)
        except RecoveryError:
            continue
        try:
            arguments_for(options, tmp_path, Schedule(4, 2), CPU, None)
            made.append(kind.value)
        except RecoveryError as error:
            refused.append((kind.value, error.what))
    assert all(f"the optimizer {name} cannot be constructed: " in what for name, what in refused)
    assert {"adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"} <= set(made)


def test_what_an_optimizer_says_when_it_is_made_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecoveryError, match="sgd cannot be constructed: no such device"), constructing("sgd"):
        raise RuntimeError("no such device")

    def fail(*_: object) -> None:
        raise ValueError("no parameters")

    monkeypatch.setattr("transformers.Trainer.create_optimizer", fail)
    trainer = WeightsTrainer.__new__(WeightsTrainer)
    trainer.args = type("Arguments", (), {"optim": OptimizerNames.SGD})  # type: ignore[assignment]
    with pytest.raises(RecoveryError, match="the optimizer sgd cannot be constructed: no parameters"):
        trainer.create_optimizer()


def test_processes_wait_for_a_long_measurement(tmp_path: Path) -> None:
    """By default, those of torchrun end after half an hour in which the first one writes and measures."""
    assert arguments_for(RecoveryOptions(), tmp_path, Schedule(4, 2), CPU, None).ddp_timeout > 24 * 3600
