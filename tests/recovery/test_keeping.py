"""Zeros that stay zero: every optimizer of torch, worked by hand where it is short, and those that are refused."""

import gc
import pickle
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from llmprune import keep_zeros
from llmprune.errors import ModelError, RecoveryError

# Two weights kept, two pruned, and a gradient that is not zero anywhere.
WEIGHT = ((1.0, 0.0), (0.0, -2.0))
GRADIENT = torch.tensor([[0.5, 3.0], [-4.0, -0.25]])
PRUNED = torch.tensor(WEIGHT) == 0

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


class Matrix(nn.Module):
    """One matrix and a bias, of which the loss is a sum with known factors: these are the gradients."""

    def __init__(self, weight: Any = WEIGHT) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.bias = nn.Parameter(torch.zeros(2))

    def loss(self, scale: float = 1.0) -> Tensor:
        return scale * ((self.weight * GRADIENT).sum() + self.bias.sum())


def stepped(model: Matrix, optimizer: Optimizer, scales: Iterable[float] = (1.0,)) -> Tensor:
    """The weights after a step for each scale of the gradient."""
    for scale in scales:
        optimizer.zero_grad()
        model.loss(scale).backward()
        optimizer.step(lambda: model.loss(1.0)) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize(
    ("make", "scales", "kept"),
    [
        # w - lr g: 1 - 0.1 * 0.5, -2 + 0.1 * 0.25
        (lambda p: torch.optim.SGD(p, lr=0.1), (1.0,), (0.95, -1.975)),
        # decayed by 1 - lr * 0.5 as well: its gradient is g + 0.5 w
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), (1.0,), (0.9, -1.875)),
        # momentum 0.5: the steps are g, then 2 g + 0.5 g
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), (1.0, 2.0), (1 - 0.05 - 0.125, -2 + 0.025 + 0.0625)),
        # first step of AdamW: w (1 - lr * 0.5) - lr sign(g)
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), (1.0,), (0.95 - 0.1, -1.9 + 0.1)),
    ],
)
def test_kept_weights_take_the_step_and_pruned_ones_none(make: Make, scales: Any, kept: tuple[float, float]) -> None:
    model = Matrix()
    with keep_zeros(model):
        weight = stepped(model, make(model.parameters()), scales)
    torch.testing.assert_close(weight, torch.tensor([[kept[0], 0.0], [0.0, kept[1]]]))
    assert model.bias.ne(0).all()  # which was zero, and is trained


ELEMENTWISE: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_kept_weights_move_as_if_they_were_alone(name: str) -> None:
    scales = (1.0, -0.5, 2.0)
    alone = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = ELEMENTWISE[name]([alone])
    for scale in scales:
        alone.grad = scale * GRADIENT[~PRUNED]
        optimizer.step()
    model = Matrix()
    with keep_zeros(model):
        weight = stepped(model, ELEMENTWISE[name](model.parameters()), scales)
    assert weight[PRUNED].eq(0).all()
    torch.testing.assert_close(weight[~PRUNED], alone.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adafactor(p, lr=0.1), lambda p: torch.optim.LBFGS(p, lr=0.1)])
def test_optimizers_that_scale_or_combine_gradients_keep_zeros(make: Make) -> None:
    model = Matrix()
    with keep_zeros(model):
        weight = stepped(model, make(model.parameters()), (1.0, -0.5, 2.0))
    assert weight[PRUNED].eq(0).all()
    assert weight[~PRUNED].ne(torch.tensor([1.0, -2.0])).all()


class SOAP(torch.optim.SGD):
    pass


class Rotating(torch.optim.SGD):
    """Mixes the weights of a matrix, and has a name that nobody knows."""

    def step(self, closure: Any = None) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data -= self.param_groups[0]["lr"] * weight.grad.roll(1, -1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(torch.optim.Muon, "orthogonalises"), (SOAP, "rotated space")],
)
def test_known_optimizers_are_refused_before_they_move_anything(kind: Any, reason: str) -> None:
    model = Matrix()
    model.loss().backward()
    match = rf"{kind.__name__} would bring pruned weights back: .*{reason}"
    with pytest.raises(RecoveryError, match=match), keep_zeros(model):
        kind([model.weight], lr=0.1).step()
    assert model.weight.equal(torch.tensor(WEIGHT))


def test_other_matrices_may_have_any_optimizer() -> None:
    model = Matrix()
    other = nn.Parameter(torch.ones(3, 2))
    other.grad = torch.ones(3, 2)
    model.loss().backward()
    with keep_zeros(model):
        torch.optim.Muon([other], lr=0.1).step()
    assert other.ne(1).any()


def test_unknown_optimizers_are_refused_by_what_they_do() -> None:
    model = Matrix()
    match = r"Rotating moved 2 pruned weights.*seems to mix the weights of a matrix"
    with pytest.raises(RecoveryError, match=match), keep_zeros(model):
        stepped(model, Rotating([model.weight], lr=0.1))
    assert model.weight[PRUNED].eq(0).all()


def test_a_step_without_a_learning_rate_does_not_hide_them() -> None:
    """A warm-up begins at zero."""
    model = Matrix()
    optimizer = Rotating([model.weight], lr=0.0)
    with keep_zeros(model):
        stepped(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
        with pytest.raises(RecoveryError, match="mix"):
            stepped(model, optimizer)


def test_state_from_before_pruning_is_refused() -> None:
    model = Matrix(((1.0, 1.0), (1.0, -2.0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stepped(model, optimizer)
    model.weight.data[PRUNED] = 0
    match = r"AdamW moved 2 pruned weights.*its state dates from before"
    with pytest.raises(RecoveryError, match=match), keep_zeros(model):
        stepped(model, optimizer)


def test_the_same_optimizer_goes_on_in_a_second_context() -> None:
    model = Matrix()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        with keep_zeros(model):
            stepped(model, optimizer)
    assert model.weight[PRUNED].eq(0).all()


def test_gradients_are_masked_before_they_are_clipped() -> None:
    model = Matrix()
    model.loss().backward()  # of before: it is accumulated
    with keep_zeros(model):
        model.loss().backward()
        norm = torch.nn.utils.clip_grad_norm_([model.weight], 1.0)
    torch.testing.assert_close(norm, 2 * GRADIENT[~PRUNED].norm())


def test_nan_gradients_of_pruned_weights_do_no_harm() -> None:
    model = Matrix()
    with keep_zeros(model):
        (model.weight * torch.where(PRUNED, torch.nan, 1.0)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.equal((~PRUNED).float())


def test_gradients_that_are_changed_by_hand_are_named() -> None:
    model = Matrix()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with keep_zeros(model):
        model.weight.grad = GRADIENT.clone()
        with pytest.raises(RecoveryError, match="set or changed after the backward pass"):
            optimizer.step()
    assert torch.equal(model.weight == 0, PRUNED)


def test_a_compiled_model_has_the_names_of_its_own_weights(tmp_path: Path) -> None:
    model = Matrix()
    keep_zeros(torch.compile(model, backend="eager")).save(tmp_path / "masks.safetensors")
    assert torch.equal(keep_zeros(model, tmp_path / "masks.safetensors").masks["weight"], PRUNED)


def test_masks_of_torch_are_made_permanent_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ModelError, match=r"the weight of 0 is computed(.|\n)*prune\.remove"):
        keep_zeros(model)
    prune.remove(model[0], "weight")
    assert keep_zeros(model).masks.keys() == {"0.weight"}


def test_nothing_is_masked_afterwards() -> None:
    model = Matrix()
    with keep_zeros(model):
        pass
    weight = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert weight[PRUNED].ne(0).all()


def test_copies_keep_the_zeros_of_their_own_model() -> None:
    model = Matrix()
    with keep_zeros(model) as keeping:
        copied = pickle.loads(pickle.dumps({"model": model, "keeping": keeping}))
    with copied["keeping"]:
        other = stepped(copied["model"], torch.optim.SGD(copied["model"].parameters(), lr=0.1))
    assert torch.equal(other == 0, PRUNED)
    assert torch.equal(model.weight.detach(), torch.tensor(WEIGHT))


def test_zeros_that_are_lost_in_another_way_are_found() -> None:
    model = Matrix()
    with pytest.raises(RecoveryError, match="2 pruned weights are not zero, in weight"), keep_zeros(model):
        model.weight.data += 1


def test_an_error_inside_is_not_hidden() -> None:
    model = Matrix()

    def fail() -> None:
        model.weight.data += 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), keep_zeros(model):
        fail()


def test_tied_weights_are_one_and_models_may_be_cast() -> None:
    model = build("llama-tied", torch.float64)
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
    keeping = keep_zeros(model)
    assert list(keeping.masks) == ["model.embed_tokens.weight"]
    model.to(torch.float32)
    ids = torch.arange(12).view(1, 12)
    with keeping:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model.lm_head.weight[:, ::2].eq(0).all()
    assert model.lm_head.weight[:, 1::2].ne(0).all()


def test_weights_in_16_bits_are_warned_of() -> None:
    model = Matrix()
    model.weight.data = model.weight.data.bfloat16()
    with pytest.warns(UserWarning, match="1 pruned matrices train in bfloat16") as caught, keep_zeros(model):
        pass
    assert caught[0].filename == __file__
    # What it is about: 0.01 + 1e-5 is 0.01.
    assert torch.tensor(0.01, dtype=torch.bfloat16).add(1e-5).equal(torch.tensor(0.01, dtype=torch.bfloat16))


def test_models_without_zeros_and_adapters_are_refused() -> None:
    with pytest.raises(RecoveryError, match="no zeros to keep"):
        keep_zeros(Matrix(((1.0, 1.0), (1.0, 1.0))))
    adapter = Matrix(((0.0, 0.0), (0.0, 0.0)))
    with pytest.raises(RecoveryError, match="all weights of weight are zero"):
        keep_zeros(adapter)
    keep_zeros(adapter.requires_grad_(False))


def test_a_dense_model_is_not_taken_for_a_pruned_one() -> None:
    """Zero rows of embeddings, as of a padding token, are in dense models too, and a few zeros in 16 bits."""
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0
    with pytest.raises(RecoveryError, match="no zeros to keep but whole rows of its embeddings"):
        keep_zeros(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0
    with pytest.warns(UserWarning, match="of the weights are zero: no others .* is this the pruned model"):
        keep_zeros(model)


def test_weights_that_are_elsewhere_are_refused() -> None:
    with pytest.raises(RecoveryError, match=r"weight is not in memory(.|\n)*FSDP"):
        keep_zeros(Matrix().to("meta"))


def test_frozen_weights_are_left_alone() -> None:
    model = Matrix()
    model.weight.requires_grad_(False)
    with keep_zeros(model):
        stepped(model, torch.optim.SGD([model.bias], lr=0.1))
    assert model.weight.equal(torch.tensor(WEIGHT))


def test_a_model_that_is_no_longer_used_is_released() -> None:
    model = Matrix()
    with keep_zeros(model):
        stepped(model, torch.optim.AdamW(model.parameters()))
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


def trained(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
        per_device_train_batch_size=2, **{"max_steps": 2, "save_strategy": "no", **options},
    )  # fmt: skip
    rows = [{"input_ids": list(range(start, start + 12)), "labels": list(range(start, start + 12))} for start in (3, 9)]
    keeping = keep_zeros(model)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[keeping])  # type: ignore[arg-type]
    trainer.train()
    return trainer


def pruned_llama() -> Any:
    model = build("llama", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    return model


def test_the_trainer_keeps_zeros_and_clips_what_is_kept(tmp_path: Path) -> None:
    model = pruned_llama()
    reference = pruned_llama()
    ids = torch.tensor([list(range(start, start + 12)) for start in (3, 9)])
    reference(input_ids=ids, labels=ids).loss.backward()
    for layer in reference.model.layers:
        layer.mlp.up_proj.weight.grad[:, ::2] = 0
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    trainer = trained(model, tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=1)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert all(layer.mlp.up_proj.weight[:, ::2].eq(0).all() for layer in model.model.layers)
    assert all(layer.mlp.up_proj.weight[:, 1::2].ne(0).all() for layer in model.model.layers)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor_layerwise"])
def test_options_of_the_trainer_are_refused(tmp_path: Path, name: str) -> None:
    keeping = keep_zeros(pruned_llama())
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", optim=name)
    with pytest.raises(RecoveryError, match="projects gradients onto a space of low rank"):
        keeping.on_train_begin(arguments, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"wieght": PRUNED}, "'wieght' is bool"),
        ({"weight": PRUNED[:1]}, r"'weight' is bool \[1, 2\](.|\n)*2 x 2"),
        ({"weight": PRUNED.to(torch.uint8)}, "'weight' is uint8"),
        ({"bias": PRUNED[0]}, "'bias' is bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: dict[str, Tensor], words: str) -> None:
    with pytest.raises(RecoveryError, match=words):
        keep_zeros(Matrix(), masks)
