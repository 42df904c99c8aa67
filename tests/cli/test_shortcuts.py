"""Short flags: what they stand for, and what they refuse."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import make_plain, run

from llmprune.cli.console import Display
from llmprune.cli.shortcuts import DEFAULT_RECIPE, Wanted
from llmprune.errors import LlmpruneError, RecipeError
from llmprune.methods import METHODS
from llmprune.progress import Progress
from llmprune.recipe.recipe import Recipe, load_recipe

SHORT = ["--num-samples", "6", "--max-seq-length", "24", "--set", "evaluation.samples=2", "--set", "held_back=1"]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


def test_the_help_names_every_method() -> None:
    shown = " ".join(run("prune", "--help").stdout.replace("│", " ").split())
    assert f"How weights are chosen: {', '.join([*METHODS][:-1])} or {[*METHODS][-1]}. Or one of" in shown


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32, with a tokenizer of the words w0 to w127."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


def asked(recipe: str | None = None, overrides: Sequence[str] = (), **flags: str) -> Recipe:
    """The recipe that a command line asks for."""
    wanted = Wanted.read(recipe, overrides, **flags)
    with wanted.spelled():
        return load_recipe(wanted.name, wanted.described(wanted.settings()))


def test_without_flags_it_is_the_default_recipe() -> None:
    assert asked() == load_recipe(DEFAULT_RECIPE)


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ({"pattern": "4:8"}, "pattern=4:8"),
        ({"sparsity": "50%"}, "pattern=0.5"),
        ({"method": "wanda"}, "method=wanda"),
        ({"dataset": "calm.txt"}, "calibration.source=calm.txt"),
        ({"num_samples": "3"}, "calibration.samples=3"),
        ({"max_seq_length": "99"}, "calibration.length=99"),
        ({"eval_dataset": "held.txt"}, "evaluation.source=held.txt"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_flag_is_its_setting(flags: dict[str, str], setting: str) -> None:
    for recipe in (None, "wanda-50"):
        assert asked(recipe, **flags).digest == load_recipe(recipe or DEFAULT_RECIPE, [setting]).digest
    # Said twice is said once.
    assert asked("wanda-50", [setting], **flags) == load_recipe("wanda-50", [setting])


def test_a_sparsity_alone_is_unstructured_and_the_description_says_so() -> None:
    recipe = asked(sparsity="0.6")
    assert (str(recipe.pattern), recipe.description) == ("0.6", "alps, pattern 0.6")
    assert asked(overrides=["description=mine"], sparsity="0.6").description == "mine"
    assert asked(num_samples="4").description == load_recipe(DEFAULT_RECIPE, ["calibration.samples=4"]).description


def test_a_chain_as_the_method() -> None:
    recipe = asked(method="[wanda, {swaps: {sweeps: 2}}, refit]")
    assert recipe.description == "wanda + swaps + refit, pattern 2:4"
    assert recipe.method == load_recipe("wanda-50", ["method=[wanda, {swaps: {sweeps: 2}}, refit]"]).method
    with pytest.raises(RecipeError, match=r"write a chain as a list: \[wanda, swaps\]"):
        asked(method="wanda,swaps")


def test_a_pattern_may_repeat_its_sparsity() -> None:
    assert str(asked(pattern="2:4", sparsity="0.5").pattern) == "2:4"


@pytest.mark.parametrize(
    ("recipe", "overrides", "flags", "what", "fix"),
    [
        (None, [], {"pattern": "2:4", "sparsity": "0.6"}, "--pattern 2:4 and --sparsity 0.6", "remove --sparsity"),
        (None, [], {"sparsity": "2:4"}, "--sparsity 2:4", "--pattern 2:4"),
        (None, [], {"sparsity": "50"}, "--sparsity 50: sparsity 50.0", "write 0.5 or 50%"),
        (None, ["pattern=0.6"], {"sparsity": "50%"}, "--sparsity 50% and --set pattern=0.6", "remove one"),
        (None, ["calibration={source: b}"], {"dataset": "a"}, "--dataset a and --set calibration=", "remove one"),
        (None, [], {"method": "wnda"}, "--method wnda: unknown method", ""),
        (None, [], {"num_samples": "0"}, "--num-samples 0: samples 0", ""),
        (None, [], {"dataset": "a/b", "eval_dataset": "a/b"}, "are both a/b", "--set evaluation.split=test"),
        ("ffn-25", [], {"sparsity": "0.5"}, "the recipe ffn-25, which removes structures",
         "add --method sparsegpt, or use --recipe best-fast; what is removed is set by "
         "--set structures.ffn.remove=0.25"),
        ("budget-25", [], {"method": "wanda"}, "--method wanda with", "--set structures.budget.remove=0.25"),
        ("sparsegpt-attention-2of4-mlp-50", [], {"sparsity": "0.6"}, "whose rules set another pattern for *att*n*",
         "--set rules=[] to drop the rules, or write --set pattern=0.6"),
    ],
)  # fmt: skip
def test_contradictions(recipe: str | None, overrides: list[str], flags: dict[str, str], what: str, fix: str) -> None:
    with pytest.raises(LlmpruneError) as caught:
        asked(recipe, overrides, **flags)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_what_names_the_way_out_works() -> None:
    both = asked("ffn-25", sparsity="0.5", method="wanda")
    assert both.structures is not None
    assert str(both.pattern) == "0.5"
    assert asked("ffn-25", ["method=wanda"], sparsity="0.5").digest == both.digest
    assert asked("sparsegpt-attention-2of4-mlp-50", ["rules=[]"], sparsity="0.6").rules == ()
    assert asked("sparsegpt-attention-2of4-mlp-50", method="wanda").rules != ()
    assert asked(None, ["evaluation.split=test"], dataset="a/b", eval_dataset="a/b").evaluation is not None


def test_a_recipe_may_leave_the_method_to_the_flag(tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text("pattern: 0.5\n")
    assert asked(str(tmp_path / "half.yaml"), method="magnitude").digest == load_recipe("magnitude-50").digest
    with pytest.raises(RecipeError, match="method is missing"):
        asked(str(tmp_path / "half.yaml"), sparsity="0.6")


def test_a_run_by_flags_goes_on_by_the_command_that_it_names(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Display.__call__

    def interrupt(self: Display, progress: Progress) -> None:
        original(self, progress)
        if (progress.stage, progress.layer) == ("pruning", 1):
            raise KeyboardInterrupt

    arguments = ["prune", model, "--output", tmp_path / "out", "--sparsity", "0.5", "--method", "wanda", *SHORT]
    with monkeypatch.context() as patched:
        patched.setattr(Display, "__call__", interrupt)
        stopped = run(*arguments, "--json")
    assert stopped.exit_code == 130
    command = shlex.split(stopped.stderr.splitlines()[-1].partition("continue with: llmprune ")[2])
    assert command == [*map(str, arguments), "--json", "--resume"]
    report: dict[str, Any] = json.loads(run(*command).stdout)
    assert report["recipe"]["pattern"] == "0.5"
    assert list(report["recipe"]["method"]) == ["wanda"]
    assert report["recipe"]["calibration"]["samples"] == 6
    assert report["evaluation"]["dense"]["length"] == 24


def test_a_sweep_takes_several_values(model: Path) -> None:
    arguments = ["sweep", model, "--sparsity", "0.5,0.6", "--method", "wanda,magnitude", *SHORT, "--dry-run", "--json"]
    names = [row["name"] for row in json.loads(run(*arguments).stdout)["rows"]]
    assert names == ["pattern-0.5_wanda", "pattern-0.5_magnitude", "pattern-0.6_wanda", "pattern-0.6_magnitude"]


@pytest.mark.parametrize("typed", ["--sparsty", "--num_samples", "--recip"])
def test_unknown_options_suggest_the_nearest(typed: str) -> None:
    known = {"--sparsty": "--sparsity", "--num_samples": "--num-samples", "--recip": "--recipe"}
    result = run("prune", "testbed", "--output", "out", typed, "0.5")
    assert result.exit_code == 2
    assert known[typed] in result.stderr.replace(typed + " ", "")
