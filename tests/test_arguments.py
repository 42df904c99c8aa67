"""Arguments from Python that are of no use are refused in words, as those of the command line are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import recipe

from llmprune import TextSpec, dry_run, load_recipe, perplexity, prune
from llmprune.errors import LlmpruneError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune(None, recipe(), "out"), "a model of type NoneType"),
        (lambda: prune(torch.nn.Linear(2, 2), recipe(), "out"), "a model of type Linear"),
        (lambda: perplexity(3, TextSpec()), "a model of type int"),
        (lambda: prune("testbed", None, "out"), "a recipe of type NoneType"),
        (lambda: dry_run("testbed", ["wanda-50"]), "a recipe of type list"),
        (lambda: prune("testbed", recipe(), 3), "output folder 3"),
        (lambda: prune("testbed", recipe(), ""), "output folder ''"),
        (lambda: prune("testbed", recipe()), "no output folder for testbed"),
    ],
)
def test_arguments_of_a_wrong_type(call: Callable[[], Any], message: str, unchecked: None) -> None:
    with pytest.raises(LlmpruneError, match=message) as caught:
        call()
    assert caught.value.fix


@pytest.fixture
def unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_override_needs_no_list() -> None:
    assert load_recipe("wanda-50", "batch_size=2").batch_size == 2
