"""The loss in chunks: what it is, that it is the same in one, and that logits never exist all at once."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, build, every_family, random_ids
from torch import Tensor, nn

from llmprune.errors import ModelError
from llmprune.recovery.halves import Halves
from llmprune.recovery.objective import UNSCORED, Objective

IDS = random_ids(3, 12)
# Of the first and of every fourth token, predictions do not count.
LABELS = IDS.masked_fill(torch.arange(12) % 4 == 0, UNSCORED)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A dense model and one that differs from it."""
    dense = build("llama")
    student = build("llama")
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    return student.requires_grad_(True), dense.requires_grad_(False)


def reference(student: Any, dense: Any, share: float) -> tuple[Tensor, Tensor]:
    """The loss and the negative log-likelihood from all logits, in float64."""
    predicted = student(input_ids=IDS).logits[:, :-1].double().log_softmax(-1)
    teacher = dense(input_ids=IDS).logits[:, :-1].double().log_softmax(-1)
    counts = LABELS[:, 1:] != UNSCORED
    divergence = (teacher.exp() * (teacher - predicted)).sum(-1)[counts].sum()
    nats = -predicted.gather(-1, IDS[:, 1:, None])[..., 0][counts].sum()
    return share * divergence + (1 - share) * nats, nats


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("positions", [1000, 5])
def test_loss_and_gradients_are_those_of_all_logits(models: Any, share: float, positions: int) -> None:
    student, dense = models
    student.zero_grad()
    expected, nats = reference(student, dense, share)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    halves = Halves(student)
    objective = Objective(halves, Halves(dense), share, chunk_bytes=4 * VOCABULARY * positions)
    found = objective.distances(halves.body(IDS), IDS, LABELS)
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nats.double(), nats, rtol=1e-5, atol=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_is_no_distance_from_itself(models: Any) -> None:
    _, dense = models
    halves = Halves(dense)
    found = Objective(halves, halves, 1.0).distances(halves.body(IDS), IDS, LABELS)
    assert abs(found.loss.item()) < 1e-4
    assert found.nats.item() > 1


def test_no_more_logits_than_a_chunk_exist_at_once(models: Any) -> None:
    student, dense = models
    seen: list[int] = []
    hooks = [
        model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
        for model in (student, dense)
    ]
    halves = Halves(student), Halves(dense)
    seen.clear()
    objective = Objective(*halves, 1.0, chunk_bytes=4 * VOCABULARY * 5)
    objective.distances(halves[0].body(IDS), IDS, LABELS).loss.backward()
    for hook in hooks:
        hook.remove()
    positions = int((LABELS[:, 1:] != UNSCORED).sum())
    assert max(seen) == 5
    assert sum(seen) == 4 * positions  # both models, and again in the backward pass


def test_a_batch_in_which_nothing_counts_has_no_loss(models: Any) -> None:
    halves = Halves(models[0])
    found = Objective(halves, None, 0.0).distances(halves.body(IDS), IDS, torch.full_like(IDS, UNSCORED))
    found.loss.backward()
    assert found.loss.item() == found.nats.item() == 0


@every_family
def test_the_logits_of_every_architecture_come_in_halves(family: str) -> None:
    model = build(family).eval()
    ids = random_ids(2, 10)
    halves = Halves(model)
    with torch.no_grad():
        found = halves.head(halves.body(ids).flatten(0, 1)).view(2, 10, -1)
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_head_that_reads_more_is_refused() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda _, inputs, output: output + inputs[0].mean(1, keepdim=True).sum())
    with pytest.raises(ModelError, match="cannot be computed from its hidden states alone"):
        Halves(model)
    assert "forward" not in vars(model.model)
    assert isinstance(model.model, nn.Module)
