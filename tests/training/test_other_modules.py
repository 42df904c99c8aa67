"""Copies, compiled models, adapters, masks of torch and other models, in `sparsify` and `keep_zeros`."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_layer import Net, sgd, step
from torch import nn
from torch.nn.utils import prune
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from llmprune import keep_zeros, sparsify
from llmprune.errors import ModelError, RecoveryError, TrainingError

# Most trainings here are as long as what is tested needs.
pytestmark = pytest.mark.filterwarnings("ignore:sparsify ends after step")

WEIGHT = [4.0, -1.0, 3.0, 2.0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_trains_by_itself(duplicate: Callable[[Net], Net]) -> None:
    model = Net(WEIGHT)
    with sparsify(model, "magnitude", {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}) as masks:
        twin = duplicate(model)
        assert step(twin, sgd(twin), [1.0, 5.0, 1.0, 10.0]) == [4.0, -1.0, 3.0, 2.0]
        assert twin.weight[0].tolist() == [pytest.approx(value) for value in (3.9, -1.5, 2.9, 1.0)]
        assert masks.sparsity == masks.state.step == 0
        assert step(model, sgd(model), [1.0, 1.0, 1.0, 1.0]) == [4.0, 0.0, 3.0, 0.0]


def test_the_context_itself_is_not_copied() -> None:
    masks = sparsify(Net(WEIGHT), "magnitude", {"stages": 1, "end": 0.5, "every": 2})
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TrainingError, match=r"cannot be pickled or copied(.|\n)*masks\.save"):
            duplicate(masks)


def test_a_model_may_be_compiled_before_or_afterwards() -> None:
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}
    for before in (True, False):
        torch._dynamo.reset()
        model = Net(WEIGHT)
        compiled: Any = torch.compile(model, backend="eager")
        with sparsify(compiled if before else model, "magnitude", schedule) as masks:
            optimizer = sgd(model)
            for _ in range(2):
                compiled(torch.tensor([[1.0, 5.0, 1.0, 1.0]])).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert model.weight[0].tolist() == [pytest.approx(value) for value in (3.8, 0.0, 2.8, 0.0)]
        assert masks.masks.keys() == {"layers.0.weight"}
    torch._dynamo.reset()


def test_masks_of_torch_are_made_permanent_first() -> None:
    model = Net(WEIGHT)
    prune.l1_unstructured(model.layers[0], "weight", 0.5)
    with pytest.raises(ModelError, match=r"the weight of layers\.0 is computed"):
        sparsify(model, "magnitude", {"every": 2})


def trainer(model: nn.Module, callback: Any, folder: Path, **options: Any) -> Trainer:
    options = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **options}
    rows = [{"slope": torch.ones(4)}] * 2
    return Trainer(
        model, TrainingArguments(str(folder), **options), train_dataset=rows, eval_dataset=rows, callbacks=[callback]
    )


def test_a_trainer_with_another_model_is_refused(tmp_path: Path) -> None:
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}
    with pytest.raises(TrainingError, match=r"another model(.|\n)*model_init"):
        trainer(Net(WEIGHT), sparsify(Net(WEIGHT), "magnitude", schedule), tmp_path).train()
    pruned = Net(WEIGHT)
    with torch.no_grad():
        pruned.weight[0, 1] = 0
    with pytest.raises(RecoveryError, match="another model"):
        trainer(Net(WEIGHT), keep_zeros(pruned), tmp_path).train()


def test_a_trainer_that_takes_an_earlier_state_or_ends_early_is_noticed(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    model = Net(WEIGHT)
    masks = sparsify(model, "magnitude", {"stages": 2, "end": 0.5, "every": 2})
    with pytest.raises(TrainingError, match="load_best_model_at_end"):
        trainer(model, masks, tmp_path, max_steps=4, **best).train()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.warns(UserWarning, match="takes 3 steps, and the schedule 4"):
        masks.on_train_begin(arguments, TrainerState(max_steps=3), TrainerControl(), model=model)
    masks.on_train_end(arguments, TrainerState(), TrainerControl())


def test_zeros_are_found_under_an_adapter_that_was_added_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    keeping = keep_zeros(model)
    weight = model[0].weight
    wrapper = nn.Module()
    wrapper.base_layer = model[0]
    model[0] = wrapper  # as PEFT does
    with keeping:
        pass
    with torch.no_grad():
        weight.fill_(1.0)
    with pytest.raises(RecoveryError, match=r"pruned weights are not zero, in 0\.weight"):
        keeping.require_zeros()
