"""The sentence on top: what was done, how much worse, what next."""

import math
from typing import Any

import pytest
from report_rows import row
from synthetic_runs import header, perplexity, recovered, smaller

from llmprune.pages.headline import headline
from llmprune.pages.labels import repeating_command, short_recipe, short_run
from llmprune.pages.recovered import recovered_facts
from llmprune.pages.trained import trained_facts
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
    assert found.startswith("model was pruned (sparsegpt 0.5): 50.0% of the weights in 1 matrix are zero; ")
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


def trained(**changes: Any) -> dict[str, Any]:
    """A header of a model that was pruned in one stage while it trained."""
    recipe = {
        "rule": {"magnitude": {}}, "pattern": None,
        "schedule": {"kind": "cubic", "stages": 1, "start": 0.0, "end": 0.5},
        "training": {"loss": "cross-entropy", "learning_rate": 1e-4, "cycle": "stage"},
    } | changes.pop("recipe", {})  # fmt: skip
    training = {
        "name": "magnitude", "recipe": recipe, "measure": "perplexity", "sequences": 1, "length": 16, "steps": 1,
        "curve": [], "losses": [], "zeros": {"count": 10, "weights": 20}, "before": 20.0, "after": 25.0,
    }  # fmt: skip
    return header(**{"training": training, "texts": {"training": {"source": "text.txt"}}, **changes})


def test_a_training_counts_the_zeros_of_what_it_prunes() -> None:
    """10 of 20 weights in its matrix; embeddings and the head, which no recipe prunes, are among 100 in all."""
    found = headline(Report((row(),), trained(parameters=100)))
    assert "in 1 stage while it trained (magnitude): 50.0% of the weights in 1 matrix are zero (10.0% of all" in found
    facts = dict(trained_facts(trained()["training"]))
    assert (facts["zeros"], facts["schedule"]) == (
        "10 of 20 weights that the recipe prunes",
        "cubic, 1 stage, 0 to 0.5",
    )
    assert facts["text"] == "1 sequence of 16 tokens"


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ("none", ""),
        ("lora", ", by masked LoRA of rank 16, merged into the weights"),
        ("low-rank", ", by a low-rank correction of rank 16, beside the weights, in adapter/: without it"),
    ],
)
def test_the_adapters_of_a_recovery_are_named(adapter: str, named: str) -> None:
    found = recovered(options={"adapter": adapter})
    assert f"pruned was trained for 1 step with its zeros kept{named}" in headline(Report((), found))
    facts = dict(recovered_facts(found["recovery"]))
    assert ("adapters" in facts) == (adapter != "none")
    assert facts["text"] == "1 sequence of 16 tokens, 1 epoch"
    assert short_run(found) == ("wanda 2:4, recovered" if adapter == "none" else f"wanda 2:4, recovered ({adapter})")


def test_trainings_are_named_by_what_they_prune_to() -> None:
    assert short_run(trained()) == "magnitude to 50% in 1 stage"
    solved = {"rule": None, "method": ["wanda", {"refit": {}}], "pattern": "2:4"}
    assert short_run(trained(recipe=solved)) == "wanda + refit to 2:4 in 1 stage"
    again = recovered(recovery={"pruned_by": trained()["training"]["recipe"]})
    assert short_run(again) == "magnitude to 50% in 1 stage, recovered"


def test_the_command_that_repeats_a_training_names_its_text() -> None:
    common = "--recipe recipe.yaml"
    assert repeating_command(header()) == f"llmprune prune org/model {common} --output pruned"
    assert repeating_command(recovered()) == (
        f"llmprune recover out/pruned {common} --teacher org/model --text text.txt --num-samples 1 --max-seq-length 16 "
        "--eval-dataset self --output recovered"
    )
    assert repeating_command(trained()).startswith(f"llmprune train org/model {common} --text text.txt")
    assert repeating_command(recovered(recovery={"processes": 2})).startswith(
        "torchrun --nproc-per-node 2 -m llmprune recover out/pruned"
    )
    python_only = trained(texts={"training": {"source": "text.txt", "split": "test"}})
    assert repeating_command(python_only) == ""
