"""Run lm-eval on a checkpoint and, for comparison, on its dense model."""

import contextlib
import gc
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from llmprune.devices import resolve_device
from llmprune.errors import CheckpointError, NumericsError
from llmprune.measuring.tasks.checks import generation_options, require_settings, require_templates
from llmprune.measuring.tasks.errors import EvaluationError, require_harness
from llmprune.measuring.tasks.result import EvaluationResult, HarnessSettings
from llmprune.measuring.tasks.significance import compare_results
from llmprune.models.skeleton import read_config
from llmprune.paths import user_path
from llmprune.precision import computed_in, dtype_name
from llmprune.progress import Progress, Watcher, ignore
from llmprune.serving.placement import require_placement
from llmprune.storage.files import require_writable, write_json
from llmprune.storage.hub import checkpoint_digest, resolve_model

# Our own, from the folder eval/tasks: they need no network.
OFFLINE_TASKS = ("llmprune_words", "llmprune_choice", "llmprune_continue")

# The files that affect an answer in addition to config.json and the weights.
_ANSWERING = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
              "*.tiktoken", "generation_config.json")  # fmt: skip


def run_tasks(
    model: str | Path,
    tasks: Sequence[str] = OFFLINE_TASKS,
    against: str | Path | None = None,
    settings: HarnessSettings | None = None,
    output: Path | None = None,
    watch: Watcher = ignore,
) -> EvaluationResult:
    """Run lm-eval on a checkpoint and, with `against`, on its dense model.

    Only one model is in memory at a time.

    Args:
        model: a hub id, a local checkpoint folder (packed, with layers of different sizes, or dense), or "testbed".
        tasks: names of tasks, groups or tags of lm-eval, with shell wildcards, or YAML files of tasks.
        against: the dense model to compare with.
        settings: how lm-eval is run; default: all documents, the checkpoint's dtype, the first GPU or the CPU.
        output: JSON file for the comparison; lm-eval writes its own files to a folder of the same name next to it.
        watch: called for the tasks, and for each model.

    Raises:
        EvaluationError: lm-eval is not installed, a task is unknown, its data is unavailable, or a setting has no
            effect or cannot be applied.
        LlmpruneError: a model cannot be read, there is no such device, or a score exceeds float64.

    Example:
        >>> run_tasks("testbed", ["llmprune_choice"]).rows[0].metric  # doctest: +SKIP
        'acc'
    """
    require_harness()
    watch(Progress("reading the tasks of lm-eval"))
    from llmprune.measuring.tasks.tasks import Tasks

    settings = settings or HarnessSettings()
    names = [str(name) for name in (model, against) if name is not None]
    # Everything that can be checked is checked before the first weights are loaded.
    folders = [resolve_model(name) for name in names]
    require_placement(settings.device, settings.device_map)
    require_settings(settings, output)
    if settings.apply_chat_template:
        require_templates(names, folders)
    if output:
        require_writable(output)
    with _kept_apart(settings.quiet):
        loaded = Tasks(tasks, settings.include_path and user_path(settings.include_path, EvaluationError))
    if settings.gen_kwargs is not None and not loaded.generating:
        raise EvaluationError(
            "gen_kwargs for tasks that generate no text",
            expected="a task such as gsm8k, whose answers the model writes; others only score given answers",
            fix="remove it, or choose other tasks",
        )
    folder = output.with_suffix("") if output else None
    runs = []
    for name, source in zip(names, folders, strict=True):
        watch(Progress(f"lm-eval on {name}{_slow(source, settings)}"))
        runs.append(_run(name, source, loaded, settings, folder))
    result = _result(names, settings, runs)
    if output:
        _keep(result, output)
    return result


def _slow(folder: Path, settings: HarnessSettings) -> str:
    """What to say of a dtype that this processor has no instructions for; lm-eval's own models keep it as well."""
    stored = read_config(folder).dtype
    if settings.dtype != "auto" or stored is None or computed_in(stored, resolve_device(settings.device)) == stored:
        return ""
    return f", in {dtype_name(stored)}, which this processor multiplies slowly: --dtype float32 is several times faster"


def _keep(result: EvaluationResult, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result.to_dict())
    except (OSError, CheckpointError) as error:
        # A disk that has filled meanwhile must not cost the hours of measuring.
        raise EvaluationError(
            f"the result could not be written: {error}",
            fix=f"make room, and keep what was measured: {json.dumps(result.to_dict())}",
        ) from error


def _result(names: list[str], settings: HarnessSettings, runs: list["_Evaluation"]) -> EvaluationResult:
    dense = runs[1] if len(runs) > 1 else None
    rows = compare_results(runs[0].results, dense.results if dense else None)
    files = tuple(file for kept in zip(*(run.files for run in runs), strict=False) for file in kept)
    for run in runs:
        del run.results["samples"]  # with their documents, by far the largest part
    dense_results = dense.results if dense else None
    return EvaluationResult(
        names[0], names[1] if dense else None, rows, settings, runs[0].results, dense_results, files
    )


class _Evaluation(NamedTuple):
    """What lm-eval returned for a model, including samples, and the files that it wrote."""

    results: dict[str, Any]
    files: list[Path]


def _run(name: str, source: Path, tasks: Any, settings: HarnessSettings, folder: Path | None) -> _Evaluation:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from llmprune.measuring.tasks.model import MODEL_NAME, register

    register()
    tracker = EvaluationTracker(output_path=str(folder)) if folder else None
    limit = int(settings.limit) if settings.limit and settings.limit >= 1 else settings.limit
    try:
        with _kept_apart(settings.quiet):
            results = simple_evaluate(
                MODEL_NAME,
                model_args={"pretrained": name, "dtype": settings.dtype, **_placed(settings)},
                tasks=tasks.names,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                device=settings.device,
                use_cache=_answers(source, settings),
                limit=limit,
                evaluation_tracker=tracker,
                task_manager=tasks,
                apply_chat_template=settings.apply_chat_template,
                gen_kwargs=generation_options(settings.gen_kwargs),
            )
    except OverflowError as error:
        raise NumericsError(
            f"a score of {name} exceeds float64: {error}",
            expected="a score that float64 can represent; the model is too damaged for this task",
            fix="prune less",
        ) from error
    if results is None:
        raise EvaluationError(
            "one of several processes",
            expected="a single process",
            fix=f"accelerate launch -m llmprune.measuring.tasks run --model {MODEL_NAME} ...",
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _Evaluation(results, _save(tracker, results, folder, samples=settings.log_samples))


def _placed(settings: HarnessSettings) -> dict[str, str]:
    return {} if settings.device_map is None else {"device_map": settings.device_map}


def _save(tracker: Any, results: dict[str, Any], folder: Path | None, *, samples: bool) -> list[Path]:
    if folder is None:
        return []
    kept = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(results=kept, samples=results["samples"])
    results |= kept  # with what the tracker has added
    here, when = folder / results["model_name_sanitized"], getattr(tracker, "date_id", None)
    files = [here / f"results_{when}.json"]
    for task, rows in results["samples"].items() if samples else ():
        tracker.save_results_samples(task_name=task, samples=rows)
        files.append(here / f"samples_{task}_{when}.jsonl")
    # lm-eval only logs its errors of writing.
    if not all(file.is_file() for file in files):
        raise CheckpointError(
            f"lm-eval could not write its results to {folder}", fix="check the space and the permissions there"
        )
    return files


def _answers(source: Path, settings: HarnessSettings) -> str | None:
    """The path of lm-eval's cache; its keys are the questions alone, so each model needs its own file."""
    if settings.cache is None:
        return None
    digest = hashlib.sha256(checkpoint_digest(source).encode())
    digest.update(f"\0{settings.dtype}\0{resolve_device(settings.device).type}".encode())
    digest.update(f"\0{settings.device_map}".encode() if settings.device_map else b"")
    for file in sorted({file for pattern in _ANSWERING for file in source.glob(pattern) if file.is_file()}):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return str(user_path(settings.cache, EvaluationError) / digest.hexdigest()[:32])


@contextlib.contextmanager
def _kept_apart(quiet: bool) -> Iterator[None]:
    """Keep lm-eval's output off stdout and, if `quiet`, its progress bars off stderr; warnings are still shown."""
    logger, handler = logging.getLogger("lm_eval"), logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents)):
            # lm-eval asks git for the commit of the current folder, and git prints an error outside a repository.
            stack.enter_context(mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None, create=True))
        if quiet:
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield
