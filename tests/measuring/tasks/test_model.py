"""The model class in lm-eval's registry, and what it refuses."""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from llmprune.errors import ModelError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
# The harness itself is imported inside the tests: it takes seconds.


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry without our class; what is put into it is taken out again."""
    import lm_eval.models  # noqa: F401 # fills the registry
    from lm_eval.api.registry import model_registry

    from llmprune.measuring.tasks.model import MODEL_NAME

    entries = {name: entry for name, entry in model_registry._objs.items() if name != MODEL_NAME}
    monkeypatch.setattr(model_registry, "_objs", entries)
    return entries


def test_registered_by_name(unregistered: dict[str, Any]) -> None:
    from lm_eval.api.registry import get_model, model_registry

    from llmprune.measuring.tasks.model import LlmpruneLM, register

    register()
    register()
    assert get_model("llmprune") is LlmpruneLM
    register()
    assert {"hf", "llmprune"} <= set(model_registry)


def test_found_by_an_entry_point(unregistered: dict[str, Any]) -> None:
    from lm_eval.api.registry import get_model, model_registry

    from llmprune.measuring.tasks.model import MODEL_NAME, LlmpruneLM, register

    entry = EntryPoint(MODEL_NAME, "llmprune.measuring.tasks.model:LlmpruneLM", "lm_eval.models")
    model_registry.register(MODEL_NAME, target=entry)
    register()
    assert get_model("llmprune") is LlmpruneLM


def test_the_command_line_of_the_harness_knows_it(
    unregistered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.registry import get_model

    from llmprune.measuring.tasks.__main__ import main
    from llmprune.measuring.tasks.model import LlmpruneLM

    seen: list[type[Any]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(get_model("llmprune")))
    main()
    assert seen == [LlmpruneLM]


def test_by_the_harness_itself(llama: Path, tasks: tuple[str, ...]) -> None:
    from lm_eval import simple_evaluate

    from llmprune.measuring.tasks.model import register
    from llmprune.measuring.tasks.tasks import Tasks

    register()
    loaded = Tasks(tasks[:1])
    arguments = f"pretrained={llama},served=dense,revision=main,dtype=float32"
    found = [
        simple_evaluate(name, model_args=arguments.replace("served=dense,", "") if name == "hf" else arguments,
                        tasks=loaded.names, task_manager=loaded, device="cpu")["results"]
        for name in ("llmprune", "hf")
    ]  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft": "adapter"}, "model_args peft with"),
        ({"parallelize": True}, "model_args parallelize with"),
        ({"load_in_4bit": True}, "model_args load_in_4bit with"),
        ({"served": "packed"}, "is not packed"),
        ({"pretrained": "./missing"}, "no folder"),
    ],
)
def test_refused(options: dict[str, Any], said: str, llama: Path) -> None:
    from llmprune.measuring.tasks.model import LlmpruneLM

    with pytest.raises(ModelError, match=said):
        LlmpruneLM(**{"pretrained": str(llama), "device": "cpu", **options})


def test_our_tasks_are_found_by_the_harness() -> None:
    from lm_eval.tasks import TaskManager

    from llmprune.measuring.tasks.tasks import offline_folder

    manager = TaskManager(include_path=str(offline_folder()), include_defaults=False)
    loaded = manager.load(["llmprune_offline"])["tasks"]
    assert sorted(loaded) == ["llmprune_choice", "llmprune_continue", "llmprune_words"]
    questions = loaded["llmprune_choice"].test_docs()
    assert all(len(set(row["choices"])) == 4 for row in questions)
    assert set(questions["label"]) == {0, 1, 2, 3}
    # Cut off at a line's end, and as the harness strips what a model writes.
    written = loaded["llmprune_continue"].test_docs()["continuation"]
    assert all(text == text.lstrip() != "" and "\n" not in text for text in written)
    # Nothing in the texts may look like somebody's address.
    assert all("@" not in file.read_text(encoding="utf-8") for file in offline_folder().glob("*.jsonl"))
