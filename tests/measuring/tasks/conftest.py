"""Small models and tasks for lm-eval, and no network."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from harness_tasks import metric, write_task
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Refuse every connection, and fail where one was tried, even if the harness went on without it."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError(address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield tried
    assert tried == []


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No bars in the captured output."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the harness's description of the machine, which runs a dozen commands after each model."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")


@pytest.fixture(scope="session")
def harness() -> None:
    """Skip where lm-eval is not installed."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a tokenizer of the words w0 to w127; 64 positions."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """YAML files of three tasks in the words of that tokenizer."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> str:
        # From 40 on, because the special tokens w0 to w3 are found inside longer words as well.
        return " ".join(f"w{number}" for number in torch.randint(40, 100, (count,), generator=generator).tolist())

    rows = {
        "tiny_words": [{"text": words(30)} for _ in range(8)],
        "tiny_choice": [{"context": words(8), "choices": [words(3) for _ in range(4)], "label": 1} for _ in range(12)],
        "tiny_write": [{"prompt": words(8), "continuation": words(2)} for _ in range(4)],
    }
    asked: dict[str, dict[str, Any]] = {
        "tiny_words": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [metric("word_perplexity", "weighted_perplexity", False)],
        },
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [metric("acc")],
        },
        "tiny_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{continuation}}",
            "generation_kwargs": {"until": ["w3"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [metric("exact_match")],
        },
    }
    return tuple(write_task(folder, name, rows[name], **asked[name]) for name in rows)
