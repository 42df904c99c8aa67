"""Masks in a training loop: what the model computes with, what the optimizer moves, what is there after a restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_layer import Net, sgd, step
from tiny_models import build
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from llmprune import keep_zeros, sparsify
from llmprune.errors import CheckpointError, PatternError, TrainingError
from llmprune.training.rules import RULES
from llmprune.training.sparsifier import Sparsifier
from llmprune.training.targets import find_targets

# Most trainings here are as long as what is tested needs.
pytestmark = pytest.mark.filterwarnings("ignore:sparsify ends after step")


def test_gradual_magnitude_by_hand() -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    with sparsify(model, "magnitude", {"kind": "linear", "stages": 2, "end": 0.5, "every": 2}) as masks:
        optimizer = sgd(model, momentum=0.5)
        assert step(model, optimizer, [1.0, 5.0, 1.0, 10.0]) == [4.0, 0.0, 3.0, 2.0]  # a quarter
        assert model.weight.tolist() == [pytest.approx([3.9, 0, 2.9, 1.0])]
        step(model, optimizer, [1.0, 5.0, 1.0, 0.0])  # momentum: 1 + 0.5, 1 + 0.5, 0 + 5
        assert model.weight.tolist() == [pytest.approx([3.75, 0, 2.75, 0.5])]
        assert masks.sparsity == 0.25  # the next stage begins with the next forward pass
        assert step(model, optimizer, [0.0, 5.0, 0.0, 0.0]) == pytest.approx([3.75, 0, 2.75, 0])
        # 0.75 of momentum for what is kept, and none for what has just been pruned
        assert model.weight.tolist() == [pytest.approx([3.675, 0, 2.675, 0])]
        assert masks.sparsity == 0.5
    assert {name: mask.tolist() for name, mask in masks.masks.items()} == {
        "layers.0.weight": [[False, True, False, True]]
    }
    with keep_zeros(model, masks.masks):  # hands over to training that keeps them
        step(model, sgd(model), [1.0, 1.0, 1.0, 1.0])
    assert model.weight.tolist() == [pytest.approx([3.575, 0, 2.575, 0])]


def test_movement_by_hand() -> None:
    """Scores move against g * w, pruned weights keep their values, and come back with them."""
    model = Net([4.0, -1.0, 3.0, 2.0])
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 5, "dense": 1}
    with sparsify(model, {"movement": {"score_rate": 1.0}}, schedule) as masks:
        optimizer = sgd(model)
        # g * w = 4, -1, 3, -2: Adam's first step moves the scores by its sign, to -1, 1, -1, 1
        step(model, optimizer, [1.0, 1.0, 1.0, -1.0])
        score = masks.state.scores["layers.0.weight"]
        assert score.tolist() == [pytest.approx([-1.0, 1.0, -1.0, 1.0])]
        assert step(model, optimizer, [-2.0, 0.0, 0.0, 8.0]) == pytest.approx([0.0, -1.1, 0.0, 2.1])
        # The pruned 3.9 takes no step, and its score rises with -g * w = 7.8, whereas that of 2.1 falls.
        assert masks.state.latent["layers.0.weight"].tolist() == [pytest.approx([3.9, -1.1, 2.9, 1.3])]
        assert score[0, 0] > -1
        assert score[0, 3] < 1
        for _ in range(3):
            step(model, optimizer, [-2.0, 0.0, 0.0, 8.0])
        assert 3.9 <= model.weight[0, 0].item() < 4.6  # it has come back, where it had been
        assert model.weight[0, 3] == 0
    assert int(model.weight.eq(0).sum()) == 2


def test_sr_ste_by_hand() -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    with sparsify(model, {"sr-ste": {"decay": 0.5}}, {"kind": "one-shot", "stages": 1, "every": 2}, pattern="2:4"):
        optimizer = sgd(model)
        assert step(model, optimizer, [0.0, 1.0, 10.0, 0.0]) == [4.0, 0.0, 3.0, 0.0]
        # 3 - 1 = 2; pruned: -1 - 0.1 (1 - 0.5) = -1.05 and 2 - 0.1 (0.5 * 2) = 1.9; 2 stays the second largest
        assert model.weight.tolist() == [pytest.approx([4.0, 0.0, 2.0, 0.0])]
        step(model, optimizer, [0.0, 0.0, 3.0, -1.0])
        # 2 - 0.3 = 1.7, and 1.9 - 0.1 (-1 + 0.95) = 1.905 is larger by now
        assert model.weight.tolist() == [pytest.approx([4.0, 0.0, 0.0, 1.905])]


def test_rigl_by_hand() -> None:
    """One of two weights moves after step 1, to the largest gradient; there it starts from zero, without momentum."""
    model = Net([4.0, -1.0, 3.0, 2.0])
    rule = {"rigl": {"interval": 1, "fraction": 0.99, "until": 1.0}}
    with sparsify(model, rule, {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 3}):
        optimizer = sgd(model, momentum=0.5)
        # After the step of SGD: 4, 0, 3, 0; alpha/2 (1 + cos(pi/3)) of two weights is one: 3 goes, -1 returns as 0.
        assert step(model, optimizer, [0.0, 7.0, 0.5, 1.0], parts=2) == [4.0, 0.0, 3.0, 0.0]
        assert model.weight.tolist() == [pytest.approx([4.0, 0.0, 0.0, 0.0])]
        step(model, optimizer, [0.0, 1.0, 9.0, 0.0])
        assert model.weight.tolist() == [pytest.approx([4.0, -0.1, 0.0, 0.0])]


@pytest.mark.parametrize("control", ["none", "random-ticket", "random-init"])
def test_a_lottery_ticket_rewinds(control: str) -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    if control == "random-init":
        with pytest.raises(TrainingError, match="random-init of a Net"):
            sparsify(model, {"lottery": {"control": control}}, {"stages": 1, "every": 2})
        return
    rule = {"lottery": {"rewind": 1, "control": control}}
    with sparsify(model, rule, {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 3}, seed=4) as masks:
        optimizer = sgd(model, momentum=0.9)
        step(model, optimizer, [1.0, 0.0, 0.0, 0.0])  # 3.9, -1, 3, 2: here it returns
        for _ in range(2):
            step(model, optimizer, [20.0, 20.0, 0.0, 0.0])
        # Velocities 20.9 and 38.8, 20 and 38: the weights are -2.07, -6.8, 3, 2, and the ticket is of -6.8 and 3.
        assert model.weight.tolist() == [pytest.approx([-2.071, -6.8, 3, 2])]
        seen = step(model, optimizer, [0.0, 0.0, 0.0, 0.0])
        early = [3.9, -1.0, 3.0, 2.0]
        assert masks.plan.steps == 5
        assert sum(value == 0 for value in seen) == 2
        assert all(value in (0, pytest.approx(known)) for value, known in zip(seen, early, strict=True))
        assert model.weight[0].tolist() == seen  # no momentum is left
    ticket = [place for place, value in enumerate(seen) if value]
    assert (ticket == [1, 2]) == (control == "none")


def test_a_fresh_initialisation_keeps_the_ticket() -> None:
    model = build("llama")
    rule = {"lottery": {"control": "random-init"}}
    ids = torch.arange(8)[None] + 4
    with sparsify(model, rule, {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}) as masks:
        optimizer = sgd(model)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            if masks.state.step == 2:  # rewound, not yet moved
                changed = [name for name, weight in model.named_parameters() if not weight.equal(before[name])]
                assert len(changed) > 10
                kept = [weight[weight != 0] for name, weight in model.named_parameters() if name in masks.masks]
                assert 0.015 < torch.cat(kept).std() < 0.025  # initializer_range is 0.02
            optimizer.step()
            optimizer.zero_grad()
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)


def batches(count: int) -> list[Tensor]:
    return [torch.randint(4, 100, (2, 8), generator=torch.Generator().manual_seed(number)) for number in range(count)]


def trained(masks: Sparsifier, model: Any, optimizer: Any, ids: list[Tensor]) -> None:
    with masks:
        for batch in ids:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def loss_of(model: Any) -> Callable[[float], Tensor]:
    ids = batches(1)[0]

    def loss(temperature: float) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1] / temperature
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return loss


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_continues_as_if_it_had_not_stopped(rule: str, tmp_path: Path) -> None:
    """Stopped within a stage and at the end of one, with Adam's state: the same weights to the last bit."""
    knobs: dict[str, Any] = {"rigl": {"interval": 2}, "lottery": {"rewind": 1}}
    schedule = {"kind": "linear", "stages": 2, "end": 0.6, "every": 3}
    made = []
    for stop in (None, 3, 4):
        model = build("llama")
        ids = batches(9)

        def begin(model: Any = model) -> tuple[Sparsifier, Any]:
            masks = sparsify(model, {rule: knobs.get(rule, {})}, schedule, loss=loss_of(model), seed=1)
            return masks, torch.optim.AdamW(model.parameters(), lr=1e-2)

        masks, optimizer = begin()
        if stop is not None:
            trained(masks, model, optimizer, ids[:stop])
            masks.save(tmp_path / "state.safetensors")
            saved = optimizer.state_dict()
            masks, optimizer = begin()
            masks.load(tmp_path / "state.safetensors")
            optimizer.load_state_dict(saved)
        trained(masks, model, optimizer, ids[stop or 0 : masks.plan.steps])
        made.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        if rule != "soft-movement":
            assert masks.sparsity == pytest.approx(0.6, abs=2e-3)
        for name, mask in masks.masks.items():
            assert made[-1][name][mask].eq(0).all()
    for other in made[1:]:
        assert all(tensor.equal(made[0][name]) for name, tensor in other.items())


def test_fused_experts_and_transposed_weights_are_pruned_as_matrices() -> None:
    for family, pattern in (("qwen3_moe", "2:4"), ("gpt2", "2:4")):
        model = build(family)
        with sparsify(model, "magnitude", {"kind": "one-shot", "stages": 1, "every": 1}, pattern=pattern) as masks:
            trained(masks, model, sgd(model), batches(1))
        for target in find_targets(model):
            groups = target.view(target.parameter.detach()).reshape(-1, 4)
            assert groups.eq(0).sum(1).eq(2).all(), target.matrix.name


@pytest.mark.filterwarnings("ignore:the Trainer takes .* steps, and the schedule")
def test_the_trainer_saves_and_resumes_the_masks(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for batch in batches(6) for row in batch]

    def train(folder: Path, steps: int, resume: bool | None = None) -> Any:
        torch.manual_seed(0)
        model = build("llama")
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=2, save_steps=3, report_to="none", disable_tqdm=True,
            learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        masks = sparsify(model, "movement", {"stages": 2, "end": 0.5, "every": 2})
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[masks])
        if steps < 6:
            trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=resume)
        return model, masks

    whole, masks = train(tmp_path / "a", 6)
    train(tmp_path / "b", 3)
    again, _ = train(tmp_path / "b", 6, resume=True)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    for name, weight in whole.named_parameters():
        assert weight.equal(again.get_parameter(name)), name
    assert all(whole.get_parameter(name)[mask].eq(0).all() for name, mask in masks.masks.items())


def test_nothing_changes_in_evaluation_or_outside_the_context() -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    masks = sparsify(model, "magnitude", {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 1})
    model(torch.ones(1, 4))
    assert model.weight.ne(0).all()
    with masks:
        with torch.no_grad():
            model(torch.ones(1, 4))
        assert model.weight.ne(0).all()
        model.eval()  # as from_pretrained leaves a model; it may be trained so
        model(torch.ones(1, 4))
        assert int(model.weight.ne(0).sum()) == 2


def test_what_it_refuses(tmp_path: Path) -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    with pytest.raises(TrainingError, match="every is missing"):
        sparsify(model, "magnitude", {"end": 0.5})
    with pytest.raises(TrainingError, match="no matrices to prune"):
        sparsify(model, "magnitude", {"end": 0.5, "every": 1}, include=["*q_proj"])
    with pytest.raises(TrainingError, match="no matrices to prune"):
        sparsify(model.head, "magnitude", {"end": 0.5, "every": 1})
    with pytest.raises(PatternError, match="multiple of 8"):
        sparsify(model, "magnitude", {"every": 1}, pattern="2:8")
    sparsify(model, "magnitude", {"every": 1}).save(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        sparsify(model, "movement", {"every": 1}).load(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"does not exist(.|\n)*check the spelling"):
        sparsify(model, "movement", {"every": 1}).load(tmp_path / "b.safetensors")


def test_muon_is_refused_where_zeros_stay_zero() -> None:
    from llmprune.errors import RecoveryError

    model = Net([4.0, -1.0, 3.0, 2.0])
    muon = torch.optim.Muon([model.layers[0].weight])
    with sparsify(model, "magnitude", {"every": 1}), pytest.raises(RecoveryError, match="Muon"):
        step(model, muon, [1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("rule", ["magnitude", "lottery", "rigl"])
def test_zeros_of_a_pruned_model_stay_unless_the_rule_grows_weights(rule: str) -> None:
    model = Net([4.0, 0.0, 3.0, 2.0])
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.25, "every": 4, "dense": 2}
    with sparsify(model, {rule: {"interval": 1} if rule == "rigl" else {}}, schedule) as masks:
        optimizer = sgd(model)
        for _ in range(2):
            step(model, optimizer, [1.0, 1.0, 1.0, 1.0])
            assert (model.weight[0, 1] == 0) == (rule != "rigl")  # in the dense steps, too
    assert (masks.sparsity == 0.25) == (rule != "rigl")


def test_a_matrix_of_zeros_has_yet_to_be_trained() -> None:
    """As the second factor of a new LoRA."""
    assert sparsify(Net([0.0] * 4), "magnitude", {"stages": 1, "end": 0.25, "every": 4}).sparsity == 0


@pytest.mark.parametrize("name", sorted(set(RULES) - {"soft-movement"}))
def test_every_rule_ends_with_its_pattern(name: str) -> None:
    knobs = {"rigl": {"interval": 1, "fraction": 0.9, "until": 1.0}, "lottery": {"control": "random-ticket"}}
    model = build("llama")
    schedule = {"kind": "linear", "stages": 2, "every": 3}
    masks = sparsify(model, {name: knobs.get(name, {})}, schedule, pattern="2:4", loss=loss_of(model))
    trained(masks, model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches(masks.plan.steps))
    masks.require_planned()
    for target in find_targets(model):
        assert target.view(target.parameter.detach()).reshape(-1, 4).ne(0).sum(1).le(2).all(), target.matrix.name
    # What is asserted at the end of a training sees another pattern.
    target.view(masks.state.kept[target.name]).view(-1, 4)[:2] = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(TrainingError, match=r"have groups of 2:4 with more weights"):
        masks.require_planned()


@pytest.mark.filterwarnings("ignore:the Trainer takes .* steps, and the schedule")
def test_scores_are_not_learned_from_scaled_gradients(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments.fp16 = True
    state = TrainerState()
    for rule in ("movement", "soft-movement"):
        with pytest.raises(TrainingError, match=r"ovement with fp16(.|\n)*bf16=True"):
            sparsify(build("llama"), rule, {"every": 5}).on_train_begin(arguments, state, TrainerControl())
    with sparsify(build("llama"), "sr-ste", {"every": 5}) as masks:
        masks.on_train_begin(arguments, state, TrainerControl())


@pytest.mark.parametrize("rule", ["movement", "rigl", "snip"])
def test_frozen_matrices_are_not_chosen_by_gradients(rule: str) -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    model.weight.requires_grad_(False)
    schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 2}
    knobs = {"interval": 1} if rule == "rigl" else {}
    with (
        pytest.raises(TrainingError, match=r"layers\.0\.weight(.|\n)*exclude"),
        sparsify(model, {rule: knobs}, schedule, loss=lambda temperature: model(torch.ones(1, 4))),
    ):
        pass
    with sparsify(model, "magnitude", schedule):
        (model(torch.ones(1, 4)) + model.head.bias.sum()).backward()
    assert int(model.weight.eq(0).sum()) == 2


def test_a_matrix_without_a_gradient_keeps_its_zeros_where_they_are() -> None:
    """As that of an expert without tokens."""
    model = Net([4.0, -1.0, 3.0, 2.0])
    model.layers.append(nn.Linear(4, 1, bias=False))
    with sparsify(model, {"rigl": {"interval": 1}}, {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 3}) as masks:
        step(model, sgd(model), [1.0, 2.0, 3.0, 4.0])
        before = masks.masks["layers.1.weight"].clone()
        step(model, sgd(model), [1.0, 2.0, 3.0, 4.0])
    assert masks.masks["layers.1.weight"].equal(before)


def test_one_optimizer_at_a_time() -> None:
    model = Net([4.0, -1.0, 3.0, 2.0])
    with sparsify(model, "magnitude", {"stages": 4, "every": 5}) as masks:
        first, second = sgd(model), sgd(model)
        step(model, first, [1.0] * 4)
        step(model, second, [1.0] * 4)  # takes its place
        step(model, second, [1.0] * 4)
        assert masks.state.step == 3
        with pytest.raises(TrainingError, match="two optimizers"):
            step(model, first, [1.0] * 4)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_dropped_do_not_count(set_to_none: bool) -> None:
    """A step that is skipped, as by a GradScaler that has found an infinity."""
    model = Net([4.0, -1.0, 3.0, 2.0])
    with sparsify(model, {"movement": {"score_rate": 1.0}}, {"end": 0.5, "every": 5}) as masks:
        optimizer = sgd(model)
        model(torch.tensor([[torch.inf, 1.0, 1.0, 1.0]])).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        step(model, optimizer, [1.0, 1.0, 1.0, -1.0], parts=2)
        score = masks.state.scores["layers.0.weight"]
        assert score.tolist() == [pytest.approx([-1.0, 1.0, -1.0, 1.0])]
