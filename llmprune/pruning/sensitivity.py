"""`llmprune sensitivity`: what pruning each kind of matrix in each layer alone does to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune import __version__
from llmprune.devices import describe_device
from llmprune.errors import RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pages.sensitivity_page import sensitivity_page
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.allocating.cost import AllocationCost, scan_cost
from llmprune.pruning.allocating.measuring import split
from llmprune.pruning.allocating.pool import Pool, find_pool
from llmprune.pruning.allocating.scan import scan, to_dict
from llmprune.pruning.context import Run
from llmprune.pruning.forecast.rates import measure_rates
from llmprune.pruning.jobs import Job, plan_jobs
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.storage.files import require_writable, write_json, write_text
from llmprune.storage.folders import writing_to
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.text.loading import check_texts, model_positions, tokenizer_for

JSON_NAME, PAGE_NAME = "sensitivity.json", "sensitivity.html"

# Half of the weights, which is what most recipes remove; only the shape of the pattern matters here.
DEFAULT_RECIPE: Mapping[str, Any] = {"pattern": 0.5, "method": "wanda"}
LEVELS = (0.3, 0.5, 0.7, 0.9)


def sensitivity(
    model: str | Path,
    output: Path,
    recipe: str | Path | Mapping[str, Any] | Recipe = DEFAULT_RECIPE,
    *,
    levels: Sequence[float] = LEVELS,
    overrides: Sequence[str] = (),
    watch: Watcher = ignore,
) -> dict[str, Any]:
    """Measure the relative output error and the KL divergence of each unit alone, and write them as JSON and as a page.

    A unit is the matrices of one kind in one layer: one, or that of every expert. The model is streamed one layer at a
    time and not changed; both files are written at the end, atomically.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        output: folder for sensitivity.json and sensitivity.html; other files in it are left alone.
        recipe: which matrices, in which kind of pattern, and the calibration text; nothing else of it is used.
        levels: sparsities, in (0, 1).
        overrides: changes to the recipe, "key.path=value".
        watch: told about every step.

    Returns:
        What sensitivity.json holds.

    Raises:
        CheckpointError: a file cannot be written in `output`; said before anything is computed.
        LlmpruneError: as for `prune`.
    """
    levels = _checked(levels)
    for name in (JSON_NAME, PAGE_NAME):
        require_writable(output / name)
    run, source, jobs, pool = _prepared(model, recipe, overrides, watch)
    with run.watch:
        with writing_to(output):
            output.mkdir(parents=True, exist_ok=True)
        tokens = run.texts(source, jobs, tokenizer_for(run.recipe.texts.values(), source.folder, source.config))
        text = tokens["calibration"]
        texts = split(text.ids, run.recipe.held_back)
        each = [list(levels) for _ in pool.units]
        found = scan(run, source, pool, texts, each, [[level] * len(pool.units) for level in levels])
    result = {
        "model": str(model),
        "source": checkpoint_digest(source.folder),
        "version": __version__,
        "device": describe_device(run.device),
        "recipe": run.recipe.to_dict(),
        "text": text.description | {"digest": text.digest},
        "tokens": {"statistics": texts[0].numel(), "divergences": texts[1].numel()},
        "seconds": dict(run.stages.seconds),
        "units": to_dict(found.units),
    }
    with writing_to(output):
        write_json(output / JSON_NAME, result)
        write_text(output / PAGE_NAME, sensitivity_page(result))
    return result


def forecast_sensitivity(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe = DEFAULT_RECIPE,
    *,
    levels: Sequence[float] = LEVELS,
    overrides: Sequence[str] = (),
) -> tuple[AllocationCost, str]:
    """What a scan would cost, as data and as a sentence; nothing is run or written. Arguments as for `sensitivity`."""
    levels = _checked(levels)
    run, source, _, pool = _prepared(model, recipe, overrides, ignore)
    check_texts(run.recipe.texts, source)
    cost = scan_cost(source, run.recipe, pool, len(levels))
    rates = measure_rates(run.device, source.dtype)
    sentence = cost.sentence(rates.forward, int(run.recipe.activation_budget))
    return cost, f"The scan makes {sentence}"


def to_plain(cost: AllocationCost) -> dict[str, Any]:
    """A cost as plain data, ready for JSON."""
    return asdict(cost)


def _prepared(
    model: str | Path, recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str], watch: Watcher
) -> tuple[Run, CheckpointSource, list[dict[str, Job]], Pool]:
    settings = load_recipe(recipe, overrides)
    if settings.rotation is not None and settings.rotation.optional:
        watch(Progress("measured without the rotation of the recipe, which is optional"))
        settings = settings.model_copy(update={"rotation": None})
    for key in ("structures", "rotation"):
        if getattr(settings, key) is not None:
            raise RecipeError(
                f"sensitivity with a recipe that has {key}",
                expected="a recipe with a pattern only",
                fix=f"remove {key}: the scan is of the weights of the dense model"
                + ("; or scan what `llmprune rotate` writes" if key == "rotation" else ""),
            )
    run = Run.begin(settings.model_copy(update={"evaluation": None}), watch)
    source = run.open(resolve_model(model))
    run = run.fitted(model_positions(source.config))
    jobs = plan_jobs(source, run.recipe)
    try:
        return run, source, jobs, find_pool(source, jobs)
    except RecipeError as error:
        raise RecipeError(
            f"nothing to measure with the pattern {run.recipe.pattern}",
            expected="at least two matrices with an unstructured pattern or blocks: N:M has one sparsity only",
            fix="set pattern=0.5, which stands for any sparsity; or widen include",
        ) from error


def _checked(levels: Sequence[float]) -> list[float]:
    if not levels or not all(0 < level < 1 for level in levels):
        raise RecipeError(
            f"levels are {', '.join(map(str, levels)) or 'none'}",
            expected="sparsities above 0 and below 1",
            fix="give for example 0.3,0.5,0.7",
        )
    return sorted(set(levels))
