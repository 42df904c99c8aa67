"""The sentence on top: what was done, how much worse, what next."""

import math
from typing import Any

import pytest
from report_rows import row
from synthetic_runs import header, perplexity, smaller

from llmprune.pages.headline import headline
from llmprune.pages.labels import short_recipe
from llmprune.storage.report import Report


def said(pruned: float | None, *rows: Any, **changes: Any) -> str:
    evaluation = {**header()["evaluation"], "pruned": perplexity(pruned, "a" * 64)}
    return headline(Report(rows or (row(),), header(evaluation=evaluation, **changes)), "out/x y")


@pytest.mark.parametrize(
    ("pruned", "cost", "advice"),
    [
        (20.5, "rises: 20.00 -> 20.50 (x1.02)", "check tasks with `llmprune eval 'out/x y' --against org/model`, then"),
        (19.0, "falls: 20.00 -> 19.00", "then `llmprune pack` or quantise it"),
        (26.0, "rises: 20.00 -> 26.00 (x1.30)", "fine-tune to recover some of the loss"),
        (80.0, "(x4.00)", "largest relative output error is that of model.layers.0.mlp.up_proj"),
        (None, "its perplexity is infinite", "remove less, or exclude sensitive matrices"),
    ],
)
def test_the_advice_follows_from_the_loss(pruned: float | None, cost: str, advice: str) -> None:
    found = said(pruned)
    assert found.startswith("model was pruned (sparsegpt 0.5): 50.0% of the weights in 1 matrices are zero; ")
    assert cost in found
    assert advice in found
    assert found.endswith(".")
    assert "\n" not in found


def test_a_change_within_its_error_is_called_so() -> None:
    """Factors 1.04 and 1.30 with an error of 0.03 in the logarithm."""
    evaluation = {**header()["evaluation"], "change_stderr": 0.03}
    found = [
        headline(Report((row(),), header(evaluation={**evaluation, "pruned": perplexity(pruned, "a" * 64)})))
        for pruned in (20.8, 26.0)
    ]
    assert "(x1.04), less than 2 standard errors: this little text cannot tell it from no change. Next" in found[0]
    assert "standard errors" not in found[1]


def test_methods_that_look_at_no_input_are_the_first_to_go() -> None:
    assert "use sparsegpt or wanda instead of magnitude" in said(80.0, row(method="magnitude"), row())
    assert "instead of" not in said(20.5, row(method="magnitude"))


def test_what_was_not_measured_is_measured_next() -> None:
    found = headline(Report((row(),), header(evaluation=None)))
    advice = "measure it with `llmprune perplexity DIR --against org/model --text FILE`"
    assert f"its perplexity was not measured. Next: {advice}" in found


def test_structures_are_counted_in_parameters() -> None:
    found = headline(Report((), smaller()))
    assert "model was pruned (budget -25%, depth -1): 75.0% of the parameters are kept; perplexity rises" in found


def test_an_infinite_dense_model_has_no_factor() -> None:
    evaluation = {"dense": perplexity(None, "a" * 64), "pruned": perplexity(None, "a" * 64)}
    assert math.isinf(Report((), header(evaluation=evaluation)).dense_perplexity or 0)
    assert "infinite" in headline(Report((row(),), header(evaluation=evaluation)))


def test_a_chain_is_named_by_its_steps() -> None:
    chain = {"pattern": "2:4", "method": [{"wanda": {}}, {"refit": {"damping": 0.01}}]}
    assert short_recipe(chain) == "wanda + refit 2:4"
