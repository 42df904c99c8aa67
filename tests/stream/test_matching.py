"""Block matching on single layers: what is trained, what stays, and that a step is plain Adam on the stated loss."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from folders import same
from streams import stream
from tiny_models import build, random_ids
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from llmprune.errors import NumericsError
from llmprune.stream.activations import HiddenStates
from llmprune.stream.matching import Matched, Matching, match_layer
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream

IDS = random_ids(8, 12)
QUICK = Matching(epochs=3, lr=3e-3, sequences=2)


@dataclass
class Case:
    """A layer half of whose weights have just become zero."""

    run: Stream
    layer: ResidentLayer
    targets: HiddenStates
    before: dict[str, Tensor]

    def match(self, options: Matching = QUICK) -> Matched:
        return match_layer(self.layer, self.run.hidden, self.targets, list(self.layer.matrices), options)

    @property
    def now(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.layer.module.named_parameters()}

    @property
    def changed(self) -> set[str]:
        return {name for name, value in self.now.items() if not same(value, self.before[name])}

    def error(self, module: nn.Module, batches: range) -> Tensor:
        """The mean of ||f(h) - T||^2 / ||T||^2 over the tokens of some batches, by the definition."""
        errors = []
        for batch in batches:
            args, kwargs = self.run.calls.get(0, batch)
            output = tree_leaves(module(self.run.hidden[batch], *args, **kwargs))[0].float()
            target = self.targets[batch].float()
            errors.append(((output - target) ** 2).sum(-1) / (target**2).sum(-1))
        return torch.cat(errors).mean()

    @property
    def validation(self) -> float:
        with torch.no_grad():
            return float(self.error(self.layer.module, range(self.run.statistics_batches, len(self.run.batches))))


def case(family: str = "llama", dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Case:
    run = stream(build(family, dtype), IDS, held_back=2)
    run.capture()
    for batch in range(len(run.batches)):
        run.hidden[batch] = run.hidden[batch] * scale
    layer = ResidentLayer(run, 0)
    targets = run.hidden.copy()
    layer.advance(targets)
    for name in layer.matrices:
        weight = layer.weight(name)
        layer.replace(name, weight.where(weight.abs() > weight.abs().median(), torch.zeros(())))
    found = Case(run, layer, targets, {})
    found.before = found.now
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_errors_fall_and_zeros_stay(family: str, dtype: torch.dtype) -> None:
    layer = case(family, dtype)
    matched = layer.match()
    assert matched.after < matched.before
    assert matched.after == pytest.approx(layer.validation, rel=1e-4)
    assert 1 <= matched.best <= matched.epochs <= 3
    pruned = {matrix.parameter for matrix in layer.layer.matrices.values()}
    for name, value in layer.now.items():
        assert value.dtype == dtype
        assert name not in pruned or not value[layer.before[name] == 0].any()
    assert pruned & layer.changed
    assert layer.changed <= layer.layer.replaced


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_same_again_gives_the_same_bits(family: str) -> None:
    one, other = case(family), case(family)
    assert one.match() == other.match()
    assert all(same(value, other.now[name]) for name, value in one.now.items())
    # The order of the batches depends on the seed, so the result does.
    third = case(family)
    third.match(Matching(epochs=3, lr=3e-3, sequences=2, seed=5))
    assert not all(same(value, third.now[name]) for name, value in one.now.items())


def test_a_layer_that_does_not_improve_stays_as_it_was() -> None:
    layer = case()
    matched = layer.match(Matching(epochs=9, lr=1.0, sequences=2))
    assert matched.before == matched.after == pytest.approx(layer.validation, rel=1e-4)
    assert (matched.epochs, matched.best) == (4, 0), "three epochs without improvement end it"
    assert layer.changed == set()


def test_a_layer_without_an_error_is_not_trained() -> None:
    run = stream(build("llama"), IDS, held_back=2)
    run.capture()
    layer = ResidentLayer(run, 0)
    targets = run.hidden.copy()
    layer.advance(targets)
    assert match_layer(layer, run.hidden, targets, list(layer.matrices), QUICK) == Matched(0.0, 0.0, 0, 0)
    assert not layer.replaced


def test_what_is_worse_at_first_but_falls_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five epochs above the error of the untrained layer, each lower than the one before, then two below it."""
    errors = iter([1.0, 9.0, 8.0, 6.0, 4.0, 2.0, 0.9, 0.8, *[0.85] * 90])
    monkeypatch.setattr("llmprune.stream.matching._Fit.validate", lambda self, masters: next(errors))
    matched = case().match(Matching(epochs=40, lr=1e-4, sequences=2))
    assert (matched.before, matched.after, matched.best, matched.epochs) == (1.0, 0.8, 7, 10)


def test_patience_waits_for_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1.0, *[2.0] * 10, 0.5, *[0.6] * 90])
    monkeypatch.setattr("llmprune.stream.matching._Fit.validate", lambda self, masters: next(errors))
    matched = case().match(Matching(epochs=90, lr=1e-4, sequences=6))
    assert (matched.best, matched.epochs) == (11, 14)


def test_the_learning_rate_rises_then_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, step = [], torch.optim.Adam.step

    def noted(self: torch.optim.Adam, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    case().match(Matching(epochs=20, lr=1e-4, sequences=2))
    assert rates[:6] == pytest.approx([1e-4 * (n + 1) / 6 for n in range(6)])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert len(rates) == 60
    assert rates[-1] == pytest.approx(2e-6, rel=0.1)


def test_the_best_epoch_is_kept_not_the_last() -> None:
    options = Matching(epochs=60, lr=3e-3, sequences=2)
    layer = case()
    matched = layer.match(options)
    assert 0 < matched.best < matched.epochs
    assert layer.validation == pytest.approx(matched.after, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_is_adam_on_the_mean_relative_error_of_all_training_tokens(family: str) -> None:
    """One epoch of one step over three batches, beside a copy that autograd and Adam train without our code."""
    layer = case(family)
    copy = deepcopy(layer.layer.module).requires_grad_()
    trained = dict(copy.named_parameters())
    matrices = {matrix.parameter for matrix in layer.layer.matrices.values()}
    optimiser = torch.optim.Adam(trained.values(), lr=1e-4)
    layer.error(copy, range(layer.run.statistics_batches)).backward()
    for name in matrices:
        trained[name].grad[layer.before[name] == 0] = 0.0
    optimiser.step()
    matched = layer.match(Matching(epochs=1, lr=1e-4, sequences=99))
    assert matched.best == 1, "otherwise nothing would be compared"
    for name, value in layer.now.items():
        # The first step of Adam is lr times the gradient's sign: where that is tiny, rounding decides.
        far = trained[name].grad.abs() > 1e-6
        assert torch.allclose(value[far], trained[name].detach()[far], rtol=0, atol=2e-7), name
        assert name in layer.changed


@pytest.mark.parametrize(
    ("family", "train", "wanted"),
    [
        ("llama", "norms", {"input_layernorm.weight", "post_attention_layernorm.weight"}),
        ("gpt2", "norms", {"ln_1.weight", "ln_2.weight"}),
        ("gpt2", "biases", {
            "ln_1.bias", "ln_2.bias", "attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias",
        }),
        ("gpt2", "weights", {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}),
    ],
)  # fmt: skip
def test_only_what_is_asked_for_is_trained(family: str, train: str, wanted: set[str]) -> None:
    layer = case(family)
    matched = layer.match(Matching(epochs=2, lr=3e-3, sequences=2, train=(train,)))
    assert matched.after < matched.before
    assert layer.changed == wanted


def test_matrices_that_were_not_pruned_are_not_trained() -> None:
    layer = case()
    match_layer(layer.layer, layer.run.hidden, layer.targets, ["model.layers.0.mlp.up_proj"], QUICK)
    assert {name for name in layer.changed if "proj.weight" in name} == {"mlp.up_proj.weight"}


def test_nothing_to_train_is_measured_and_left() -> None:
    layer = case("mistral")
    matched = layer.match(Matching(train=("biases",)))
    assert matched == Matched(matched.before, matched.before, 0, 0)
    assert matched.before == pytest.approx(layer.validation, rel=1e-4)
    assert layer.changed == set()


def test_bfloat16_layers_hold_what_was_trained_rounded() -> None:
    """The error that decides is that of the weights as they are stored."""
    layer = case(dtype=torch.bfloat16)
    matched = layer.match()
    assert matched.after == pytest.approx(layer.validation, rel=1e-4)
    assert matched.before > matched.after


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradients_below_the_smallest_float16_still_train(family: str) -> None:
    """Hidden states of a thousand: the gradient of the relative error at the layer's output is below 1e-8."""
    layer = case(family, torch.float16, scale=1000.0)
    matched = layer.match()
    assert matched.after < 0.9 * matched.before
    assert all(value.dtype == torch.float16 for value in layer.now.values())
    assert {matrix.parameter for matrix in layer.layer.matrices.values()} & layer.changed


def test_a_loss_that_is_not_finite_names_the_layer_and_the_way_out() -> None:
    layer = case()
    said = r"model\.layers\.0: the loss of block matching is (nan|inf)\nexpected: .*\nfix: lower reconstruct\.lr"
    with pytest.raises(NumericsError, match=said):
        layer.match(Matching(epochs=2, lr=1e30, sequences=2))
