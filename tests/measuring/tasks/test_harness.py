"""lm-eval on our checkpoints: what it scores, what it keeps, and what it says when something is wrong."""

import errno
import gc
import json
import math
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from folders import tensors
from harness_tasks import write_task
from packed_models import save_packed
from safetensors.torch import save_file

from llmprune import prune
from llmprune.errors import CheckpointError, DeviceError, ModelError, NumericsError
from llmprune.measuring.tasks import OFFLINE_TASKS, EvaluationError, HarnessSettings, run_tasks
from llmprune.storage.hub import resolve_model

# Importing the harness takes seconds, so it waits for the first test.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("harness")]
ON_CPU = HarnessSettings(device="cpu", batch_size=4, quiet=True)


def by_hf(folder: Path, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """What lm-eval says by itself."""
    from lm_eval import simple_evaluate

    from llmprune.measuring.tasks.tasks import Tasks

    loaded = Tasks(tasks)
    found = simple_evaluate(
        "hf", model_args={"pretrained": str(folder)}, tasks=loaded.names, device="cpu", task_manager=loaded, **options
    )
    return found["results"]


def with_settings(**changes: Any) -> HarnessSettings:
    return HarnessSettings(**{"device": "cpu", "batch_size": 4, "quiet": True, **changes})


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_dtype_that_the_processor_lacks_is_pointed_out(
    dtype: str, tasks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save(tiny_models.build("llama").to(torch.bfloat16), tmp_path)
    monkeypatch.setattr("llmprune.measuring.tasks.harness.computed_in", lambda stored, device: torch.float32)
    told: list[str] = []
    run_tasks(folder, tasks, settings=with_settings(limit=1, dtype=dtype), watch=lambda step: told.append(step.stage))
    note = ", in bfloat16, which this processor multiplies slowly: --dtype float32 is several times faster"
    assert told[-1] == f"lm-eval on {folder}{note * (dtype == 'auto')}"


def test_scores_are_those_of_hf_to_the_last_digit() -> None:
    found = run_tasks("testbed", settings=with_settings(limit=3))
    assert found.results["results"] == by_hf(resolve_model("testbed"), OFFLINE_TASKS, batch_size=4, limit=3)
    assert {row.task for row in found.rows} == set(OFFLINE_TASKS)
    assert {row.documents for row in found.rows} == {3}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_dtype_is_that_of_hf(dtype: str, llama: Path, tasks: tuple[str, ...]) -> None:
    found = run_tasks(llama, tasks, settings=with_settings(dtype=dtype, num_fewshot=1))
    wanted = by_hf(llama, tasks, batch_size=4, num_fewshot=1)
    assert found.results["results"] == wanted
    assert found.results["n-shot"]["tiny_choice"] == 1


def test_a_packed_checkpoint_scores_as_its_weights_unpacked(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    folder = save_packed(tmp_path, dtype=torch.float32, hidden_size=64, intermediate_size=96)
    result = run_tasks(folder / "packed", tasks, folder / "dense", ON_CPU)
    assert result.rows[0].value == pytest.approx(result.rows[0].dense_value, rel=1e-5)
    assert all(row.verdict == "within error" for row in result.rows[1:])
    config = json.loads((folder / "packed" / "config.json").read_text())
    assert config["quantization_config"]["modules"]


# Smaller everywhere, and with layers that differ, which stock transformers does not load.
@pytest.mark.parametrize(
    "structures", [{"ffn": {"remove": 0.5}}, {"attention": {"remove": 1}}], ids=["ffn", "attention"]
)
def test_a_structured_checkpoint_is_worse_than_the_dense_one(
    structures: dict[str, Any], llama: Path, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    settings = {key: value for key, value in tiny_models.recipe().items() if key not in ("pattern", "method")}
    prune(llama, {**settings, "structures": structures}, tmp_path / "out")
    result = run_tasks(tmp_path / "out", tasks, llama, ON_CPU)
    assert result.rows[0].test == "paired"
    assert abs(result.rows[0].delta or 0) > 1e-3
    sizes = [found["config"]["model_num_parameters"] for found in (result.results, result.dense_results or {})]
    assert sizes[0] < sizes[1]


def test_a_batch_size_can_be_found(llama: Path, tasks: tuple[str, ...]) -> None:
    found = run_tasks(llama, tasks[:2], settings=with_settings(batch_size="auto"))
    fixed = run_tasks(llama, tasks[:2], settings=ON_CPU)
    assert found.results["config"]["batch_sizes"] != []
    assert found.rows[0].value == pytest.approx(fixed.rows[0].value, rel=1e-5)


def test_what_is_written(llama: Path, tasks: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "some" / "eval.json"
    result = run_tasks(llama, tasks, llama, ON_CPU, output)
    content = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert content == result.to_dict()
    assert content["rows"][0]["metric"] == "word_perplexity"
    assert [Path(file).parents[1] for file in content["files"]] == [tmp_path / "some" / "eval"] * 2
    for file, found in zip(result.files, (result.results, result.dense_results), strict=True):
        assert found is not None
        written = json.loads(file.read_text())
        assert written["results"] == found["results"]
        assert written["config"]["model"] == "llmprune"
        assert written["config"]["model_args"]["pretrained"] == str(llama)
        # What lm-eval's own command writes beside, and no documents.
        assert {"configs", "versions", "n-shot", "task_hashes", "model_name", "lm_eval_version"} <= set(written)
        assert "samples" not in written
    assert written["task_hashes"]["tiny_choice"]


def test_results_that_cannot_be_written_are_an_error(llama: Path, tasks: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "eval").write_text("a file in the folder's place")
    with pytest.raises(CheckpointError, match="could not write its results"):
        run_tasks(llama, tasks[:1], settings=ON_CPU, output=tmp_path / "eval.json")


def test_figures_outlive_a_disk_that_fills_while_they_are_measured(
    llama: Path, tasks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmprune.measuring.tasks.harness.write_json", full)
    with pytest.raises(EvaluationError, match="could not be written") as caught:
        run_tasks(llama, tasks[:1], settings=ON_CPU, output=tmp_path / "eval.json")
    kept = json.loads((caught.value.fix or "").partition("measured: ")[2])
    assert kept["rows"][0]["value"] is not None


def count_forwards(monkeypatch: pytest.MonkeyPatch, most: float = math.inf) -> list[int]:
    """Batches as they are computed; after so many of them, somebody presses Ctrl-C."""
    from llmprune.measuring.tasks.model import LlmpruneLM

    seen: list[int] = []
    call = LlmpruneLM._model_call

    def counted(self: Any, ids: torch.Tensor, **options: Any) -> Any:
        if len(seen) >= most:
            raise KeyboardInterrupt
        seen.append(len(ids))
        return call(self, ids, **options)

    monkeypatch.setattr(LlmpruneLM, "_model_call", counted)
    return seen


def test_answers_are_kept(llama: Path, tasks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_settings(cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        whole = count_forwards(patch)
        plain = run_tasks(llama, tasks[:2], settings=ON_CPU)
    with monkeypatch.context() as patch:
        first = count_forwards(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(llama, tasks[:2], settings=settings)
    with monkeypatch.context() as patch:
        rest = count_forwards(patch)
        resumed = run_tasks(llama, tasks[:2], settings=settings)
    with monkeypatch.context() as patch:
        none = count_forwards(patch)
        again = run_tasks(llama, tasks[:2], settings=settings)
    assert len(first) == 5
    assert sum(rest) < sum(whole)
    assert none == []
    assert resumed.rows == again.rows == plain.rows


def test_answers_are_those_of_one_model(llama: Path, tasks: tuple[str, ...], tmp_path: Path) -> None:
    other = tiny_models.save(tiny_models.build("llama", hidden_act="gelu"), tmp_path / "other")
    settings = with_settings(cache=tmp_path / "cache")
    result = run_tasks(llama, tasks[:1], other, settings)
    assert result.rows == run_tasks(llama, tasks[:1], other, ON_CPU).rows
    assert result.rows[0].delta != 0
    # The tokenizer decides an answer, too, and is no part of the weights.
    before = len(list((tmp_path / "cache").iterdir()))
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    run_tasks(other, tasks[:1], settings=settings)
    assert len(list((tmp_path / "cache").iterdir())) > before


def test_one_model_is_in_memory_at_a_time(llama: Path, tasks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.serving.loader import load

    alive: list[weakref.ref[Any]] = []
    seen: list[int] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        seen.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(model := load(*arguments, **options)))
        return model

    monkeypatch.setattr("llmprune.measuring.tasks.model.load", noted)
    run_tasks(llama, tasks, llama, ON_CPU)
    assert seen == [0, 0]


def test_nothing_is_printed(llama: Path, tasks: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    run_tasks(llama, tasks, settings=ON_CPU)
    assert capsys.readouterr() == ("", "")
    run_tasks(llama, tasks, settings=with_settings(quiet=False))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Running loglikelihood requests" in shown.err


def test_warnings_come_through(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task = write_task(tmp_path, "vague", [{"text": "w40 w41"}], **rolling, metric_list=[{"metric": "word_perplexity"}])
    run_tasks(llama, [task], settings=ON_CPU)
    shown = capsys.readouterr()
    assert "aggregation is not. using default" in shown.err
    assert "it/s" not in shown.err


def test_a_table_for_notebooks(llama: Path, tasks: tuple[str, ...]) -> None:
    alone = run_tasks(llama, tasks[1:2], settings=ON_CPU)
    assert "<td>tiny_choice</td><td>acc</td>" in alone._repr_html_()
    assert "delta" not in alone._repr_html_()
    beside = run_tasks(llama, tasks[1:2], llama, ON_CPU)._repr_html_()
    assert "<th>delta_stderr</th><th>verdict</th>" in beside
    assert "<td>within error</td>" in beside


def test_a_perplexity_beyond_float64_is_an_error(llama: Path, tasks: tuple[str, ...], tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.build("llama"), tmp_path / "hopeless")
    weights = tensors(folder)
    weights["lm_head.weight"] *= 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="exceeds float64"):
        run_tasks(folder, tasks[:1], settings=ON_CPU)


def fail_to_load(*arguments: Any, **options: Any) -> None:
    raise AssertionError("weights were loaded")


def test_mistakes_are_found_before_any_weights(
    llama: Path, tasks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.measuring.tasks.model.load", fail_to_load)
    with pytest.raises(EvaluationError, match=r"no task 'llmprune_choise'; similar: llmprune_choice"):
        run_tasks(llama, ["llmprune_choise"])
    with pytest.raises(ModelError, match="no folder"):
        run_tasks(llama, tasks, tmp_path / "missing")
    with pytest.raises(DeviceError, match="nowhere"):
        run_tasks(llama, tasks, settings=with_settings(device="nowhere"))
    missing = write_task(tmp_path, "missing", [{"text": "w40"}], output_type="loglikelihood_rolling")
    (tmp_path / "missing.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"cannot be loaded: FileNotFoundError"):
        run_tasks(llama, [missing])
    broken = write_task(tmp_path, "broken", [{"text": "w40"}], output_type="loglikelihood_rolling")
    with pytest.raises(EvaluationError, match=r"broken.yaml cannot be loaded: TypeError"):
        run_tasks(llama, [broken])
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    unsafe = write_task(tmp_path, "unsafe", [{"text": "w40"}], **rolling, unsafe_code=True)
    with pytest.raises(EvaluationError, match="unsafe would run code"):
        run_tasks(llama, [unsafe])


def test_without_the_harness_its_installation_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError) as caught:
        run_tasks(llama)
    assert "pip install lm-eval" in caught.value.fix
